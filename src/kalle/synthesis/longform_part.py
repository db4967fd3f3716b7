"""What a long text is spoken with, and what comes of each of its sentences."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.synthesis.guidance import NO_GUIDANCE
from kalle.synthesis.quirks import ReleaseQuirks
from kalle.synthesis.request import DEFAULT_RETRIES
from kalle.synthesis.speech import FloatArray
from kalle.text.sentences import Sentence


@dataclass(frozen=True)
class LongFormOptions:
    """How a long text is spoken; every field changes the result."""

    language: str | None = None
    """ISO 639-1 code; None guesses it for each paragraph and sentence from the script."""
    normalise: bool = False
    """Put numbers, dates and abbreviations into words first (English and Chinese)."""
    pause_s: float = 0.3
    """Silence added between two sentences."""
    paragraph_pause_s: float = 0.8
    """Silence added between two paragraphs."""
    fade_s: float = 0.005
    """Each sentence fades in and out over this long, so that no joint clicks."""
    rolling: bool = False
    """Give each sentence the one before it in its paragraph as a prompt, after the voice."""
    max_prompt_s: float = 10.0
    """Voice and sentence before take at most this long together; else the voice alone is the prompt."""
    max_gain_db: float = 6.0
    """A sentence is made at most this much louder or quieter to match the others."""
    temperature: float | None = None
    """None takes the one stored with the weights, else 1."""
    max_seconds: float | None = None
    """Length cap of a sentence; None derives it from the text."""
    quirks: ReleaseQuirks | None = None
    retries: int = DEFAULT_RETRIES
    """How often a bad ending is tried again with another seed."""
    guidance: float = NO_GUIDANCE

    def __post_init__(self) -> None:
        for name in ("pause_s", "paragraph_pause_s", "fade_s", "max_prompt_s", "max_gain_db"):
            value = getattr(self, name)
            if not 0 <= value <= 60:
                raise UserError(f"bad {name.removesuffix('_s').replace('_', ' ')}: got {value}, expected a number from 0 to 60")


@dataclass(frozen=True)
class Part:
    """One spoken sentence of a long text."""

    index: int
    """From 0."""
    sentence: Sentence
    """As written, and where."""
    spoken: str
    """The words that the model got."""
    audio: Audio
    """(S,), gain and fades applied, on the 16-bit grid; nothing when the model said nothing."""
    sample_rate: int
    latents: FloatArray
    """(T, D): the frames of the sentence."""
    stop_reason: str
    seed: int
    tries: int
    """How often it was spoken before this result was taken, this one included."""
    confidence: float
    loudness_db: float
    """Before the gain; minus infinity for silence."""
    gain_db: float
    pace: float
    """Usual length of the text over the actual one; 0 when there is none."""
    rolled: bool
    """Whether the sentence before was part of the prompt."""
    pause_samples: int
    """Silence that follows in the whole."""
    warnings: tuple[str, ...] = ()
    start_sample: int = 0
    """Where it begins in the whole."""
    kept: bool = False
    """Whether it was spoken by an earlier run."""

    @property
    def start_s(self) -> float:
        """Where it begins in the whole, in seconds."""
        return self.start_sample / self.sample_rate

    @property
    def end_s(self) -> float:
        """Where it ends in the whole, in seconds, its pause not included."""
        return (self.start_sample + len(self.audio)) / self.sample_rate

    @property
    def with_pause(self) -> Audio:
        """The audio and the silence after it; all parts in order make the whole."""
        return np.concatenate([self.audio, np.zeros(self.pause_samples, dtype=np.float32)])


class Store(Protocol):
    """Where the parts of an interrupted run are found again."""

    def read(self, index: int, sentence: Sentence) -> Part | None:
        """The part of that index; None when it isn't there."""

    def write(self, part: Part) -> None:
        """Keep ``part``."""
