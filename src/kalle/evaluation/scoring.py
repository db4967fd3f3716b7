"""Items through metrics to rows, and rows to means with bootstrap confidence intervals."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from kalle.data.shared_work import RankJournals
from kalle.errors import UserError
from kalle.evaluation.comparison import item_means, rows_by_item
from kalle.evaluation.metrics import KEPT_SILENCE_S, RATE_HZ, Aggregate, Metric, ScoreItem, bandwidth_hz
from kalle.evaluation.pool import BATCH_ITEMS, TRIMMED, MetricCard, Row, ScoringPool, columns_of
from kalle.evaluation.test_list import TestItem
from kalle.files import DiskError
from kalle.progress import counting_bar

BLOCK = 2**18
"""Resampled items held in memory at once."""


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` items (their seeds averaged before) with its 95% percentile-bootstrap interval; None below two items."""

    value: float
    interval: tuple[float, float] | None
    count: int


def estimate(numerators: Sequence[float], denominators: Sequence[float] | None = None, resamples: int = 1000, seed: int = 0) -> Estimate:
    """Sum of ``numerators`` over sum of ``denominators`` (ones: the mean) with a 95% interval over resampled items.

    Items are drawn with replacement (Efron 1979); the interval is the 2.5th to 97.5th percentile of the resampled values.
    A resample whose denominators sum to zero is left out of the percentiles.
    """
    top = np.asarray(numerators, dtype=np.float64)
    bottom = np.ones_like(top) if denominators is None else np.asarray(denominators, dtype=np.float64)
    assert top.shape == bottom.shape, f"got {top.size} numerators and {bottom.size} denominators"
    assert top.size > 0, "no values to average"
    value = float(top.sum() / bottom.sum())
    if top.size < 2:
        return Estimate(value, None, top.size)
    generator = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, block := max(1, BLOCK // top.size)):
        index = generator.integers(top.size, size=(min(block, resamples - start), top.size))
        tops, bottoms = top[index].sum(axis=1), bottom[index].sum(axis=1)
        drawn.append(tops[bottoms > 0] / bottoms[bottoms > 0])
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return Estimate(value, (float(low), float(high)), top.size)


def aggregate(rows: Sequence[Row], rule: Aggregate, resamples: int = 1000, seed: int = 0) -> Estimate | None:
    """The aggregate over the items of one system that have its columns; None when none has, or the denominators sum to zero.

    Rows of the same item (its seeds) are averaged first, as `comparison` does: they are no more items, and would narrow the interval.
    """
    columns = [rule.numerator] if rule.denominator is None else [rule.numerator, rule.denominator]
    means = list(item_means(rows, columns).values())
    if not means:
        return None
    top = [values[0] for values in means]
    bottom = None if rule.denominator is None else [values[1] for values in means]
    if bottom is not None and sum(bottom) <= 0:
        return None
    return estimate(top, bottom, resamples, seed)


@dataclass
class Addition:
    """Rows that were added together, and the items of those that are still to be scored."""

    rows: list[Row]
    items: list[ScoreItem]
    scored: list[Row]
    """The row of each item."""

    def fill(self, columns: Sequence[Row]) -> None:
        """Add the columns of each item to its row."""
        for row, found in zip(self.scored, columns, strict=True):
            assert not found.keys() & row.keys(), f"a metric overwrites {found.keys() & row.keys()}"
            row |= found


class Scores:
    """Collects rows while an evaluation runs; metrics are asked when ``rows`` are, or by whoever calls ``take``.

    A row has ``system``, ``id``, ``text``, the metrics' columns, and where something went wrong ``error`` (the item could not be
    made or read) or ``metric_errors`` (name to message). Every requested item has a row.
    """

    def __init__(self, metrics: Sequence[Metric | MetricCard], known: Mapping[str, Row] | None = None) -> None:
        """``metrics``: cards where a pool scores what ``take`` returns. ``known``: rows of recordings by their `recording_digest`."""
        self.metrics, self._known = metrics, known or {}
        self._rows: list[Row] = []
        self._taken = Addition([], [], [])
        if not metrics:
            raise UserError("nothing to score: got no metric, expected at least one; see metrics in configs/evaluate.yaml")
        repeated = [name for name, count in Counter(metric.name for metric in metrics).items() if count > 1]
        if repeated:
            raise UserError(f"repeated metrics: got {', '.join(repeated)} twice, expected each once; remove one")

    @property
    def rows(self) -> list[Row]:
        """All rows, complete."""
        rest = self.take()
        rest.fill(columns_of([metric for metric in self.metrics if not isinstance(metric, MetricCard)], rest.items))
        return self._rows

    @rows.setter
    def rows(self, rows: list[Row]) -> None:
        self._rows = rows

    def add(self, system: str, item: ScoreItem, extra: Row | None = None) -> None:
        """Keep a row for ``item``, to be scored with every metric whose needs it meets."""
        row: Row = {"system": system, "id": item.id, "text": item.text, "language": item.language, "audio_s": len(item.audio) / RATE_HZ}
        row |= {"rate_hz": item.rate_hz, "band_hz": bandwidth_hz(item.audio)} | (extra or {})
        self._rows.append(row)
        self._taken.rows.append(row)
        self._taken.items.append(item)
        self._taken.scored.append(row)

    def add_recording(self, system: str, item: ScoreItem) -> None:
        """Keep a row for a recording of the list: the known one where there is one, else as ``add``."""
        digest = recording_digest(item)
        if digest not in self._known:
            return self.add(system, item, {DIGEST: digest})
        row = self._known[digest] | {"system": system, "id": item.id}
        self._rows.append(row)
        self._taken.rows.append(row)

    def fail(self, system: str, item: TestItem, error: Exception | str, extra: Row | None = None) -> None:
        """Keep a row for an item that could not be made or read; ``extra`` columns say under which seed."""
        row = {"system": system, "id": item.id, "text": item.text, "language": item.language, "error": str(error)} | (extra or {})
        self._rows.append(row)
        self._taken.rows.append(row)

    def take(self) -> Addition:
        """The rows and items added since the last call."""
        taken, self._taken = self._taken, Addition([], [], [])
        return taken


DIGEST = "recording_sha256"
"""The column of a recording's `recording_digest`."""


def recording_digest(item: ScoreItem) -> str:
    """32 hexadecimal digits that stand for all of ``item`` that metrics of a recording see: audio, prompt, text, language and rate."""
    digest = hashlib.sha256(json.dumps([item.text, item.language, item.rate_hz]).encode())
    for audio in (item.audio, item.speaker):
        digest.update(b"none" if audio is None else f"{len(audio)} ".encode() + np.ascontiguousarray(audio, dtype=np.float32).tobytes())
    return digest.hexdigest()[:32]


@contextmanager
def counted(scores: Scores, system: str, item: TestItem, lost: Sequence[Row] = ({},)) -> Iterator[None]:
    """Turn a UserError about one item (a missing wav, say) into its error row, so that the other items are still scored.

    ``lost`` holds the columns of every row that the error costs: one for each seed where it costs all of them. A DiskError is not about
    the item, and passes.
    """
    try:
        yield
    except DiskError:
        raise
    except UserError as error:
        for columns in lost:
            scores.fail(system, item, error, columns)


def score_items(
    items: Sequence[TestItem],
    scores: Scores,
    pool: ScoringPool,
    journal: RankJournals | None,
    score: Callable[[int, TestItem], None],
    description: str,
    show: bool,
) -> None:
    """Call ``score(index, item)`` for every item that is this process's to score; ``scores.rows`` then holds those of all items.

    What it adds is scored by ``pool`` in batches of ``BATCH_ITEMS``, whose items follow from the list and the rank alone, and reaches the
    journal a batch at a time. Without a journal all items are scored, in memory. OthersUnfinished when other ranks have not ended.
    """
    left = set(range(len(items)) if journal is None else journal.pending())
    own = [index for index in range(len(items)) if journal is None or journal.share.owns(index)]
    under_way: deque[tuple[dict[int, Addition], Callable[[], list[Row]]]] = deque()

    def collect(until: int) -> None:
        while len(under_way) > until:
            parts, columns = under_way.popleft()
            found = iter(columns())
            for index, part in parts.items():
                part.fill([next(found) for _ in part.items])
                if journal is not None:
                    journal.keep(index, part.rows)
                bar.advance()

    with counting_bar(description, len(left), show) as bar:
        for start in range(0, len(own), BATCH_ITEMS):
            parts: dict[int, Addition] = {}
            try:
                for index in own[start : start + BATCH_ITEMS]:
                    if index in left:
                        score(index, items[index])
                        parts[index] = scores.take()
            finally:  # an interrupt keeps the items of this batch that were made
                if parts:
                    under_way.append((parts, pool.submit([item for part in parts.values() for item in part.items])))
                    collect(0 if sys.exception() else pool.waiting)
        collect(0)
    if journal is not None:
        scores.rows = journal.merged()


def summarise(rows: Sequence[Row], rules: Iterable[Aggregate], resamples: int, seed: int) -> dict[str, dict[str, Estimate]]:
    """Every aggregate of every system, in order of first appearance; those without a single value are left out."""
    rules = list(rules)
    summary: dict[str, dict[str, Estimate]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        cut = any(max(row.get("lead_silence_s", 0.0), row.get("tail_silence_s", 0.0)) > KEPT_SILENCE_S for row in own)
        measured = [rule for rule in rules if cut or not rule.name.endswith(TRIMMED)]  # else both are the same number
        estimates = {rule.name: aggregate(own, rule, resamples, seed) for rule in measured}
        summary[system] = {name: value for name, value in estimates.items() if value is not None}
    return summary


def count_rows(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For every system: items, seeds (most rows of an item), errors by metric, stop reasons where there are any, and errors.

    Errors are rows that were not made or read: an item that failed with each of three seeds is three.
    """
    counts: dict[str, dict[str, Any]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        stops = Counter(row["stop_reason"] for row in own if "stop_reason" in row)
        by_metric = Counter(name for row in own for name in row.get("metric_errors", {}))
        by_item = rows_by_item(own)
        counts[system] = {"items": len(by_item), "seeds": max(map(len, by_item.values())), "errors": sum("error" in row for row in own)}
        counts[system]["metric_errors"] = dict(by_metric)
        if stops:
            counts[system]["stop_reasons"] = dict(stops)
    return counts
