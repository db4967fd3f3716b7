"""How loud speech is, and an even level from sentence to sentence."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from kalle.audio import Audio

BLOCK_S = 0.4
OVERLAP = 0.75
ABSOLUTE_GATE_DB = -70.0
RELATIVE_GATE_DB = -10.0
LOUDEST_PEAK = 0.99


def loudness_db(audio: Audio, sample_rate_hz: int) -> float:
    """Level of the spoken part of (S,) in dB relative to full scale: the mean power of its blocks above two gates.

    Blocks, gates and their order are those of ITU-R BS.1770-4, without its frequency weighting: the same voice is compared
    with itself, so the weighting would shift all values alike. Minus infinity for silence.
    """
    powers = _block_powers(np.asarray(audio, dtype=np.float64), round(BLOCK_S * sample_rate_hz))
    heard = powers[powers > 10 ** (ABSOLUTE_GATE_DB / 10)]
    if not heard.size:
        return float("-inf")
    heard = heard[heard > heard.mean() * 10 ** (RELATIVE_GATE_DB / 10)]
    return float(10 * np.log10(heard.mean()))


def even_gain_db(loudness: float, target: float, peak: float, max_gain_db: float) -> float:
    """Gain that brings ``loudness`` to ``target``, at most ``max_gain_db`` either way and never up to clipping; 0 for silence.

    ``peak`` is the largest absolute sample.
    """
    if not np.isfinite(loudness) or not np.isfinite(target) or peak <= 0:
        return 0.0
    wanted = float(np.clip(target - loudness, -max_gain_db, max_gain_db))
    headroom = 20 * float(np.log10(LOUDEST_PEAK / peak))
    return min(wanted, max(headroom, 0.0)) if wanted > 0 else wanted


def _block_powers(samples: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    if samples.size <= block:
        return np.array([np.mean(samples**2)]) if samples.size else np.zeros(0)
    squares = np.concatenate(([0.0], np.cumsum(samples**2)))
    starts = np.arange(0, samples.size - block + 1, max(round(block * (1 - OVERLAP)), 1))
    return (squares[starts + block] - squares[starts]) / block
