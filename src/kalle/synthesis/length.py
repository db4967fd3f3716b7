"""How long a text may take to speak, at most."""

from __future__ import annotations

import math
import unicodedata

from kalle.errors import UserError

BASE_SECONDS = 3.0
LONGEST_SECONDS = 80.0
"""The release's own cap."""
CAP_PER_USUAL = 3.0
"""What the length cap allows for each second of speech at the usual pace."""
_MOST_FRAMES = 2.0**31
"""More than any model has positions; a cap above it means the same."""
_IDEOGRAPH_SECONDS = 0.6
_DIGIT_SECONDS = 0.9
_OTHER_SECONDS = 0.2


def cap_seconds(text: str) -> float:
    """A length that slow speech of ``text`` does not reach: about three times the usual pace, and a fixed allowance.

    Each ideograph, kana or hangul character counts as a syllable, each digit as a word, any other character as a letter.
    """
    return min(BASE_SECONDS + CAP_PER_USUAL * usual_seconds(text), LONGEST_SECONDS)


def usual_seconds(text: str) -> float:
    """How long ``text`` takes at the usual pace, roughly."""
    return sum(map(_character_seconds, text)) / CAP_PER_USUAL


def check_length(text: str, max_seconds: float | None = None) -> None:
    """A UserError for a text that takes longer at the usual pace than one request may: ``LONGEST_SECONDS``, or ``max_seconds`` if more."""
    needed, allowed = usual_seconds(text), max(LONGEST_SECONDS, max_seconds or 0.0)
    if needed > allowed + 1e-6:
        raise UserError(
            f"the text is too long for one request: got about {needed:.0f} s of speech, expected at most {allowed:g} s; speak it sentence "
            f"by sentence with kalle.synthesis.speak_long or `kalle say --text-file FILE`, or allow it with max_seconds={math.ceil(needed)}"
        )


def cap_frames(text: str, frame_rate_hz: float, max_seconds: float | None = None) -> int:
    """The length cap in frames: ``max_seconds`` where given, else from the text. UserError when it allows no frame."""
    if max_seconds is not None and not (math.isfinite(max_seconds) and max_seconds * frame_rate_hz >= 1):
        raise UserError(f"bad length cap: got {max_seconds} s, expected at least one frame of {1 / frame_rate_hz:g} s; raise --max-seconds")
    seconds = cap_seconds(text) if max_seconds is None else max_seconds
    return math.floor(min(seconds * frame_rate_hz, _MOST_FRAMES) + 1e-6)


def _character_seconds(character: str) -> float:
    if character.isdigit():
        return _DIGIT_SECONDS
    if unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) in "WFH":
        return _IDEOGRAPH_SECONDS
    return _OTHER_SECONDS
