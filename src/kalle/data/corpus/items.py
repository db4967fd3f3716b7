"""The form in which every reader returns a corpus: source items, rejections, and what readers share."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from kalle.errors import UserError


@dataclass(frozen=True, slots=True)
class TarMember:
    """A member of an uncompressed tar: its name, and where its bytes lie."""

    name: str
    offset: int
    size: int

    def read(self, path: Path) -> bytes:
        """The member's bytes; an OSError or EOFError when the archive is shorter than it was."""
        with path.open("rb") as archive:
            archive.seek(self.offset)
            content = archive.read(self.size)
        if len(content) != self.size:
            raise EOFError(f"'{path}' ends inside {self.name}")
        return content


@dataclass(frozen=True, slots=True)
class ArrowCell:
    """The audio of one row of an Arrow stream file, as Hugging Face datasets stores it: {"bytes", "path"}."""

    name: str
    column: str
    row: int

    def read(self, path: Path) -> bytes:
        """The encoded audio; EOFError when the row holds none."""
        cell = _arrow_column(path, self.column)[self.row].as_py()
        content: bytes | None = cell.get("bytes") if cell else None
        if not content:
            raise EOFError(f"row {self.row} of '{path}' holds no audio")
        return content


@lru_cache(maxsize=4)
def _arrow_column(path: Path, column: str) -> Any:
    """A column of a file that is mapped into memory, not read."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()[column]


def safe_id(name: str) -> str:
    """``name`` with everything but letters, digits, ``_`` and ``-`` turned into ``_``: usable as a file and archive member name."""
    return re.sub(r"[^\w-]+", "_", name).strip("_") or "_"


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


def find_root(folder: Path, patterns: tuple[str, ...], corpus: str, layout: str) -> Path:
    """``folder``, or the one folder inside it, that holds something of each of ``patterns``; else a UserError that tells the layout."""
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', expected {corpus}: {layout}; check the path")
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    found = [root for root in (folder, *inside) if all(any(root.glob(pattern)) for pattern in patterns)]
    if found and (found[0] == folder or len(found) == 1):
        return found[0]
    if found:
        names = ", ".join(root.name for root in found)
        raise UserError(f"more than one copy of {corpus} in '{folder}': got {names}, expected one; name that folder")
    raise UserError(f"not the layout of {corpus}: got '{folder}', expected {layout}; name the folder that holds these")


def collected(corpus: str, items: Iterable[SourceItem], rejected: list[Rejection], notes: dict[str, object] | None = None) -> Source:
    """A Source in which every id is there once; a UserError when a corpus has nothing in it."""
    kept = unique(list(items), rejected)
    if not kept and not rejected:
        raise UserError(f"nothing found of {corpus}: got 0 recordings, expected some; is it unpacked completely?")
    return Source(corpus, kept, rejected, notes or {})


LANGUAGE_CODES = {"english": "en", "chinese": "zh", "mandarin": "zh", "zh-hk": "yue"}


def split_of_part(part: str) -> str | None:
    """Valid or test for a part that is named so (dev-clean, test_other …), None for the rest, which trains unless shares hold some out."""
    name = part.lower()
    if name.startswith(("dev", "valid", "eval")):
        return "valid"
    return "test" if name.startswith("test") else None


def language_code(name: str | None) -> str:
    """ISO 639 code of a language by its English name, or of a locale such as zh-CN; "" for None."""
    lowered = (name or "").strip().lower().replace("_", "-")
    return LANGUAGE_CODES.get(lowered, lowered.split("-")[0])


def plain_fields(fields: dict[str, Any]) -> dict[str, Any] | None:
    """Those fields that are text or numbers, None when there are none."""
    return {key: value for key, value in fields.items() if isinstance(value, str | int | float) and value != ""} or None
