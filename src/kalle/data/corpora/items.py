"""The one form in which every reader hands over a corpus."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalle.data.corpora.inside import ArrowCell, TarMember
from kalle.data.prepare_files import safe_id

REASONS = (
    "missing",
    "unreadable",
    "empty",
    "not finite",
    "outside the recording",
    "too short",
    "too long",
    "clipped",
    "silent",
    "no text",
    "not speech",
    "duplicate id",
)
# A remark about the sound rather than words that are spoken: [@], (simple tone plays), <beep>.
ANNOTATION = re.compile(r"\[[^\]]*\]|\([^)]*\)|<[^>]*>")
OUTER = re.compile(rf"^(\s*({ANNOTATION.pattern}))+|(({ANNOTATION.pattern})\s*)+$")
# The whole text is a tag such as [noise] or <beep>; parentheses may well be spoken.
TAG = re.compile(r"\s*(\[[^\]]*\]|<[^>]*>)\s*")
AUDIO_SUFFIXES = frozenset(
    (".wav", ".flac", ".ogg", ".opus", ".mp3", ".m4a", ".aac", ".wma", ".webm", ".aif", ".aiff", ".au", ".g722", ".mp4")
)


@dataclass(frozen=True, slots=True)
class SourceItem:
    """One recording and its text, before anything is known of its sound.

    ``start_s`` and ``duration_s`` (None: to the end) make it a part of a longer recording, ``channel`` one channel of several (None:
    their mean). ``inside`` says where in the file ``audio`` the recording lies when that file holds many. ``custom`` goes into the cut.
    """

    id: str
    audio: Path
    text: str
    speaker: str = "unknown"
    language: str = ""
    split: str | None = None
    start_s: float = 0.0
    duration_s: float | None = None
    channel: int | None = None
    inside: TarMember | ArrowCell | None = None
    custom: dict[str, Any] | None = None

    @property
    def is_segment(self) -> bool:
        """Whether the item is a part of its recording."""
        return self.start_s > 0 or self.duration_s is not None

    @property
    def place(self) -> str:
        """The recording's path, with its name inside that file where it lies in one."""
        return str(self.audio) if self.inside is None else f"{self.audio}:{self.inside.name}"


@dataclass(frozen=True)
class Rejection:
    """An item that is left out, and why (one of `REASONS`)."""

    id: str
    audio: str
    reason: str
    detail: str

    def __post_init__(self) -> None:
        assert self.reason in REASONS, self.reason


@dataclass(frozen=True)
class Source:
    """A corpus as a reader found it: ``notes`` go into the report as they are."""

    name: str
    items: list[SourceItem]
    rejected: list[Rejection] = field(default_factory=list)
    notes: dict[str, object] = field(default_factory=dict)


def spoken_text(text: str) -> str | None:
    """``text`` without remarks in brackets before and after it, and without superfluous spaces; empty when there is nothing else.

    None when a remark stands inside: whether it is spoken cannot be told.
    """
    rest = OUTER.sub(" ", text)
    return None if ANNOTATION.search(rest) else " ".join(rest.split())


def audio_id(name: str) -> str:
    """The id of an item that has none: its audio name without an audio suffix, made safe."""
    path = Path(name)
    return safe_id((path.with_suffix("") if path.suffix.lower() in AUDIO_SUFFIXES else path).as_posix())


def unique(items: list[SourceItem], rejected: list[Rejection]) -> list[SourceItem]:
    """The items with the first of every id; each further one is appended to ``rejected``."""
    seen: dict[str, SourceItem] = {}
    for item in items:
        if item.id in seen:
            rejected.append(Rejection(item.id, str(item.audio), "duplicate id", f"the id of '{seen[item.id].audio}'"))
        else:
            seen[item.id] = item
    return list(seen.values())
