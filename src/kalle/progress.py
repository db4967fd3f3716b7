"""Progress: bars on a terminal, and the callback that a library function reports to."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress

CountProgress = Callable[[int, int], None]
"""Called with the numbers of pieces done and of all: first with what an earlier run had done, then after each piece."""


def progress_bar(show: bool = True) -> Progress:
    """A bar with counts, elapsed and remaining time on standard error, gone once closed; nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    shown = show and sys.stderr.isatty()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    # A disabled Progress still ends with an empty line, unless its console is quiet.
    return Progress(*columns, console=Console(stderr=True, quiet=not shown), transient=True, disable=not shown)
