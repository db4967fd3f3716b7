"""How far up a waveform's spectrum reaches: what an upsampled or low-passed recording cannot hide."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kalle.audio import PCM16_SCALE, Audio

BANDS = 32
"""Of the stored spectrum, from 0 to half the sample rate."""
PRESENT_DB = 70.0
"""Below the strongest part of the spectrum nothing is counted as present: consonants reach higher, a resampler's leftovers don't."""
_WINDOW_S = 0.032
_PERCENTILE = 98
"""Of a bin over time: a few hisses show the bandwidth, a single click does not."""
_SMOOTH_HZ = 250.0
_FLOOR_MARGIN_DB = 10.0


@dataclass(frozen=True)
class Spectrum:
    """The highest frequency present in Hz, and the level of `BANDS` bands in dB below the strongest."""

    bandwidth_hz: float
    bands_db: tuple[int, ...]


def spectrum(audio: Audio, sample_rate_hz: int) -> Spectrum:
    """The spectrum of the loudest moments of (S,), bin by bin.

    Present is what lies within `PRESENT_DB` of the strongest part and above the rounding noise of 16-bit samples.
    """
    size = max(round(_WINDOW_S * sample_rate_hz / 2) * 2, 64)
    window = np.hanning(size)
    power = _high_percentile_power(audio, window)
    width = max(round(_SMOOTH_HZ * size / sample_rate_hz), 1)
    power = np.convolve(power, np.ones(width) / width, "same")
    rounding = np.square(window).sum() / (12 * PCM16_SCALE**2)
    if power.max() <= rounding:
        return Spectrum(0.0, (0,) * BANDS)
    present = power >= max(power.max() * 10 ** (-PRESENT_DB / 10), min(rounding * 10 ** (_FLOOR_MARGIN_DB / 10), power.max()))
    highest = int(np.flatnonzero(present)[-1])
    edges = np.linspace(0, len(power), BANDS + 1).astype(int)
    levels = [10 * np.log10(power[low:high].mean() / power.max() + 1e-12) for low, high in itertools.pairwise(edges)]
    return Spectrum(highest * sample_rate_hz / size, tuple(round(level) for level in levels))


def _high_percentile_power(audio: Audio, window: NDArray[np.float64]) -> NDArray[np.float64]:
    size = len(window)
    samples = np.pad(audio, (0, max(size - len(audio), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[:: size // 2] * window
    return np.asarray(np.percentile(np.abs(np.fft.rfft(frames, axis=1)) ** 2, _PERCENTILE, axis=0))
