"""Log-mel spectrograms side by side: one row an item, one column a system."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.audio import Audio
from kalle.evaluation.metric import RATE_HZ
from kalle.models.mel import LogMel, MelConfig

TITLE_CHARACTERS = 60


@dataclass(frozen=True)
class FigureRow:
    """One item: its text, and mono float32 (S,) at 16 kHz by system, the recording first."""

    text: str
    audio: Mapping[str, Audio]


def draw(rows: Sequence[FigureRow]) -> bytes:
    """A PNG of every row's log-mel spectrograms under one colour scale; time in seconds, one time axis a row.

    Audio too short for one frame leaves its place empty.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    systems = list(dict.fromkeys(system for row in rows for system in row.audio))
    figure = Figure(figsize=(4.5 * len(systems), 2.2 * len(rows) + 0.4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(systems), squeeze=False, sharex="row")
    mel = LogMel(MelConfig(sample_rate=RATE_HZ))
    for row, line in zip(rows, axes, strict=True):
        for system, axis in zip(systems, line, strict=True):
            image = _log_mel(mel, row.audio.get(system))
            axis.set_title(f"{system}: {row.text[:TITLE_CHARACTERS]}", fontsize=7)
            axis.set_ylabel("mel band", fontsize=7)
            axis.tick_params(labelsize=6)
            if image is not None:
                seconds = image.shape[1] * mel.config.hop / RATE_HZ
                axis.imshow(image, origin="lower", aspect="auto", extent=(0, seconds, 0, image.shape[0]), vmin=-9, vmax=2)
        for axis in line:
            axis.set_xlim(0, max(len(audio) for audio in row.audio.values()) / RATE_HZ or 1)
    for axis in axes[-1]:
        axis.set_xlabel("seconds", fontsize=7)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _log_mel(mel: LogMel, audio: Audio | None) -> NDArray[np.float32] | None:
    if audio is None or len(audio) < mel.config.n_fft:
        return None
    return np.asarray(mel(torch.from_numpy(audio.copy())[None])[0].numpy())
