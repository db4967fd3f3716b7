"""Figures of one result, and of spectrograms side by side."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation.metrics import RATE_HZ
from kalle.extras import install_command
from kalle.files import write_atomic
from kalle.models.mel import LogMel, MelConfig
from kalle.synthesis.speech import Speech

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


IMAGE_SUFFIXES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp")
_DPI = 100
_QUANTILES = (0.05, 0.95)
_MEL_RANGE = 8.0
"""Natural-log magnitudes below the loudest that the colours span."""
_LOWEST_KL = 1e-3
_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d9591b", "#555555"


def speech_figure(speech: Speech, width: int = 1200, height: int = 900) -> Figure:
    """Waveform, log-mel spectrogram, standard deviations and end divergence of ``speech`` over one time axis in seconds.

    A figure of ``width`` x ``height`` pixels that belongs to no window. The band shows the quantiles 0.05 and 0.95 over
    the dimensions of a frame, the line their mean. Without frames the axes stay empty. UserError where matplotlib is missing.
    """
    figure = new_figure(width, height)
    wave, mel, spread, end = figure.subplots(4, 1, sharex=True, height_ratios=(1, 1.7, 1.1, 1.1))
    figure.suptitle(_title(speech), fontsize=12)
    _draw_wave(wave, speech)
    _draw_mel(mel, speech)
    _draw_spread(spread, speech)
    _draw_end(end, speech)
    for axis in (wave, mel, spread, end):
        axis.tick_params(labelsize=9)
        axis.yaxis.label.set_size(10)
        if axis is not mel:
            axis.grid(alpha=0.25, linewidth=0.6)
    shown = speech.frames + (speech.end_frame_kl is not None)  # the frame that ended the speech comes after its last one
    end.set_xlim(0, speech.seconds * shown / speech.frames if speech.frames else 1)
    end.set_xlabel("seconds", fontsize=10)
    figure.align_ylabels()
    return figure


def save_speech_figure(speech: Speech, path: str | Path, width: int = 1200, height: int = 900) -> None:
    """Write ``speech_figure`` to ``path``, whole or not at all; a UserError for an unknown suffix or where the disk refuses."""
    check_image_path(path)
    save_figure(speech_figure(speech, width, height), path)


def check_image_path(path: str | Path) -> None:
    """A UserError unless the suffix of ``path`` names an image format."""
    suffix = Path(path).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        raise UserError(f"unknown image format: got '{path}', expected a name that ends in {', '.join(IMAGE_SUFFIXES)}; rename it")


def new_figure(width: int, height: int) -> Figure:
    """An empty figure of ``width`` x ``height`` pixels; a UserError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f"drawing needs matplotlib, which is not installed: run {install_command('serve')}") from None
    return Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, layout="constrained")


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write ``figure`` in the format of the suffix of ``path``, whole or not at all; errors as ``save_speech_figure``."""
    check_image_path(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:].lower())
    write_atomic(Path(path), buffer.getvalue())


def _title(speech: Speech) -> str:
    confidence = f"confidence {speech.confidence:.2f}" if speech.frames else "nothing spoken"
    parts = [f"{speech.seconds:.2f} s", f"ended by: {speech.stop_reason}", f"seed {speech.seed}", confidence]
    if len(speech.attempts) > 1:
        parts.append(f"{len(speech.attempts)} attempts")
    if speech.trimmed_seconds:
        parts.append(f"{speech.trimmed_seconds:.1f} s trimmed")
    return "   ·   ".join(parts)


def _draw_wave(axis: Axes, speech: Speech) -> None:
    axis.set_ylabel("amplitude")
    if len(speech.audio):
        axis.plot(np.arange(len(speech.audio)) / speech.sample_rate, speech.audio, linewidth=0.4, color=_BLUE)
        peak = max(0.05, 1.05 * float(np.abs(speech.audio).max()))
        axis.set_ylim(-peak, peak)


def _draw_mel(axis: Axes, speech: Speech) -> None:
    axis.set_ylabel("mel band")
    mel = LogMel(MelConfig(sample_rate=speech.sample_rate))
    if len(speech.audio) < mel.config.n_fft:
        return
    image = mel(torch.from_numpy(np.ascontiguousarray(speech.audio))[None])[0].numpy()
    seconds = image.shape[1] * mel.config.hop / speech.sample_rate
    top = float(image.max())
    extent = (0, seconds, 0, image.shape[0])
    axis.imshow(image, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=top - _MEL_RANGE, vmax=top, interpolation="nearest")


def _draw_spread(axis: Axes, speech: Speech) -> None:
    axis.set_ylabel("std σ of a frame")
    if not speech.frames:
        return
    spread = np.exp(speech.log_std.astype(np.float64))
    low, high = np.quantile(spread, _QUANTILES, axis=1)
    edges = _edges(speech)
    axis.fill_between(edges, _held(low), _held(high), step="post", alpha=0.25, linewidth=0, color=_BLUE, label="5 to 95 % of dimensions")
    axis.step(edges, _held(spread.mean(axis=1)), where="post", linewidth=1.3, color=_BLUE, label="mean")
    axis.set_ylim(bottom=0)
    axis.legend(loc="upper right", fontsize=8, framealpha=0.8)


def _draw_end(axis: Axes, speech: Speech) -> None:
    """The divergence at every frame, and as a marker behind the last one that of the frame that ended the speech, which is not spoken."""
    axis.set_ylabel("end KL, nats/dim")
    axis.set_yscale("log")
    if not speech.frames:
        return
    values = speech.end_kl.astype(np.float64).clip(min=_LOWEST_KL)
    axis.step(_edges(speech), _held(values), where="post", linewidth=1.3, color=_ORANGE, label="to the end distribution")
    threshold = speech.stop.threshold if speech.stop.probability is None else 0.0  # it has no say beside a probability
    levels = [values.min(), values.max()]
    if threshold > 0:
        axis.axhline(threshold, linestyle="--", linewidth=1.1, color=_GREY, label=f"threshold {threshold:.3g}")
        levels.append(threshold)
    if speech.end_frame_kl is not None:
        end = max(float(speech.end_frame_kl), _LOWEST_KL)
        said = "" if speech.end_frame_probability is None else f", probability {speech.end_frame_probability:.2f}"
        axis.plot([speech.seconds], [end], "v", markersize=8, color=_BLUE, clip_on=False, label=f"frame that ended it{said}")
        levels.append(end)
    axis.set_ylim(min(levels) / 2, max(levels) * 8)  # room for the legend
    axis.legend(loc="upper right", fontsize=8, framealpha=0.8)


def _edges(speech: Speech) -> NDArray[np.float64]:
    """(T + 1,): where each frame begins, and the end."""
    return np.linspace(0, speech.seconds, speech.frames + 1)


def _held(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The last value once more, so that a step plot reaches the end of its frame."""
    return np.append(values, values[-1])


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
