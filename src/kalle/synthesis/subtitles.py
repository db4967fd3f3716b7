"""Subtitles in the SubRip format."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

LINE_COLUMNS = 42
"""Columns of a subtitle line; an ideograph takes two."""


@dataclass(frozen=True)
class Cue:
    """A text and when it is spoken, in seconds from the start of the audio."""

    text: str
    start_s: float
    end_s: float


def srt(cues: Iterable[Cue], columns: int = LINE_COLUMNS) -> str:
    """The cues as one SubRip text: numbered from 1, times with milliseconds after a comma, long lines wrapped, a blank line between."""
    blocks = []
    for number, cue in enumerate(cues, start=1):
        assert 0 <= cue.start_s <= cue.end_s, cue
        lines = wrap(cue.text, columns)
        blocks.append("\n".join([str(number), f"{timestamp(cue.start_s)} --> {timestamp(cue.end_s)}", *lines]) + "\n")
    return "\n".join(blocks)


def timestamp(seconds: float) -> str:
    """``seconds`` as HH:MM:SS,mmm, to the nearest millisecond."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d},{milliseconds % 1000:03d}"


def wrap(text: str, columns: int) -> list[str]:
    """``text`` in lines of at most ``columns``, broken at spaces, beside a wide character, or else inside a word."""
    lines, line = [], ""
    for unit in _units(" ".join(text.split())):
        if line.strip() and _columns((line + unit).rstrip()) > columns:
            lines.append(line.strip())
            line = ""
        line += unit
        while _columns(line.rstrip()) > columns:
            head = _head(line, columns)
            lines.append(line[:head])
            line = line[head:]
    return [*lines, line.strip()] if line.strip() else lines


def _units(text: str) -> list[str]:
    """``text`` cut where a line may break; put together they are ``text``."""
    units: list[str] = []
    for character in text:
        glued = bool(units) and (unicodedata.category(character)[0] in "PM" or not (_wide(character) or _wide(units[-1][-1])))
        if glued and not units[-1].endswith(" "):
            units[-1] += character
        else:
            units.append(character)
    return units


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _columns(text: str) -> int:
    return sum(2 if _wide(character) else 1 for character in text)


def _head(line: str, columns: int) -> int:
    """How many characters of ``line`` take at most ``columns``, at least one."""
    count = 1
    while count < len(line) and _columns(line[: count + 1]) <= columns:
        count += 1
    return count
