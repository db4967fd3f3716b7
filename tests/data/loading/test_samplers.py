from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalle.data.loading.samplers import BudgetBatchSampler, ConstantSampler, FixedSizeBatchSampler, RankSampler, equal_buckets
from kalle.seeds import derived_seed, standard_noise

items = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=80)


def budget_plan(pairs: list[tuple[int, int]], max_positions: int = 120, **options: object) -> BudgetBatchSampler:
    text, audio = np.array(pairs, dtype=np.int64).T
    return BudgetBatchSampler(text, audio, max_positions=max_positions, **options)  # type: ignore[arg-type]


@given(items, st.integers(1, 12), st.integers(0, 3), st.sampled_from([None, 1, 3]))
def test_budget_is_kept_and_every_item_comes_once(pairs: list[tuple[int, int]], buckets: int, epoch: int, max_items: int | None) -> None:
    plan = budget_plan(pairs, buckets=buckets, max_items=max_items, seed=7)
    batches = plan(epoch)
    assert sorted(index for batch in batches for index in batch) == list(range(len(pairs)))
    for batch in batches:
        padded = max(pairs[i][0] for i in batch) + max(pairs[i][1] for i in batch)
        assert len(batch) * padded <= 120
        assert max_items is None or len(batch) <= max_items
    assert len(batches) == len(plan(epoch + 1)), "the trainer asks for the number of batches only once"


@given(items, st.integers(1, 12))
def test_buckets_partition_by_length(pairs: list[tuple[int, int]], buckets: int) -> None:
    lengths = np.array([sum(pair) for pair in pairs])
    groups = equal_buckets(lengths, buckets)
    assert 1 <= len(groups) <= buckets
    assert sorted(np.concatenate(groups).tolist()) == list(range(len(pairs)))
    for before, after in itertools.pairwise(groups):
        assert lengths[before].max() <= lengths[after].min()


def test_bucketing_saves_padding() -> None:
    generator = np.random.default_rng(0)
    pairs = [(int(n), int(2 * n)) for n in generator.integers(1, 40, 400)]

    def padding(plan: BudgetBatchSampler) -> float:
        batches = plan(0)
        padded = sum(len(b) * (max(pairs[i][0] for i in b) + max(pairs[i][1] for i in b)) for b in batches)
        return 1 - sum(map(sum, pairs)) / padded

    assert padding(budget_plan(pairs, 1000, buckets=10)) < 0.15 < 0.3 < padding(budget_plan(pairs, 1000, buckets=1))


@pytest.mark.parametrize("items", [3, 20, 40])
def test_few_items_that_fit_into_one_batch_are_one(items: int) -> None:
    """Thirty buckets would make each of them a batch."""
    assert len(budget_plan([(20, 40 + 5 * number) for number in range(items)], 24000, buckets=30)(0)) == 1


def test_a_long_tail_does_not_become_batches_of_one() -> None:
    lengths = np.random.default_rng(0).integers(10, 60, 4000).tolist() + np.random.default_rng(1).integers(100, 900, 20).tolist()
    batches = budget_plan([(1, int(n)) for n in lengths], 1000, buckets=16)(0)
    alone = sum(len(batch) == 1 and lengths[batch[0]] < 450 for batch in batches)
    assert alone <= 3, f"{alone} utterances of less than half the budget are batches of their own"


def test_batches_of_a_bucket_are_nearly_equal() -> None:
    sizes = [len(batch) for batch in budget_plan([(10, 10)] * 25, 240, buckets=1)(0)]
    assert sorted(sizes) == [8, 8, 9], "25 items of which 12 fit: not 12, 12 and a single one"


def test_order_follows_seed_and_epoch() -> None:
    pairs = [(n % 7 + 1, n % 11 + 1) for n in range(60)]
    assert budget_plan(pairs, seed=1)(2) == budget_plan(pairs, seed=1)(2)
    assert budget_plan(pairs, seed=1)(2) != budget_plan(pairs, seed=1)(3)
    assert budget_plan(pairs, seed=1)(2) != budget_plan(pairs, seed=2)(2)
    fixed = FixedSizeBatchSampler(10, 4, seed=3)
    assert sorted(itertools.chain.from_iterable(fixed(0))) == list(range(10))
    assert [len(batch) for batch in fixed(1)] == [4, 4, 2]
    assert fixed(0) != fixed(1)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2))
def test_ranks_share_an_epoch(count: int, world_size: int, epoch: int) -> None:
    samplers = [RankSampler(FixedSizeBatchSampler(count, 2, seed=1), rank=rank, world_size=world_size) for rank in range(world_size)]
    for sampler in samplers:
        sampler.set_epoch(epoch)
    per_rank = [list(sampler) for sampler in samplers]
    assert {len(batches) for batches in per_rank} == {len(samplers[0])}
    seen = [visit.item for batches in per_rank for batch in batches for visit in batch]
    assert set(seen) == set(range(count))
    batches = [batch for batches in per_rank for batch in batches]
    assert len(batches) - len(FixedSizeBatchSampler(count, 2)(0)) == samplers[0].repeated + samplers[0].split < world_size
    assert len(seen) - count == samplers[0].repeated == max(0, world_size - count), "only fewer items than ranks are repeated"
    assert all(visit.epoch == epoch for batch in batches for visit in batch)


def test_resume_in_the_middle_then_a_whole_epoch() -> None:
    sampler = RankSampler(FixedSizeBatchSampler(10, 2, seed=1))
    sampler.set_epoch(4)
    whole = list(sampler)
    state = sampler.state_dict(3)
    resumed = RankSampler(FixedSizeBatchSampler(10, 2, seed=1))
    resumed.load_state_dict(state)
    resumed.set_epoch(4)
    assert list(resumed) == whole[3:]
    resumed.set_epoch(5)
    assert len(list(resumed)) == 5


def test_resume_with_other_ranks_starts_the_epoch_anew(caplog: pytest.LogCaptureFixture) -> None:
    state = RankSampler(FixedSizeBatchSampler(10, 2)).state_dict(3)
    resumed = RankSampler(FixedSizeBatchSampler(10, 2), rank=1, world_size=2)
    resumed.load_state_dict(state)
    assert len(list(resumed)) == 3
    assert "starts anew" in caplog.text


def test_constant_sampler_ignores_epochs() -> None:
    sampler = ConstantSampler([[0, 1], [2]])
    assert not hasattr(sampler, "set_epoch")
    assert list(sampler) == list(sampler)
    assert [visit.epoch for batch in sampler for visit in batch] == [0, 0, 0]


def test_noise_depends_on_every_part() -> None:
    reference = standard_noise((50, 4), "posterior", 1, 2, "cut")
    assert torch.equal(reference, standard_noise((50, 4), "posterior", 1, 2, "cut"))
    for other in [("posterior", 2, 2, "cut"), ("posterior", 1, 3, "cut"), ("posterior", 1, 2, "cut2"), ("crop", 1, 2, "cut")]:
        assert not torch.equal(reference, standard_noise((50, 4), *other))
    assert abs(reference.std().item() - 1) < 0.2
    assert derived_seed("a", 1) != derived_seed("a", "1"), "an id that looks like a number is still an id"
