"""Every cut exactly once an epoch, or as often as a mix says: counted over ranks, workers and orders."""

from __future__ import annotations

import itertools
import multiprocessing
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus
from kalle.data.latents.waves import WaveShardConfig, write_wave_shards
from kalle.data.loading import datamodules
from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule
from kalle.data.loading.samplers import ConstantSampler, FixedSizeBatchSampler, RankSampler, even_out, one_each
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.text.tokenizer import Tokenizer

MakeCuts = Callable[..., list[Any]]
BIG = [1500 + 517 * n for n in range(17)]
SMALL = [2000 + 701 * n for n in range(5)]
MODES: dict[str, dict[str, Any]] = {
    "items": {},
    "shards": {"shuffle": "shards", "window_shards": 2},
    "mix": {"mix": "equal"},
    "mix by shards": {"mix": "equal", "shuffle": "shards", "window_shards": 2},
}


@pytest.fixture
def folders(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> Path:
    """Latents and waves of a larger and a smaller corpus."""
    torch.set_num_threads(1)
    for name, lengths in (("a", BIG), ("b", SMALL)):
        splits = {"train": make_cuts(lengths, name), "valid": make_cuts([3000], f"{name}v")}
        encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=3)), splits, tmp_path / f"latents-{name}")
        write_wave_shards(splits, tmp_path / f"waves-{name}", WaveShardConfig(items=3))
    return tmp_path


def module(folders: Path, kind: str, mode: str, workers: int = 0) -> Any:
    names = ["a", "b"] if "mix" in mode else ["a"]
    paths: Any = [str(folders / f"{kind}-{name}") for name in names]
    if kind == "latents":
        return LMDataModule(paths, Tokenizer.bytes(), 200, buckets=3, seed=5, num_workers=workers, **MODES[mode])
    return FlowVAEDataModule(
        paths, 1600, 3, hop_length=160, gap_seconds=(0.01, 0.02), seed=5, num_workers=workers, **MODES[mode]
    )  # fmt: skip


