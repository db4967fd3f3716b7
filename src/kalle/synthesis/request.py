"""One utterance as a user asks for it, before any model has seen it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from numbers import Real

from kalle.errors import UserError
from kalle.synthesis.guidance import NO_GUIDANCE
from kalle.synthesis.quirks import ReleaseQuirks
from kalle.synthesis.sampling import StopRule
from kalle.synthesis.voice import RANDOM_VOICE, GivenVoice, Voice

DEFAULT_RETRIES = 1
DEFAULT_CHUNK_FRAMES = 8
"""Frames in a piece of streamed audio: fewer cost more (docs/results/streaming.md), more are heard later."""


@dataclass(frozen=True)
class SpeechRequest:
    """What `Kalle.synthesize` takes, as one value, so that several can go into `Kalle.synthesize_batch`.

    A UserError for a value of another type; whether the values can be spoken is seen when the model gets them.
    """

    text: str
    voice: GivenVoice = None
    """None leaves it to the weight folder's default voice, or else to the model; "random" is ``Kalle.random_voice`` of the seed."""
    seed: int | None = None
    """None draws one; ``Speech.seed`` tells it."""
    temperature: float | None = None
    """Scale of the standard deviations; 1 is the model's own spread. None takes the one stored with the weights, else 1."""
    max_seconds: float | None = None
    """Length cap; None derives it from the text. Speech that is cut at a cap shorter than that is what was asked for: no retry."""
    stop: StopRule | None = None
    """None takes the rule stored with the weights."""
    quirks: ReleaseQuirks | None = None
    """Habits of the release to reproduce; None for none of them."""
    retries: int = DEFAULT_RETRIES
    """How often a bad ending (anything but "end") is tried again with another seed; every try is in ``Speech.attempts``."""
    guidance: float = NO_GUIDANCE
    """How far each prediction goes from what the model would predict without the words; 1 is its own, more follows the text more
    closely, at twice the cost. For models trained with objective.text_drop."""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str):
            raise UserError(f"bad text: got {_type(self.text)}, expected a str; decode bytes with .decode('utf-8')")
        check_voice_given(self.voice)
        numbers = {"temperature": self.temperature, "length cap": self.max_seconds, "guidance": self.guidance}
        for name, value in numbers.items():
            if not isinstance(value, Real) and (value is not None or name == "guidance"):
                raise UserError(f"bad {name}: got {value!r}, expected a number")
        try:
            operator.index(self.retries)
        except TypeError:
            raise UserError(f"bad retries: got {self.retries!r}, expected an integer of at least 0; 0 keeps the first try") from None


def check_voice_given(voice: object) -> None:
    """A UserError for anything but a ``Voice``, "random" or None."""
    if isinstance(voice, Voice | None) or (isinstance(voice, str) and voice == RANDOM_VOICE):
        return
    loads = f"load it with kalle.load_voice({voice!r})" if isinstance(voice, str) else "load one with kalle.load_voice(NAME)"
    raise UserError(f"bad voice: got {_type(voice)}, expected a kalle.Voice; {loads}")


def _type(value: object) -> str:
    return f"{value!r:.40}" if isinstance(value, str) else "None" if value is None else type(value).__name__
