"""Items checked in several processes, their results in the order of the items."""

from __future__ import annotations

import itertools
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from kalle.data.corpora.items import Rejection, SourceItem
from kalle.data.prepare_check import Kept, PrepareOptions, check_item
from kalle.errors import UserError

CHUNK_ITEMS = 8
CHUNKS_AHEAD = 4
"""For each process; more would only wait in memory, and be lost at an interrupt."""


class WorkerLost(UserError):
    """A worker process ended in the middle of its work; what was finished is in the journal."""


def check_parallel(items: list[SourceItem], options: PrepareOptions, out: Path, jobs: int) -> Generator[Kept | Rejection, None, None]:
    """`check_item` of every item, in order, by ``jobs`` processes; raises WorkerLost when one of them is killed.

    Closing the generator waits for the few items that are being checked.
    """
    chunks = (items[start : start + CHUNK_ITEMS] for start in range(0, len(items), CHUNK_ITEMS))
    waiting: deque[Future[list[Kept | Rejection]]] = deque()
    # Not forked: torch and PyAV have threads of their own by now.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        for chunk in itertools.chain(chunks, itertools.repeat(None)):
            if chunk is not None:
                waiting.append(pool.submit(_check_chunk, chunk, options, out))
                if len(waiting) < jobs * CHUNKS_AHEAD:
                    continue
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise WorkerLost(
            f"a worker process was killed: got {jobs} processes, expected memory for each; run the same command again with fewer --jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_chunk(items: list[SourceItem], options: PrepareOptions, out: Path) -> list[Kept | Rejection]:
    return [check_item(item, options, out) for item in items]


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
