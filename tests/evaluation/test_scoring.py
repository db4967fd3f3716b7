from __future__ import annotations

import numpy as np
import pytest

from kalle.evaluation.metrics import Aggregate
from kalle.evaluation.scoring import aggregate, estimate


def test_seeded_and_different_for_another_seed() -> None:
    values = np.random.default_rng(0).random(30).tolist()
    assert estimate(values, seed=1) == estimate(values, seed=1)
    assert estimate(values, seed=1) != estimate(values, seed=2)


def test_interval_covers_the_mean_95_times_in_a_hundred() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        interval = estimate(generator.normal(3, 1, 40).tolist(), resamples=300, seed=trial).interval
        assert interval is not None
        hits += interval[0] <= 3 <= interval[1]
    assert 0.88 <= hits / 200 <= 0.99


def test_interval_of_a_ratio_resamples_items_not_tokens() -> None:
    result = estimate([0, 10], [10, 10], resamples=500)
    assert (result.value, result.interval, result.count) == (0.5, (0, 1), 2)


def test_one_item_has_no_interval() -> None:
    assert estimate([0.25]).interval is None


def test_rows_without_the_column_are_not_counted() -> None:
    rows = [{"a": 1.0}, {"error": "missing"}, {"a": 3.0}]
    result = aggregate(rows, Aggregate("a", "a"))
    assert result is not None
    assert (result.value, result.count) == (2.0, 2)
    assert aggregate(rows, Aggregate("b", "b")) is None


def test_denominators_of_zero_give_no_value() -> None:
    assert aggregate([{"a": 1.0, "n": 0.0}], Aggregate("r", "a", "n")) is None
    assert aggregate([{"a": 1.0, "n": 0.0}, {"a": 1.0, "n": 4.0}], Aggregate("r", "a", "n")).value == pytest.approx(0.5)  # type: ignore[union-attr]
