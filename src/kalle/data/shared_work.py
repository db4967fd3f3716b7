"""Work that several processes share without talking to each other, and that an interrupted process continues.

A `Share` says which pieces are this process's. A `ResumeJournal` keeps one process's finished pieces on the disk; `RankJournals` are those
of all ranks of one output folder.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from kalle.errors import UserError
from kalle.files import disk_errors, folder_lock, parse_json, write_jsonl

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
JOURNAL_FOLDER = "progress"
_ENVIRONMENTS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""The variables that torchrun and SLURM's srun set for a process; the step's number of tasks has precedence over the job's."""
_LOCAL = ("LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True)
class Share:
    """The part of process ``rank`` of ``world_size``: number n belongs to rank n % world_size, so the parts are disjoint and complete."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"ranks: got rank={self.rank} of world_size={self.world_size}, expected 0 <= rank < world_size; correct them")

    def owns(self, number: int) -> bool:
        """Whether the piece of work ``number`` (counted from 0) is ours."""
        return number % self.world_size == self.rank

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


def share_of_process(rank: int | None = None, world_size: int | None = None, environment: Mapping[str, str] | None = None) -> Share:
    """The share that ``rank`` and ``world_size`` name, else that of torchrun or SLURM in ``environment`` (os.environ), else all of it.

    UserError for one number without the other, or for values that are no ranks.
    """
    if (rank is None) != (world_size is None):
        raise UserError(f"ranks: got rank={rank} and world_size={world_size}, expected both or neither; add the other")
    if rank is not None and world_size is not None:
        return Share(rank, world_size)
    found = os.environ if environment is None else environment
    for rank_name, size_name in _ENVIRONMENTS:
        if rank_name in found and size_name in found:
            return Share(_number(found, rank_name), _number(found, size_name))
    return Share()


def local_rank(environment: Mapping[str, str] | None = None) -> int | None:
    """This process's number on its own machine as torchrun or SLURM give it; None where neither started it."""
    found = os.environ if environment is None else environment
    return next((_number(found, name) for name in _LOCAL if name in found), None)


def rank_device(device: str) -> torch.device:
    """``device`` as ``resolve_device`` does, except that the ranks of a machine share its GPUs: cuda becomes cuda:LOCAL_RANK.

    More ranks than GPUs take turns. A device with a number is taken as it is. UserError as in ``resolve_device``.
    """
    import torch

    from kalle.checkpoint import resolve_device

    resolved, local = resolve_device(device), local_rank()
    if resolved.type != "cuda" or resolved.index is not None or local is None:
        return resolved
    return torch.device("cuda", local % torch.cuda.device_count())


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"environment variable {name}: got '{environment[name]}', expected a whole number; unset or correct it") from None


class OthersUnfinished(Exception):
    """This process has done its share, but parts of other ranks are not there yet; whichever rank ends last completes the result."""

    def __init__(self, share: Share, missing: int, pieces: str) -> None:
        """``missing`` counts the ``pieces`` (a plural noun) that other ranks have yet to write."""
        super().__init__(
            f"{share} has done its part; {missing} {pieces} of other ranks are not there yet, and the rank that ends last completes the "
            "result (if no other runs, start the missing ranks, or the same command alone with rank=0 world_size=1)"
        )


class ResumeJournal:
    """An append-only JSONL file whose first line is the fingerprint of the work it belongs to.

    ``entries`` holds what an earlier, interrupted run of the same work had finished; an incomplete last line is dropped. Nothing is
    written before the first ``add``, which writes the ``entries`` that are left by then once more.
    """

    def __init__(self, path: Path, fingerprint: str, *, durable: bool = False) -> None:
        """``durable`` writes each entry through to the disk, where processes on other machines see it."""
        self.path, self.fingerprint, self.durable = path, fingerprint, durable
        self.entries = read_journal(path, fingerprint)
        self._file: IO[str] | None = None

    def add(self, entry: dict[str, Any]) -> None:
        """Append one finished piece."""
        with disk_errors(self.path):
            if self._file is None:
                write_jsonl(self.path, [{"fingerprint": self.fingerprint}, *self.entries])
                self._file = self.path.open("a", encoding="utf-8", errors="backslashreplace")  # as write_atomic
            self._file.write(json.dumps(entry, ensure_ascii=False) + "\n")
            self._file.flush()
            if self.durable:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file and keep it for the next run."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Close and delete: the work is done, or cannot continue."""
        try:
            self.close()
        finally:
            # On a full disk closing fails too: it flushes.
            self.path.unlink(missing_ok=True)


