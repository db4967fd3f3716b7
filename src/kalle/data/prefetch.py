"""Work done ahead in background threads, in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

Input = TypeVar("Input")
Output = TypeVar("Output")
AHEAD_PER_THREAD = 4
"""Results that wait for their taker, so that memory stays bounded."""


def in_background(function: Callable[[Input], Output], items: Iterable[Input], threads: int) -> Iterator[tuple[Input, Output]]:
    """Every item with ``function(item)``, in order, computed in ``threads`` threads a little ahead of the taker; 0 computes on demand.

    An exception of ``function`` is raised where its item would have come.
    """
    if threads == 0:
        for item in items:
            yield item, function(item)
        return
    with ThreadPoolExecutor(threads, thread_name_prefix="prefetch") as pool:
        waiting: deque[tuple[Input, Future[Output]]] = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > AHEAD_PER_THREAD * threads:
                    first, future = waiting.popleft()
                    yield first, future.result()
            while waiting:
                first, future = waiting.popleft()
                yield first, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
