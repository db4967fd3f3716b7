"""Metrics over batches of items, here or in worker processes that each hold metrics of their own."""

from __future__ import annotations

import math
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from kalle.errors import UserError
from kalle.evaluation.asr import keep_freed_memory
from kalle.evaluation.metrics import ALIGNED, Aggregate, Metric, MetricError, ScoreItem, Value, described, trimmed

BATCH_ITEMS = 8
"""Items that are scored together. A fixed number, so that the rows do not depend on how many processes score."""
ITEMS_PER_WORKER = 8
"""Fewer are scored sooner by one process than a second one has started."""
Row = dict[str, Any]
BuildMetrics = Callable[[], Sequence[Metric]]
TRIMMED = "_trimmed"
"""Behind the name of a column: the same without the silence at the ends."""


@dataclass(frozen=True)
class MetricCard:
    """A metric as the report needs it; the one that measures may live in other processes."""

    name: str
    needs: frozenset[str]
    aggregates: tuple[Aggregate, ...]
    described: Mapping[str, object]

    def describe(self) -> Mapping[str, object]:
        """Model, versions and settings."""
        return self.described


def card(metric: Metric | MetricCard) -> MetricCard:
    """The card of ``metric``."""
    if isinstance(metric, MetricCard):
        return metric
    return MetricCard(metric.name, metric.needs, tuple(metric.aggregates), described(metric))


def columns_of(metrics: Sequence[Metric], items: Sequence[ScoreItem]) -> list[Row]:
    """The columns of each item under every metric whose needs it meets, and ``metric_errors`` (name to message) where one failed.

    Metrics that compare with no recording in step hear each item twice: as found, and without the silence at its ends (columns
    ``*_trimmed``). Where there is next to none, both are the same audio, and the numbers are copied.
    """
    cut = [trimmed(item) for item in items]
    rows: list[Row] = [{"lead_silence_s": round(lead_s, 4), "tail_silence_s": round(tail_s, 4)} for _, lead_s, tail_s in cut]
    for metric in metrics:
        heard = [index for index, item in enumerate(items) if metric.needs <= item.offers()]
        for index, columns in zip(heard, _score(metric, [items[index] for index in heard]), strict=True):
            _add(rows[index], metric.name, columns)
        twins = twin_columns(metric)
        if not twins:
            continue
        shorter = [index for index in heard if len(cut[index][0].audio) < len(items[index].audio)]
        again = dict(zip(shorter, _score(metric, [cut[index][0] for index in shorter]), strict=True)) if shorter else {}
        for index in heard:
            source = again[index][0] if index in again else rows[index]
            _add(rows[index], metric.name + TRIMMED, ({name + TRIMMED: source[name] for name in twins if name in source}, None))
    return rows


def twin_columns(metric: Metric | MetricCard) -> list[str]:
    """The columns of ``metric`` that are also measured on the trimmed audio."""
    if ALIGNED in metric.needs:
        return []
    kept = [rule for rule in metric.aggregates if rule.trimmed_too]
    return list(dict.fromkeys(name for rule in kept for name in (rule.numerator, rule.denominator) if name is not None))


def twin_rules(metric: Metric | MetricCard) -> list[Aggregate]:
    """The numbers of the summary that ``twin_columns`` give."""
    rules = [rule for rule in metric.aggregates if rule.trimmed_too and ALIGNED not in metric.needs]
    bottom = {rule.name: None if rule.denominator is None else rule.denominator + TRIMMED for rule in rules}
    return [Aggregate(rule.name + TRIMMED, rule.numerator + TRIMMED, bottom[rule.name], rule.lower_is_better) for rule in rules]


_Scored = tuple[Mapping[str, Value], str | None]
"""Columns, and what went wrong."""


