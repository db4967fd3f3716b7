"""Means with bootstrap confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from kalle.evaluation.metric import Aggregate

Row = Mapping[str, object]


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
