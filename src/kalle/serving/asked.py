"""What the fields of the page hold, as values that can be checked without a browser or a model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from kalle.errors import UserError
from kalle.text.prompt import check_text

Number = TypeVar("Number", int, float)
STORED, RECORDING, RANDOM = "stored", "recording", "random"


@dataclass(frozen=True)
class VoiceChoice:
    """Whose voice is to speak."""

    source: str = STORED
    """One of "stored", "recording", "random"."""
    name: str | None = None
    """Of a stored voice; None is the model's own."""
    recording: str | None = None
    """Path of an audio file."""
    transcript: str | None = None
    """What is said in the recording."""
    seed: int | None = None
    """Of a random voice."""


@dataclass(frozen=True)
class Asked:
    """One press of "Speak"."""

    text: str
    voice: VoiceChoice = field(default_factory=VoiceChoice)
    seed: int | None = None
    temperature: float | None = None
    max_seconds: float | None = None


def check_asked(asked: Asked, max_text: int, needs_transcript: bool) -> None:
    """Refuse with a UserError what can be seen wrong without the model; ``max_text`` in characters."""
    check_text(asked.text, "text")
    if len(asked.text) > max_text:
        raise UserError(f"the text is too long: got {len(asked.text)} characters, expected at most {max_text}; shorten it")
    check_voice(asked.voice, needs_transcript)


def check_voice(choice: VoiceChoice, needs_transcript: bool) -> None:
    """Refuse an incomplete choice of voice."""
    if choice.source == RECORDING:
        if choice.recording is None:
            raise UserError("no recording: got an empty reference, expected audio; upload a file, record one or choose another voice")
        if needs_transcript and not (choice.transcript or "").strip():
            raise UserError("a recording without its transcript: got no text, expected the words that are spoken in it; type them below it")
    if choice.source == RANDOM and choice.seed is None:
        raise UserError("no seed for the random voice: got an empty field, expected a whole number; type one or press “Another one”")


def typed_whole(text: str | None, name: str) -> int | None:
    """The whole number in a field of that name, None for an empty one."""
    return _typed(text, name, int, "a whole number")


def typed_number(text: str | None, name: str) -> float | None:
    """The number in a field of that name, None for an empty one."""
    return _typed(text, name, _finite, "a number")


def _typed(text: str | None, name: str, kind: Callable[[str], Number], expected: str) -> Number | None:
    typed = (text or "").strip()
    if not typed:
        return None
    try:
        return kind(typed)
    except ValueError:
        raise UserError(f"bad {name}: got {typed[:40]!r}, expected {expected} or an empty field; type it again") from None


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number