def _add(row: Row, name: str, scored: _Scored) -> None:
    columns, problem = scored
    broken = [column for column, value in columns.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        columns, problem = {}, f"not finite: {', '.join(broken)}"
    if problem is not None:
        row.setdefault("metric_errors", {})[name] = problem
    assert not columns.keys() & row.keys(), f"{name} overwrites {columns.keys() & row.keys()}"
    row |= columns


def _score(metric: Metric, items: Sequence[ScoreItem]) -> list[_Scored]:
    """One result an item; a metric that has ``batch`` takes all at once."""
    batch = getattr(metric, "batch", None)
    if batch is None:
        results: list[Mapping[str, Value] | MetricError] = [_one(metric, item) for item in items]
    else:
        results = batch(items) if items else []
    return [(result.columns, str(result)) if isinstance(result, MetricError) else (dict(result), None) for result in results]


def _one(metric: Metric, item: ScoreItem) -> Mapping[str, Value] | MetricError:
    try:
        return metric(item)
    except MetricError as error:
        return error


class ScoringPool:
    """Scores batches of items, in order of submission, in ``workers`` processes or (0) in this one.

    Used as a context manager. ``build`` makes the metrics in each process; it must be picklable for workers, and what it misses is a
    UserError when the pool is entered, before anything is scored. ``cards`` tell what is measured. Not more than two batches wait for
    each worker, so memory does not grow with the list.
    """

    def __init__(self, build: BuildMetrics, workers: int = 0) -> None:
        self._build, self.workers = build, workers
        self._executor: ProcessPoolExecutor | None = None
        self._metrics: Sequence[Metric] = ()
        self.cards: Sequence[MetricCard] = ()

    @property
    def waiting(self) -> int:
        """Batches that may be under way before the oldest has to be collected."""
        return 2 * self.workers

    def __enter__(self) -> ScoringPool:
        if not self.workers:
            self._metrics = self._build()
            self.cards = [card(metric) for metric in self._metrics]
            return self
        self._executor = ProcessPoolExecutor(self.workers, multiprocessing.get_context("spawn"), _start, (self._build,))
        try:
            with _threads(max(1, (os.cpu_count() or 1) // self.workers)):
                # A barrier is not needed: a process is started for each task that is submitted while none is idle.
                ready = [self._executor.submit(_cards) for _ in range(self.workers)]
                self.cards = self._result(ready[0])
                for other in ready[1:]:
                    self._result(other)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def submit(self, items: Sequence[ScoreItem]) -> Callable[[], list[Row]]:
        """Begin to score ``items``; the function that is returned waits for their columns."""
        if self._executor is None:
            rows = columns_of(self._metrics, items)
            return lambda: rows
        future = self._executor.submit(_columns, list(items))
        return lambda: self._result(future)

    @staticmethod
    def _result(future: Future[Any]) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            raise UserError(
                "a scoring process ended (often for lack of memory): run the same command again with fewer workers; finished items are kept"
            ) from None


def as_pool(metrics: Sequence[Metric] | ScoringPool) -> ScoringPool:
    """``metrics`` scored in this process, unless they are a pool, which its owner has entered."""
    return metrics if isinstance(metrics, ScoringPool) else ScoringPool(lambda: metrics).__enter__()


def worker_count(wanted: int | None, items: int) -> int:
    """``wanted`` processes; None: one a core, and none where ``items`` are too few for a second process to be worth its start."""
    if wanted is not None:
        if wanted < 0:
            raise UserError(f"workers: got {wanted}, expected 0 (score in this process) or more; correct it")
        return wanted
    fitting = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, items // ITEMS_PER_WORKER)
    return fitting if fitting > 1 else 0


_BUILD: list[BuildMetrics] = []
_METRICS: list[Sequence[Metric]] = []


def _start(build: BuildMetrics) -> None:
    import torch

    keep_freed_memory()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process ends the others
    parent = multiprocessing.parent_process()
    assert parent is not None, "started by a pool"
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _BUILD.append(build)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is killed: it would wait for work for ever."""
    multiprocessing.connection.wait([parent])
    os._exit(1)


def _metrics() -> Sequence[Metric]:
    if not _METRICS:  # not in _start, whose errors are lost
        _METRICS.append(_BUILD[0]())
    return _METRICS[0]


def _cards() -> list[MetricCard]:
    return [card(metric) for metric in _metrics()]


def _columns(items: Sequence[ScoreItem]) -> list[Row]:
    return columns_of(_metrics(), items)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Threads of OpenMP and CTranslate2 in processes that are started meanwhile: they share the cores."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
