"""Noticing, while frames are made, that nothing new is being said: the same again and again, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kalle.synthesis.row import Frame, StopReason

FloatArray = NDArray[np.float32]
Decoder = Callable[[Tensor], FloatArray]
"""Latents (T, D) to their audio (T * hop,)."""
_FARTHEST = 1e6
"""Cap of one distance, so that a single overflow does not blind the sums."""
_NO_SOUND = 1e-9


@dataclass(frozen=True)
class WatchConfig:
    """What counts as stuck.

    Distances are between two predictions p frames apart, (mean - mean')^2 / (std^2 + std'^2) averaged over the dimensions: 1 is a
    difference of about one standard deviation. Speech is far above that for every p: see docs/results for the measured margins.
    """

    seconds: float = 3.0
    """Shortest stretch that is judged; pauses inside speech are shorter."""
    longest_period_seconds: float = 2.0
    """Longest loop that is looked for."""
    repeats: int = 3
    """A loop must recur this often after its first round."""
    repetition_distance: float = 0.3
    """Below it, on average over the stretch, the predictions repeat themselves."""
    quiet_distance: float = 1.0
    """Below it at p = 1 the predictions may be those of silence, and the sound decides."""
    silence_dbfs: float = -60.0
    """RMS of a frame of silence, in dB relative to full scale."""
    silence_below_loudest_db: float = 35.0
    """A frame this far below the loudest one around is silence too."""
    silent_share: float = 0.8
    """Silence must last this share of the stretch: its first frames may still carry the end of a sound."""
    pause_seconds: float = 0.24
    """Silence that is kept after the last sound."""


class Watcher:
    """Ends a row with "silence" or "repetition"; ``kept_frames`` then says how many of its frames are worth hearing.

    The predicted Gaussians are compared at every frame, which costs microseconds; only when they hardly change is a stretch of a few
    seconds decoded, to tell silence from a stuck sound. One object for each row.
    """

    def __init__(self, decode: Decoder, frame_rate_hz: float, config: WatchConfig | None = None) -> None:
        """``decode`` turns latents (T, D) into audio at ``frame_rate_hz`` frames a second."""
        self.config = config or WatchConfig()
        self._decode, self._rate_hz = decode, frame_rate_hz
        self._window = max(1, self._frames(self.config.seconds))
        self._recurrence = _Recurrence(max(1, self._frames(self.config.longest_period_seconds)), self._window, self.config.repeats)
        self._latents: list[Tensor] = []
        self._next_listening = 0
        self.kept_frames: int | None = None

    def see(self, frame: Frame, index: int) -> StopReason | None:
        """Take the frame of 0-based ``index``; "silence" or "repetition" where the row should end with it."""
        assert index == len(self._latents), f"frame {index} after {len(self._latents)} frames"
        self._latents.append(frame.z)
        distances = self._recurrence.add(frame.distribution.mean, frame.distribution.std)
        periods = np.flatnonzero(distances < self.config.repetition_distance)
        if (len(periods) or distances[0] < self.config.quiet_distance) and self._silent():
            return "silence"
        if len(periods):
            self.kept_frames = self._recurrence.onset(int(periods[0]), self.config.quiet_distance)
            return "repetition"
        return None

    def _frames(self, seconds: float) -> int:
        return round(seconds * self._rate_hz)

    def _silent(self) -> bool:
        """Whether the latest stretch is silence all through; if so, ``kept_frames`` is set."""
        count = len(self._latents)
        if count < max(self._window, self._next_listening):
            return False
        quiet, needed = self._quiet_frames(), math.ceil(self.config.silent_share * self._window)
        if quiet < needed:
            self._next_listening = count + needed - quiet
            return False
        self.kept_frames = count - max(0, quiet - self._frames(self.config.pause_seconds))
        if quiet == count:
            self.kept_frames = 0
        return True

    def _quiet_frames(self) -> int:
        """How many of the latest frames sound like nothing, as far as two stretches back."""
        latents = torch.stack(self._latents[-2 * self._window :])
        energy = self._decode(latents).reshape(len(latents), -1).astype(np.float64)
        level_db = 20 * np.log10(np.sqrt((energy**2).mean(axis=1)) + _NO_SOUND)
        audible = level_db > max(self.config.silence_dbfs, float(level_db.max()) - self.config.silence_below_loudest_db)
        return len(latents) if not audible.any() else int(np.argmax(audible[::-1]))


class _Recurrence:
    """Running distances between each prediction and those p = 1 … P frames before it."""

    def __init__(self, longest_period: int, window: int, repeats: int) -> None:
        self._periods = np.arange(1, longest_period + 1)
        self._windows = np.maximum(window, repeats * self._periods)
        self._columns = np.arange(longest_period)
        self._ring: tuple[FloatArray, FloatArray] | None = None
        self._sums = np.zeros((256, longest_period))
        self._count = 0

    def add(self, mean: Tensor, std: Tensor) -> NDArray[np.float64]:
        """Take a prediction (D,); mean distance (P,) over the stretch that belongs to each p, infinite while that is not full."""
        self._count += 1
        if self._count == len(self._sums):
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
        steps = self._distances(mean.float().cpu().numpy(), std.float().cpu().square().numpy())
        self._sums[self._count] = self._sums[self._count - 1]
        self._sums[self._count, : len(steps)] += steps
        start = self._count - self._windows
        distances = np.full(len(self._periods), np.inf)
        full = start >= self._periods
        columns = self._columns[full]
        distances[full] = (self._sums[self._count, columns] - self._sums[start[full], columns]) / self._windows[full]
        return distances

    def onset(self, column: int, limit: float) -> int:
        """Index of the first frame of the latest run in which every distance of ``column`` is below ``limit``."""
        steps = np.diff(self._sums[: self._count + 1, column])
        steps[: self._periods[column]] = np.inf
        return int(np.flatnonzero(steps >= limit)[-1]) + 1

    def _distances(self, mean: FloatArray, variance: FloatArray) -> NDArray[np.float64]:
        """Distance to the prediction 1, 2, … frames ago, as far as there are any; the newest takes the place of the oldest."""
        longest = len(self._periods)
        if self._ring is None:
            self._ring = np.zeros((longest, len(mean)), mean.dtype), np.zeros((longest, len(mean)), mean.dtype)
        means, variances = self._ring
        newest = self._count - 1
        rows = (newest - self._periods[: min(newest, longest)]) % longest
        squared = (mean - means[rows]).astype(np.float64) ** 2 / (variance + variances[rows])
        means[newest % longest], variances[newest % longest] = mean, variance
        return np.nan_to_num(squared.mean(axis=1), nan=_FARTHEST, posinf=_FARTHEST).clip(max=_FARTHEST)
