"""Items through metrics to rows, and rows to means with bootstrap confidence intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from kalle.errors import UserError
from kalle.evaluation.metrics import Aggregate, Metric, MetricError, ScoreItem
from kalle.evaluation.test_list import TestItem
from kalle.files import DiskError

Row = dict[str, Any]


@dataclass(frozen=True)
class Estimate:
    """A mean over ``count`` items with its 95% percentile-bootstrap interval; None below two items."""

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
    for _ in range(resamples):
        index = generator.integers(top.size, size=top.size)
        if bottom[index].sum() > 0:
            drawn.append(top[index].sum() / bottom[index].sum())
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Estimate(value, (float(low), float(high)), top.size)


def aggregate(rows: Sequence[Row], rule: Aggregate, resamples: int = 1000, seed: int = 0) -> Estimate | None:
    """The aggregate over the rows that have its columns; None when none has, or the denominators sum to zero."""
    columns = [rule.numerator] if rule.denominator is None else [rule.numerator, rule.denominator]
    complete = [row for row in rows if all(isinstance(row.get(column), int | float) for column in columns)]
    top = [float(row[rule.numerator]) for row in complete]  # type: ignore[arg-type]
    bottom = None if rule.denominator is None else [float(row[rule.denominator]) for row in complete]  # type: ignore[arg-type]
    if not top or (bottom is not None and sum(bottom) <= 0):
        return None
    return estimate(top, bottom, resamples, seed)


@dataclass
class Scores:
    """Collects rows while an evaluation runs.

    A row has ``system``, ``id``, ``text``, the metrics' columns, and where something went wrong ``error`` (the item could not be
    made or read) or ``metric_errors`` (name to message). Every requested item has a row.
    """

    metrics: Sequence[Metric]
    rows: list[Row] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.metrics:
            raise UserError("nothing to score: got no metric, expected at least one; see metrics in configs/evaluate.yaml")
        repeated = [name for name, count in Counter(metric.name for metric in self.metrics).items() if count > 1]
        if repeated:
            raise UserError(f"repeated metrics: got {', '.join(repeated)} twice, expected each once; remove one")

    def add(self, system: str, item: ScoreItem, extra: Row | None = None) -> Row:
        """Score one item with every metric whose needs it meets, and keep and return its row."""
        row: Row = {"system": system, "id": item.id, "text": item.text, "audio_s": len(item.audio) / 16000} | (extra or {})
        problems: dict[str, str] = {}
        for metric in self.metrics:
            if not metric.needs <= item.offers():
                continue
            try:
                columns = dict(metric(item))
            except MetricError as error:
                problems[metric.name] = str(error)
                columns = error.columns
            broken = [name for name, value in columns.items() if isinstance(value, float) and not math.isfinite(value)]
            if broken:
                problems[metric.name] = f"not finite: {', '.join(broken)}"
                continue
            assert not columns.keys() & row.keys(), f"{metric.name} overwrites {columns.keys() & row.keys()}"
            row |= columns
        if problems:
            row["metric_errors"] = problems
        self.rows.append(row)
        return row

    def fail(self, system: str, item: TestItem, error: Exception | str) -> None:
        """Keep a row for an item that could not be made or read."""
        self.rows.append({"system": system, "id": item.id, "text": item.text, "error": str(error)})


@contextmanager
def counted(scores: Scores, system: str, item: TestItem) -> Iterator[None]:
    """Turn a UserError about one item (a missing wav, say) into its error row, so that the other items are still scored.

    A DiskError is not about the item, and passes.
    """
    try:
        yield
    except DiskError:
        raise
    except UserError as error:
        scores.fail(system, item, error)


def summarise(rows: Sequence[Row], rules: Iterable[Aggregate], resamples: int, seed: int) -> dict[str, dict[str, Estimate]]:
    """Every aggregate of every system, in order of first appearance; those without a single value are left out."""
    rules = list(rules)
    summary: dict[str, dict[str, Estimate]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        estimates = {rule.name: aggregate(own, rule, resamples, seed) for rule in rules}
        summary[system] = {name: value for name, value in estimates.items() if value is not None}
    return summary


def count_rows(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """For every system: items, errors (not made or read), errors by metric, and stop reasons where there are any."""
    counts: dict[str, dict[str, Any]] = {}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system]
        stops = Counter(row["stop_reason"] for row in own if "stop_reason" in row)
        by_metric = Counter(name for row in own for name in row.get("metric_errors", {}))
        counts[system] = {"items": len(own), "errors": sum("error" in row for row in own), "metric_errors": dict(by_metric)}
        if stops:
            counts[system]["stop_reasons"] = dict(stops)
    return counts
