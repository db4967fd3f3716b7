"""Recordings that lie inside another file: a member of a tar, a cell of an Arrow table. Read one at a time, in any process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any


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
        cell = _column(path, self.column)[self.row].as_py()
        content: bytes | None = cell.get("bytes") if cell else None
        if not content:
            raise EOFError(f"row {self.row} of '{path}' holds no audio")
        return content


@lru_cache(maxsize=4)
def _column(path: Path, column: str) -> Any:
    """A column of a file that is mapped into memory, not read."""
    import pyarrow

    return pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()[column]
