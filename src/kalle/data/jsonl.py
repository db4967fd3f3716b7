"""JSONL and text files, and the journal of finished items that lets an interrupted step continue."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from kalle.errors import UserError
from kalle.files import write_atomic


def parse_json(content: str | bytes) -> dict[str, Any]:
    """The JSON object in ``content``; a ValueError says on one line why there is none: numbers of thousands of digits, deep nesting."""
    try:
        row = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({getattr(error, 'msg', '') or str(error).split(';')[0]})") from None
    if not isinstance(row, dict):
        raise ValueError(f"it holds a {type(row).__name__}")
    return row


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, the file whole or not at all."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSONL file as an object; a UserError names the file and the line that is not one."""
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a JSONL file; check the path")
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise UserError(f"bad line: '{path}' line {number}: {error}; expected one JSON object a line; correct that line") from None
    return rows


def read_lines(path: Path) -> list[str]:
    """The lines of a UTF-8 text file (a byte-order mark is dropped); a UserError for another encoding."""
    try:
        # str.splitlines also cuts at U+2028 and U+0085, which JSON strings may hold; reading has made \r\n a \n.
        return path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: '{path}' at byte {error.start}; expected UTF-8; convert it with iconv") from None


def read_text_line(path: Path) -> str:
    """The whole of a UTF-8 text file on one line; a UserError for another encoding."""
    return " ".join(" ".join(read_lines(path)).split())


def fingerprint(facts: Any) -> str:
    """SHA-256 (hex) of ``facts``, all that decides a result: what another fingerprint has left is of other work."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


class ResumeJournal:
    """An append-only JSONL file whose first line names the work it belongs to; incomplete last lines are dropped.

    `entries` holds what an earlier, interrupted run of the same work had finished.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.entries: list[dict[str, Any]] = []
        lines = _whole_lines(path)
        if lines and lines[0] == {"fingerprint": fingerprint}:
            self.entries = lines[1:]
        else:
            lines = [{"fingerprint": fingerprint}]
        write_jsonl(path, lines)
        self._file = path.open("a", encoding="utf-8")

    def add(self, entry: dict[str, Any]) -> None:
        """Append one finished item and hand it to the operating system."""
        self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file and keep it for the next run."""
        self._file.close()

    def remove(self) -> None:
        """Close and delete: the work is done, or cannot continue."""
        try:
            self._file.close()
        finally:
            # On a full disk closing fails too: it flushes.
            self.path.unlink(missing_ok=True)


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    rows: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            rows.append(parse_json(line))
        except ValueError:
            break
    return rows
