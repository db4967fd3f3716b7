"""What a synthesis returns: the audio, why it ended, and what the model thought at every frame."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kalle.audio import to_pcm16, write_audio

FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Speech:
    """One spoken text. T frames of D latent dimensions, S samples."""

    audio: FloatArray
    """(S,) in [-1, 1]."""
    sample_rate: int
    """Samples per second."""
    stop_reason: str
    """"end", the model ended the speech; "max_frames", the length cap cut it."""
    seed: int
    """The seed that gives this result again."""
    latents: FloatArray
    """(T, D): the frames that were fed back."""
    log_std: FloatArray
    """(T, D): natural log of the standard deviation of each frame's distribution."""
    end_kl: FloatArray
    """(T,): divergence from the end distribution in nats per dimension."""
    max_frames: int
    """The length cap that held."""

    @property
    def frames(self) -> int:
        """Number of latent frames T."""
        return len(self.latents)

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.audio) / self.sample_rate

    @property
    def frame_confidence(self) -> FloatArray:
        """(T,) in (0, 1): 1 / (1 + s), s the geometric mean of the frame's standard deviations.

        It says how narrow the predictions are, compares results of one model only, and is not a probability.
        """
        spread = np.exp(self.log_std.mean(axis=1))
        return np.asarray(1.0 / (1.0 + spread), dtype=np.float32)

    @property
    def confidence(self) -> float:
        """Mean of ``frame_confidence``; NaN without frames."""
        return float(self.frame_confidence.mean()) if self.frames else float("nan")

    def pcm16(self) -> NDArray[np.int16]:
        """The audio (S,) as 16-bit integers, rounded and clipped: the samples that ``save`` writes."""
        return to_pcm16(self.audio)

    def save(self, path: str | Path) -> None:
        """Write a 16-bit WAV or FLAC file by suffix; a UserError, and no partial file, when that fails."""
        write_audio(path, self.audio, self.sample_rate)
