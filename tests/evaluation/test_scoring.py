from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalle.evaluation.comparison import Run, compare
from kalle.evaluation.intelligibility import length_curve
from kalle.evaluation.metrics import Aggregate
from kalle.evaluation.scoring import aggregate, count_rows, estimate, summarise


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
    rows = [{"id": "1", "a": 1.0}, {"id": "2", "error": "missing"}, {"id": "3", "a": 3.0}]
    result = aggregate(rows, Aggregate("a", "a"))
    assert result is not None
    assert (result.value, result.count) == (2.0, 2)
    assert aggregate(rows, Aggregate("b", "b")) is None


def test_denominators_of_zero_give_no_value() -> None:
    rows = [{"id": "1", "a": 1.0, "n": 0.0}, {"id": "2", "a": 1.0, "n": 4.0}]
    assert aggregate(rows[:1], Aggregate("r", "a", "n")) is None
    assert aggregate(rows, Aggregate("r", "a", "n")).value == pytest.approx(0.5)  # type: ignore[union-attr]


def spoken(items: int = 30, seeds: int = 1) -> list[dict[str, Any]]:
    """Rows of ``items`` texts, each alike under all ``seeds``."""
    generator = np.random.default_rng(0)
    rows = []
    for index, (rate, words) in enumerate(zip(generator.random(items), generator.integers(4, 20, items), strict=True)):
        row = {"system": "synthesis", "id": str(index), "sim": rate, "errors": float(int(rate * words)), "words": int(words)}
        row |= {"spoken_words": int(words), "inserted": 0, "deleted": int(rate * words), "substituted": 0}
        rows += [row | {"seed": seed} for seed in range(seeds)]
    return rows


@pytest.mark.parametrize("rule", [Aggregate("sim", "sim"), Aggregate("wer", "errors", "words")])
def test_seeds_that_say_the_same_narrow_no_interval(rule: Aggregate) -> None:
    once, thrice = (aggregate(spoken(seeds=seeds), rule) for seeds in (1, 3))
    assert once is not None
    assert thrice is not None
    assert thrice.value == pytest.approx(once.value)
    assert thrice.interval == pytest.approx(once.interval)
    assert thrice.count == once.count == 30
    curves = [length_curve(spoken(seeds=seeds)) for seeds in (1, 3)]
    assert len(curves[0]) > 1
    for one, three in zip(*curves, strict=True):
        assert three.wer.interval == pytest.approx(one.wer.interval)
        assert three.wer.count == one.wer.count


def test_a_summary_holds_the_numbers_of_a_comparison() -> None:
    """Where seeds differ, and some failed, both average the rows of an item that are there."""
    rows = [row | {"sim": row["sim"] * (row["seed"] + 1), "errors": row["errors"] + row["seed"]} for row in spoken(seeds=3)]
    rows = [
        {key: row[key] for key in ("system", "id", "seed")} | {"error": "x"} if index % 7 == 1 else row for index, row in enumerate(rows)
    ]
    rules = [Aggregate("sim", "sim"), Aggregate("wer", "errors", "words")]
    columns = {"sim": ["sim"], "wer": ["errors", "words"]}
    run = Run("a", Path(), "synthesis", rows, {"columns": columns})
    (found,) = compare(run, run, resamples=10)
    summary = summarise(rows, rules, resamples=10, seed=0)["synthesis"]
    for difference in found.differences:
        assert summary[difference.metric].value == pytest.approx(difference.a)
        assert summary[difference.metric].count == difference.items
    assert count_rows(rows)["synthesis"] == {"items": 30, "seeds": 3, "errors": 13, "metric_errors": {}}
