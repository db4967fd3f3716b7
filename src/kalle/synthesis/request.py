"""One utterance as a user asks for it, before any model has seen it."""

from __future__ import annotations

from dataclasses import dataclass

from kalle.synthesis.quirks import ReleaseQuirks
from kalle.synthesis.sampling import StopRule
from kalle.synthesis.voice import Voice

DEFAULT_RETRIES = 1
DEFAULT_CHUNK_FRAMES = 8
"""Frames in a piece of streamed audio: fewer cost more (docs/results/streaming.md), more are heard later."""


@dataclass(frozen=True)
class SpeechRequest:
    """What `Kalle.synthesize` takes, as one value, so that several can go into `Kalle.synthesize_batch`."""

    text: str
    voice: Voice | None = None
    """None leaves it to the weight folder's default voice, or else to the model."""
    seed: int | None = None
    """None draws one; ``Speech.seed`` tells it."""
    temperature: float = 1.0
    """Scale of the standard deviations; 1 is the model's own spread."""
    max_seconds: float | None = None
    """Length cap; None derives it from the text."""
    stop: StopRule | None = None
    """None takes the rule stored with the weights."""
    quirks: ReleaseQuirks | None = None
    """Habits of the release to reproduce; None for none of them."""
    retries: int = DEFAULT_RETRIES
    """How often a bad ending (anything but "end") is tried again with another seed; every try is in ``Speech.attempts``."""
