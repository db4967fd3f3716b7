"""What a synthesis returns: the audio, why it ended, and what the model thought at every frame."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from kalle.audio import to_pcm16, write_audio
from kalle.synthesis.row import StopRule

FloatArray = NDArray[np.float32]
SpeechEnding = Literal["end", "max_frames", "repetition", "silence", "interrupted"]


@dataclass(frozen=True)
class Attempt:
    """One try at a text."""

    seed: int
    """What seeded its noise."""
    stop_reason: SpeechEnding
    frames: int
    """Frames that were worth keeping."""
    kept: bool = True
    """Whether the result is this try."""


def _unknown() -> FloatArray:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Speech:
    """One spoken text. T frames of D latent dimensions, S samples. Two are equal when they are the same object."""

    audio: FloatArray
    """(S,) in [-1, 1]."""
    sample_rate: int
    """Samples per second."""
    stop_reason: SpeechEnding
    """"end", the model ended the speech; "max_frames", the length cap cut it; "repetition" or "silence", the model said the same or
    nothing for seconds and was stopped; "interrupted", a stream was closed before its end."""
    seed: int
    """The seed that, with the same request, gives this result again."""
    latents: FloatArray
    """(T, D): the frames that were fed back."""
    log_std: FloatArray
    """(T, D): natural log of the standard deviation of each frame's distribution."""
    end_kl: FloatArray
    """(T,): divergence from the end distribution in nats per dimension."""
    max_frames: int
    """The length cap that held."""
    means: FloatArray = field(default_factory=_unknown)
    """(T, D): mean of each frame's distribution."""
    log_likelihood: FloatArray = field(default_factory=_unknown)
    """(T,): log density of each frame under its own distribution, in nats per dimension.

    The frame was drawn from that distribution, so this says how narrow the distribution was and how far out the draw fell, and not
    whether the frame is good speech or fits the text: a confident mistake scores high.
    """
    stop: StopRule = field(default_factory=StopRule)
    """The stop rule that held; ``end_kl`` is to be read against its threshold, or ``stop_probability`` against its probability."""
    attempts: tuple[Attempt, ...] = ()
    """Every try, in order; one of them is the result."""
    trimmed_seconds: float = 0.0
    """What was generated and then cut from the tail, being repetition or silence."""
    stuck_seconds: float = 0.0
    """Repetition or silence that ``audio`` still ends with, because a stream had yielded it before that could be known."""
    warnings: tuple[str, ...] = ()
    """What a listener should know: a sentence each."""
    stop_probability: FloatArray = field(default_factory=_unknown)
    """(T,): what the stop head said of each frame's being the end; (0,) without a head."""

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