def epoch_of(data: Any, epoch: int, rank: int, world_size: int, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(datamodules, "rank_and_world_size", lambda: (rank, world_size))
    loader = data.train_dataloader()
    assert loader.sampler.repeated == 0
    loader.sampler.set_epoch(epoch)
    batches = list(loader)
    assert len(batches) == len(loader)
    return batches


def expected(kind: str, mode: str) -> Counter[str]:
    """Visits of each cut of ``a`` in an epoch without a mix."""
    assert "mix" not in mode
    return Counter({f"a{n:03d}": 1 if kind == "latents" else -(-length // 1600) for n, length in enumerate(BIG)})


def check_epoch(kind: str, mode: str, names: list[str]) -> None:
    seen = Counter(names)
    if "mix" not in mode:
        assert seen == expected(kind, mode)
        return
    of_b = {name: count for name, count in seen.items() if name.startswith("b")}
    per_item = {f"b{n:03d}": 1 if kind == "latents" else -(-length // 1600) for n, length in enumerate(SMALL)}
    assert of_b == per_item, "the whole of the smaller one"
    assert sum(seen.values()) == 2 * sum(of_b.values()), "and as much of the larger one"
    limit = {f"a{n:03d}": 1 if kind == "latents" else -(-length // 1600) for n, length in enumerate(BIG)}
    assert all(count <= limit[name] for name, count in seen.items() if name.startswith("a"))


def flat(batches: list[Any]) -> list[str]:
    return [name for batch in batches for name in batch.cut_ids]


def content(batch: Any) -> bytes:
    tensor = batch.wav if hasattr(batch, "wav") else batch.latents
    return bytes(tensor.numpy().tobytes())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["latents", "waves"])
def test_every_cut_once_over_ranks(folders: Path, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for world_size, epoch in itertools.product((1, 2, 3), (0, 1)):
        ranks = [epoch_of(module(folders, kind, mode), epoch, rank, world_size, monkeypatch) for rank in range(world_size)]
        assert len({len(batches) for batches in ranks}) == 1, "equally many steps"
        check_epoch(kind, mode, [name for batches in ranks for name in flat(batches)])


@pytest.mark.parametrize("mode", ["mix", "mix by shards"])
@pytest.mark.parametrize("kind", ["latents", "waves"])
def test_a_mix_is_fresh_every_epoch_and_of_constant_length(folders: Path, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    epochs = [epoch_of(module(folders, kind, mode), epoch, 0, 1, monkeypatch) for epoch in range(6)]
    assert len({len(batches) for batches in epochs}) == 1
    chosen = [frozenset(Counter(name for name in flat(batches) if name.startswith("a")).items()) for batches in epochs]
    assert len(set(chosen)) > 3
    again = epoch_of(module(folders, kind, mode), 2, 0, 1, monkeypatch)
    assert list(map(content, again)) == list(map(content, epochs[2]))


@pytest.mark.parametrize("mode", ["shards", "mix by shards"])
@pytest.mark.parametrize("kind", ["latents", "waves"])
def test_resume_in_the_middle_of_any_order(folders: Path, kind: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = epoch_of(module(folders, kind, mode), 3, 0, 1, monkeypatch)
    loader = module(folders, kind, mode).train_dataloader()
    loader.load_state_dict({"epoch": 3, "delivered": 2, "world_size": 1})
    assert list(map(content, loader)) == list(map(content, whole[2:]))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["latents", "waves"])
def test_every_cut_once_over_ranks_and_workers(
    folders: Path, kind: str, mode: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    for world_size in (1, 2, 3):
        ranks = [epoch_of(module(folders, kind, mode, workers), 1, rank, world_size, monkeypatch) for rank in range(world_size)]
        check_epoch(kind, mode, [name for batches in ranks for name in flat(batches)])
        for rank, batches in enumerate(ranks):
            alone = epoch_of(module(folders, kind, mode), 1, rank, world_size, monkeypatch)
            assert list(map(content, batches)) == list(map(content, alone)), "workers change nothing"


def one_rank(rank: int, world_size: int, store: str, folders: Path, kind: str, mode: str, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    loader = module(folders, kind, mode, workers=1).train_dataloader()
    loader.sampler.set_epoch(2)
    results.put((rank, [list(batch.cut_ids) for batch in loader]))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "mode"), [("latents", "mix by shards"), ("waves", "items")])
def test_real_processes_share_an_epoch(folders: Path, kind: str, mode: str) -> None:
    context = multiprocessing.get_context("spawn")
    results: Any = context.Queue()
    arguments = (3, str(folders / "store"), folders, kind, mode, results)
    processes = [context.Process(target=one_rank, args=(rank, *arguments)) for rank in range(3)]
    for process in processes:
        process.start()
    ranks = [results.get(timeout=240) for _ in processes]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len({len(batches) for _, batches in ranks}) == 1
    check_epoch(kind, mode, [name for _, batches in ranks for batch in batches for name in batch])


batch_lists = st.lists(st.integers(1, 6), min_size=1, max_size=12).map(
    lambda sizes: [list(range(start, start + size)) for start, size in zip(itertools.accumulate([0, *sizes]), sizes, strict=False)]
)


@given(batch_lists, st.integers(1, 7))
def test_evening_out_halves_before_it_repeats(batches: list[list[int]], world_size: int) -> None:
    body, tail, repeated = even_out(batches, world_size)
    evened = [*body, *tail]
    items = sum(map(len, batches))
    assert len(evened) % world_size == 0
    assert len(evened) - len(batches) < world_size
    assert all(evened)
    counts = Counter(itertools.chain.from_iterable(evened))
    assert set(counts) == set(range(items))
    assert counts.total() - items == repeated == max(0, -(-len(batches) // world_size) * world_size - items)


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 4), st.integers(0, 2))
def test_ranks_are_disjoint(count: int, size: int, world_size: int, epoch: int) -> None:
    seen: list[int] = []
    for rank in range(world_size):
        sampler = RankSampler(FixedSizeBatchSampler(count, size, seed=1), rank=rank, world_size=world_size)
        sampler.set_epoch(epoch)
        seen += [visit.item for batch in sampler for visit in batch]
    steps = -(-len(FixedSizeBatchSampler(count, size)(0)) // world_size)
    assert len(seen) - count == max(0, steps * world_size - count)
    assert set(seen) == set(range(count))


@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.integers(1, 6))
def test_every_rank_has_something_to_validate(sizes: list[int], world_size: int) -> None:
    numbers = iter(range(sum(sizes)))
    batches = [list(itertools.islice(numbers, size)) for size in sizes]
    if sum(sizes) < world_size:
        with pytest.raises(UserError, match=f"got {sum(sizes)} utterances for {world_size} processes"):
            one_each(batches, world_size, "valid")
        return
    dealt = one_each(batches, world_size, "valid")
    assert len(dealt) >= min(world_size, len(batches))
    assert all(ConstantSampler(dealt, rank=rank, world_size=world_size) for rank in range(world_size))
    assert sorted(itertools.chain(*dealt)) == list(range(sum(sizes))), "each utterance once, none twice"
    if len(batches) >= world_size:
        assert dealt == batches
