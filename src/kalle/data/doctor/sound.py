"""Silence, loudness and clipping of one waveform."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torchaudio
from numpy.typing import NDArray

from kalle.audio import Audio, clipped_share

FRAME_S = 0.01
BLOCK_S = 0.4
"""One gating block of BS.1770."""
_LOUD_PERCENTILE, _FLOOR_PERCENTILE = 95, 5
_BELOW_LOUD_DB, _ABOVE_FLOOR_DB, _LEAST_BELOW_LOUD_DB = 40.0, 8.0, 20.0
_SOUND_FRAMES = 4
_LOWEST_DB = -120.0
_QUIETEST_PEAK = 0.1


@dataclass(frozen=True)
class Silence:
    """Seconds before the first and after the last sound, the longest pause between, and the silent share between."""

    leading_s: float
    trailing_s: float
    pause_s: float
    inner_share: float


def silence(audio: Audio, sample_rate_hz: int) -> Silence:
    """The silences of (S,), to one frame of `FRAME_S`; all leading where nothing sounds.

    A frame is silent when it is well below the loud frames, or hardly above the quiet ones: the recording's own noise counts as
    silence. Sounds of fewer than `_SOUND_FRAMES` frames (clicks) don't end a silence.
    """
    frame = max(round(FRAME_S * sample_rate_hz), 1)
    levels = _frame_levels_db(audio, frame)
    loud, floor = np.percentile(levels, _LOUD_PERCENTILE), np.percentile(levels, _FLOOR_PERCENTILE)
    # Speech without a pause has a floor that is speech itself, hence the last bound.
    threshold = max(loud - _BELOW_LOUD_DB, min(floor + _ABOVE_FLOOR_DB, loud - _LEAST_BELOW_LOUD_DB))
    sounding = (levels >= threshold) & (levels > _LOWEST_DB)
    starts, ends = _runs(sounding)
    kept = ends - starts >= _SOUND_FRAMES
    starts, ends = starts[kept], ends[kept]
    if not starts.size:
        return Silence(len(audio) / sample_rate_hz, 0.0, 0.0, 0.0)
    pauses = starts[1:] - ends[:-1]
    scale = frame / sample_rate_hz
    return Silence(
        leading_s=float(starts[0]) * scale,
        trailing_s=max(len(audio) / sample_rate_hz - float(ends[-1]) * scale, 0.0),
        pause_s=float(pauses.max(initial=0)) * scale,
        inner_share=float(pauses.sum() / (ends[-1] - starts[0])),
    )


def loudness_lufs(audio: Audio, sample_rate_hz: int) -> float:
    """Integrated loudness of (S,) by ITU-R BS.1770-4 (torchaudio's); shorter than one gating block it is repeated to fill it.

    Minus infinity for silence.
    """
    block = round(BLOCK_S * sample_rate_hz) + 1
    samples = np.resize(audio, block) if len(audio) < block else audio
    value = float(torchaudio.functional.loudness(torch.from_numpy(np.ascontiguousarray(samples)).double()[None], sample_rate_hz))
    return value if np.isfinite(value) and value > -100 else float("-inf")


def flat_share(audio: Audio) -> float:
    """Share of the samples of (S,) in flat tops at full scale, or at the peak of a recording that was clipped and then turned down."""
    peak = float(np.abs(audio).max(initial=0.0))
    lowered = clipped_share(audio, 0.9995 * peak) if peak >= _QUIETEST_PEAK else 0.0
    return max(clipped_share(audio, 0.99), lowered)


def _frame_levels_db(audio: Audio, frame: int) -> NDArray[np.float64]:
    """RMS in dB of full scale of the whole frames of (S,), at least `_LOWEST_DB`."""
    samples = np.pad(audio, (0, max(frame - len(audio), 0)))
    squares = np.square(samples[: len(samples) // frame * frame], dtype=np.float64).reshape(-1, frame)
    with np.errstate(divide="ignore"):
        return np.maximum(10 * np.log10(squares.mean(axis=1)), _LOWEST_DB)


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return edges[::2], edges[1::2]
