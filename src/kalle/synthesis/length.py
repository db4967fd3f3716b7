"""How long a text may take to speak, at most."""

from __future__ import annotations

import math
import unicodedata

from kalle.errors import UserError

BASE_SECONDS = 3.0
LONGEST_SECONDS = 80.0
"""The release's own cap."""
_IDEOGRAPH_SECONDS = 0.6
_DIGIT_SECONDS = 0.9
_OTHER_SECONDS = 0.2


def cap_seconds(text: str) -> float:
    """A length that slow speech of ``text`` does not reach: about three times the usual pace, and a fixed allowance.

    Each ideograph, kana or hangul character counts as a syllable, each digit as a word, any other character as a letter.
    """
    total = BASE_SECONDS + sum(map(_character_seconds, text))
    return min(total, LONGEST_SECONDS)


def cap_frames(text: str, frame_rate_hz: float, max_seconds: float | None = None) -> int:
    """The length cap in frames: ``max_seconds`` where given, else from the text. UserError when it allows no frame."""
    if max_seconds is not None and not (math.isfinite(max_seconds) and max_seconds * frame_rate_hz >= 1):
        raise UserError(f"bad length cap: got {max_seconds} s, expected at least one frame of {1 / frame_rate_hz:g} s; raise --max-seconds")
    return math.floor((cap_seconds(text) if max_seconds is None else max_seconds) * frame_rate_hz + 1e-6)


def _character_seconds(character: str) -> float:
    if character.isdigit():
        return _DIGIT_SECONDS
    if unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) in "WFH":
        return _IDEOGRAPH_SECONDS
    return _OTHER_SECONDS