def read_journal(path: Path, fingerprint: str) -> list[dict[str, Any]]:
    """The complete entries of a journal; none when the file is missing or belongs to other work."""
    if not path.is_file():
        return []
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            entries.append(parse_json(line))
        except ValueError:
            break
    return entries[1:] if entries[:1] == [{"fingerprint": fingerprint}] else []


class RankJournals:
    """The rows of finished items in OUT/progress/rank-N.jsonl, one `ResumeJournal` a rank.

    Used as a context manager, which opens this rank's. Items that any rank has finished under the same fingerprint are not done again,
    unless a row of theirs has an ``error``: those of the own share are tried once more.
    """

    def __init__(self, out: str | Path, fingerprint: str, share: Share, items: int, *, resume: bool = True) -> None:
        """``items`` is the length of the list; ``resume=False`` forgets what this rank had finished."""
        self.out, self.fingerprint, self.share, self.items, self.resume = Path(out), fingerprint, share, items, resume
        self.path = self.out / JOURNAL_FOLDER / f"rank-{share.rank}.jsonl"
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> RankJournals:
        """Read what is there. UserError when another process already works as this rank."""
        with self._stack:
            holder = self._stack.enter_context(folder_lock(self.out, f"rank-{self.share.rank}", wait=False))
            if holder is not None:
                who = f"{self.share} already evaluates into '{self.out}': process {holder}"
                raise UserError(f"{who}; wait for it, or give another rank or out")
            self._journal = ResumeJournal(self.path, self.fingerprint, durable=True)
            if self.resume and not self._journal.entries and self.path.is_file():
                logger.info("'%s' holds rows of another model, list or setting; starting anew", self.path)
            entries = self._journal.entries if self.resume else []
            self._journal.entries = [entry for entry in entries if _is_whole(entry) and not any("error" in row for row in entry["rows"])]
            self._own = _by_index(self._journal.entries)
            self._stack.callback(self._journal.close)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def pending(self) -> list[int]:
        """Indices of this rank's items that are not finished yet."""
        own = [index for index in range(self.items) if self.share.owns(index)]
        done = self._own.keys() | self._others().keys()
        left = [index for index in own if index not in done]
        if len(left) < len(own):
            logger.info("%s: %d of %d items were scored before; resume=never scores them again", self.share, len(own) - len(left), len(own))
        return left

    def keep(self, index: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the rows of item ``index`` through to the disk."""
        entry = json.loads(json.dumps({"index": index, "rows": rows}, allow_nan=False))
        self._journal.add(entry)
        self._own |= _by_index([entry])

    def _others(self) -> dict[int, list[dict[str, Any]]]:
        """Rows of the other ranks, by the item's index."""
        found: dict[int, list[dict[str, Any]]] = {}
        for path in sorted(path for path in self.path.parent.glob("rank-*.jsonl") if path != self.path):
            found = _by_index(read_journal(path, self.fingerprint)) | found
        return found

    def merged(self) -> list[dict[str, Any]]:
        """The rows of all items in the order of the list. OthersUnfinished when some are still to come."""
        found = self._others() | self._own
        missing = sum(index not in found for index in range(self.items))
        if missing:
            raise OthersUnfinished(self.share, missing, "items")
        return [row for index in range(self.items) for row in found[index]]


def _by_index(entries: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    return {entry["index"]: entry["rows"] for entry in entries if _is_whole(entry)}


def _is_whole(entry: Mapping[str, Any]) -> bool:
    """Whether ``entry`` holds the rows of an item; a damaged one is as if the item had not been finished."""
    rows = entry.get("rows")
    return type(entry.get("index")) is int and isinstance(rows, list) and all(isinstance(row, dict) for row in rows)
