"""Progress: bars on a terminal, and the callback that a library function reports to."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

CountProgress = Callable[[int, int], None]
"""Called with the numbers of pieces done and of all: first with what an earlier run had done, then after each piece."""
logger = logging.getLogger(__name__)
LOG_EVERY_S = 30.0


def progress_bar(show: bool = True) -> Progress:
    """A bar with counts, elapsed and remaining time on standard error, gone once closed; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shown = show and sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # A disabled Progress still ends with an empty line, unless its console is quiet.
    return Progress(*columns, console=Console(stderr=True, quiet=not shown), transient=True, disable=not shown)


class Counter:
    """Counts what is done of ``total``; see ``counting_bar``."""

    def __init__(self, bar: Progress, description: str, total: int, log: bool) -> None:
        self._bar, self._description, self._total, self._log = bar, description, total, log
        self._task = bar.add_task(description, total=total)
        self._done, self._begun_s = 0, time.monotonic()
        self._said_s = self._begun_s

    def advance(self) -> None:
        """One more is done."""
        self._done += 1
        self._bar.advance(self._task)
        now_s = time.monotonic()
        if self._log and now_s - self._said_s > LOG_EVERY_S and self._done < self._total:
            self._said_s = now_s
            left_s = (now_s - self._begun_s) / self._done * (self._total - self._done)
            logger.info("%s: %d of %d, about %.0f minutes left", self._description, self._done, self._total, max(1, left_s / 60))


@contextmanager
def counting_bar(description: str, total: int, show: bool = True) -> Iterator[Counter]:
    """A ``progress_bar`` for work whose parts end later than they begin; without a terminal, a line in the log every half minute."""
    with progress_bar(show) as bar:
        yield Counter(bar, description, total, show and not sys.stderr.isatty())
