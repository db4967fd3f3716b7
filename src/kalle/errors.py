"""The one exception a user is meant to read, and the check of what a program hands in."""

from __future__ import annotations

import os
import unicodedata
from types import UnionType

LONGEST = 2000
"""Most characters of a message."""
_KEPT = (LONGEST - 60) // 2
"""Of either end of a longer one: with the notice between them it has at most `LONGEST`, so that it is not cut again in another message."""


class UserError(ValueError):
    """A mistake that the user can correct: the message names the value got, what was expected, and the remedy.

    The command line prints it on one line and leaves with exit code 2; the library raises it as the
    ``ValueError`` it is. A broken invariant of our own is an ``assert`` instead. Its text is `one_line` of at most
    `LONGEST` characters, for what a damaged file holds has any length: the middle is left out, as the remedy stands at the end.
    """

    def __init__(self, message: str) -> None:
        text = one_line(message)
        if len(text) > LONGEST:
            text = f"{text[:_KEPT]} … ({len(text) - 2 * _KEPT} characters left out) … {text[-_KEPT:]}"
        super().__init__(text)


def one_line(message: str) -> str:
    """``message`` with line breaks and control characters as escapes: a name or a value from a file may hold what a terminal obeys."""
    return "".join(ascii(one)[1:-1] if unicodedata.category(one) in ("Cc", "Zl", "Zp") else one for one in message)


PATH = str | os.PathLike


def check_type(name: str, value: object, kinds: type | UnionType, expected: str) -> None:
    """A UserError unless ``value`` is one of ``kinds``."""
    if not isinstance(value, kinds):
        raise UserError(f"bad {name}: got {value!r:.60}, expected {expected}; correct it")
