from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.data.latents.mix import Mix
from kalle.data.loading.samplers import PackedBatchSampler, ShardWindows

ITEMS = st.lists(st.integers(1, 60), min_size=1, max_size=80)


@settings(deadline=None, max_examples=150)
@given(ITEMS, st.integers(0, 200), st.one_of(st.none(), st.integers(1, 9)), st.booleans())
def test_every_epoch_visits_all_within_the_budget(lengths: list[int], spare: int, max_items: int | None, shuffle: bool) -> None:
    budget = max(lengths) + spare
    plan = PackedBatchSampler(np.array(lengths), max_positions=budget, max_items=max_items, shuffle=shuffle, seed=1)
    for epoch in range(3):
        batches = plan(epoch)
        assert len(batches) == plan.batches, "the trainer asks once how many there are"
        assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
        assert all(batch for batch in batches)
        assert max(sum(lengths[item] for item in batch) for batch in batches) <= budget
        assert max_items is None or max(map(len, batches)) <= max_items


def test_the_order_is_a_function_of_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(20, 200, 300)
    plans = [PackedBatchSampler(lengths, max_positions=2000, seed=seed) for seed in (1, 1, 2)]
    assert plans[0](3) == plans[1](3)
    assert plans[0](3) != plans[0](4)
    assert plans[0](3) != plans[2](3)
    constant = PackedBatchSampler(lengths, max_positions=2000, shuffle=False)
    assert constant(0) == constant(5)


def test_batches_are_nearly_full_and_alike() -> None:
    """Emilia-like lengths under the scripts' budget: few batches more than the least possible."""
    lengths = np.random.default_rng(0).integers(50, 600, 5000)
    plan = PackedBatchSampler(lengths, max_positions=24000)
    filled = [int(lengths[batch].sum()) for batch in plan(0)]
    assert plan.batches <= 1.03 * lengths.sum() / 24000 + 1
    assert min(filled) > 0.9 * max(filled)


def test_lengths_mix() -> None:
    """A batch is a sample of the corpus, not of a bucket of it."""
    lengths = np.sort(np.random.default_rng(0).integers(50, 600, 2000))
    spread = [np.std(lengths[batch]) for batch in PackedBatchSampler(lengths, max_positions=24000)(0)]
    assert min(spread) > 0.7 * np.std(lengths)


@pytest.mark.parametrize(("lengths", "budget", "expected"), [([7], 7, 1), ([7, 7], 7, 2), ([3, 3, 3], 9, 1)])
def test_edges(lengths: list[int], budget: int, expected: int) -> None:
    assert PackedBatchSampler(np.array(lengths), max_positions=budget).batches == expected


@settings(deadline=None, max_examples=150)
@given(ITEMS, st.integers(0, 200), st.one_of(st.none(), st.integers(1, 9)), st.integers(1, 4), st.integers(0, 3))
def test_windows_of_shards_keep_the_budget_too(lengths: list[int], spare: int, max_items: int | None, size: int, seed: int) -> None:
    budget = max(lengths) + spare
    shard = np.arange(len(lengths)) // 5
    plan = PackedBatchSampler(np.array(lengths), max_positions=budget, max_items=max_items, seed=seed, windows=ShardWindows(shard, size))
    for epoch in range(2):
        batches = plan(epoch)
        assert len(batches) == plan.batches
        assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
        assert all(batch for batch in batches)
        assert max(sum(lengths[item] for item in batch) for batch in batches) <= budget
        assert max_items is None or max(map(len, batches)) <= max_items


def test_a_shard_is_read_within_its_window() -> None:
    shard = np.repeat(np.arange(20), 50)
    lengths = np.random.default_rng(0).integers(20, 200, len(shard))
    windows = ShardWindows(shard, 2)
    batches = PackedBatchSampler(lengths, max_positions=2000, windows=windows)(0)
    spans = [np.ptp([n for n, batch in enumerate(batches) if (shard[batch] == one).any()]) for one in range(20)]
    assert max(spans) <= np.ceil(len(batches) / 10) + 1


@settings(deadline=None, max_examples=80)
@given(ITEMS, st.integers(0, 200), st.floats(0.1, 2.5), st.booleans())
def test_a_mix_has_as_many_batches_every_epoch(lengths: list[int], spare: int, weight: float, windowed: bool) -> None:
    source = np.arange(len(lengths)) % 2 if len(lengths) > 1 else np.zeros(1, int)
    mixture = Mix(source, (1.0, weight)[: int(source.max()) + 1])
    windows = ShardWindows(np.arange(len(lengths)) // 4, 2) if windowed else None
    budget = max(lengths) + spare
    plan = PackedBatchSampler(np.array(lengths), max_positions=budget, seed=2, mix=mixture, windows=windows)
    for epoch in range(3):
        batches = plan(epoch)
        assert len(batches) == plan.batches
        visited = np.array([item % len(lengths) for batch in batches for item in batch])
        assert np.bincount(source[visited], minlength=len(mixture.weights)).tolist() == mixture.samples()
        assert max(sum(lengths[item % len(lengths)] for item in batch) for batch in batches) <= budget
        assert all(batch for batch in batches)


def test_how_full_batches_are_is_known() -> None:
    lengths = np.full(100, 60)
    tight, wide = PackedBatchSampler(lengths, max_positions=100), PackedBatchSampler(lengths, max_positions=6000)
    for plan, budget in ((tight, 100), (wide, 6000)):
        assert plan.filled == pytest.approx(np.mean([lengths[batch].sum() for batch in plan(0)]) / budget)
    assert tight.filled < 0.7 < wide.filled
