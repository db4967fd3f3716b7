"""Rows on disk as soon as an item is scored, so that an evaluation can be continued, and shared by several processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from kalle.data.ranks import OthersUnfinished, Share
from kalle.errors import UserError
from kalle.evaluation.scoring import Row, Scores
from kalle.evaluation.test_list import TestItem
from kalle.files import disk_errors, folder_lock, write_atomic
from kalle.progress import progress_bar

logger = logging.getLogger(__name__)
JOURNAL_FOLDER = "progress"


def folder_digest(folder: str | Path) -> str:
    """SHA-256 (hex) of the names and contents of all files under ``folder``."""
    digest, root = hashlib.sha256(), Path(folder)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            digest.update(f"{path.relative_to(root)} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()


class Journal:
    """The rows of finished items in OUT/progress/rank-N.jsonl: a line with the fingerprint, then a line an item.

    Used as a context manager, which opens this rank's file. Items that any rank has finished under the same fingerprint are not
    scored again, unless they failed: those of the own share are tried once more. An incomplete last line is dropped.
    """

    def __init__(self, out: str | Path, mark: str, share: Share, items: int, *, resume: bool = True) -> None:
        """``mark`` is the fingerprint, ``items`` the length of the list; ``resume=False`` forgets what this rank had scored."""
        self.out, self.mark, self.share, self.items, self.resume = Path(out), mark, share, items, resume
        self.path = self.out / JOURNAL_FOLDER / f"rank-{share.rank}.jsonl"
        self._stack = contextlib.ExitStack()
        self._kept: dict[int, list[Row]] = {}
        self._file: IO[str] | None = None

    def __enter__(self) -> Journal:
        """Read what is there; nothing is written before the first item. UserError when another process already works as this rank."""
        with self._stack:
            holder = self._stack.enter_context(folder_lock(self.out, f"rank-{self.share.rank}", wait=False))
            if holder is not None:
                who = f"{self.share} already evaluates into '{self.out}': process {holder}"
                raise UserError(f"{who}; wait for it, or give another rank or out")
            self._kept = self._own()
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _own(self) -> dict[int, list[Row]]:
        """Rows in this rank's file that need not be scored again."""
        if not self.resume or not self.path.is_file():
            return {}
        found = _read(self.path, self.mark)
        if found is None:
            logger.info("'%s' holds rows of another model, list or setting; starting anew", self.path)
            return {}
        return {index: rows for index, rows in found.items() if not any("error" in row for row in rows)}

    def pending(self) -> list[int]:
        """Indices of this rank's items that are not scored yet."""
        own = [index for index in range(self.items) if self.share.owns(index)]
        done = self._kept.keys() | self._others().keys()
        left = [index for index in own if index not in done]
        if len(left) < len(own):
            logger.info("%s: %d of %d items were scored before; resume=never scores them again", self.share, len(own) - len(left), len(own))
        return left

    def keep(self, index: int, rows: Sequence[Row]) -> None:
        """Write the rows of item ``index`` through to the disk."""
        if self._file is None:
            lines = [json.dumps({"fingerprint": self.mark}), *(_line(number, some) for number, some in self._kept.items())]
            write_atomic(self.path, "".join(f"{line}\n" for line in lines))
            self._file = self._stack.enter_context(self.path.open("a", encoding="utf-8"))
        with disk_errors(self.path):
            self._file.write(_line(index, rows) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        self._kept[index] = list(json.loads(_line(index, rows))["rows"])

    def _others(self) -> dict[int, list[Row]]:
        """Rows of the other ranks, by the item's index."""
        found: dict[int, list[Row]] = {}
        for path in sorted(self.path.parent.glob("rank-*.jsonl")):
            for index, rows in (_read(path, self.mark) or {}).items() if path != self.path else ():
                found.setdefault(index, rows)
        return found

    def merged(self) -> list[Row]:
        """The rows of all items in the order of the list. OthersUnfinished when some are still to come."""
        found = self._others() | self._kept
        missing = sum(index not in found for index in range(self.items))
        if missing:
            raise OthersUnfinished(self.share, missing, "items")
        return [row for index in range(self.items) for row in found[index]]


def score_items(
    items: Sequence[TestItem],
    scores: Scores,
    journal: Journal | None,
    score: Callable[[int, TestItem], None],
    description: str,
    show: bool,
) -> None:
    """Call ``score(index, item)`` for every item that is this process's to score; ``scores.rows`` then holds those of all items.

    Without a journal all items are scored, in memory. OthersUnfinished when other ranks have not ended.
    """
    indices = list(range(len(items))) if journal is None else journal.pending()
    with progress_bar(show) as bar:
        for index in bar.track(indices, description=description):
            before = len(scores.rows)
            score(index, items[index])
            if journal is not None:
                journal.keep(index, scores.rows[before:])
    if journal is not None:
        scores.rows = journal.merged()


def _line(index: int, rows: Sequence[Row]) -> str:
    return json.dumps({"index": index, "rows": rows}, ensure_ascii=False, allow_nan=False)


def _read(path: Path, mark: str) -> dict[int, list[Row]] | None:
    """The rows by index; None when the file is of another evaluation."""
    lines = _whole_lines(path)
    if next(lines, {}).get("fingerprint") != mark:
        return None
    return {line["index"]: line["rows"] for line in lines}


def _whole_lines(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.endswith("\n"):
                return  # cut short when its process died
            try:
                yield json.loads(line)
            except ValueError:
                return
