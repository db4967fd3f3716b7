from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalle.checkpoint import read_json, write_json
from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus
from kalle.data.latents.mix import Mix, MixPart, apportioned, mix_parts, mixed_info, weights_of
from kalle.data.loading.datamodules import LMDataModule
from kalle.data.loading.samplers import BudgetBatchSampler, FixedSizeBatchSampler, ShardWindows
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.text.tokenizer import Tokenizer

MakeCuts = Callable[..., list[Any]]


@given(st.integers(0, 500), st.lists(st.integers(0, 50), min_size=1, max_size=8))
def test_apportioning_is_whole_and_near(total: int, sizes: list[int]) -> None:
    counts = apportioned(total, sizes)
    assert sum(counts) == (total if sum(sizes) else 0)
    assert all(abs(count - total * size / sum(sizes)) < 1 for count, size in zip(counts, sizes, strict=True) if sum(sizes))


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 40), st.integers(0, 2)), min_size=3, max_size=80),
    st.tuples(*[st.sampled_from([0.1, 0.5, 1.0, 1.5, 2.0, 3.3])] * 3),
    st.booleans(),
)
def test_a_mixed_epoch_holds_what_the_weights_say(items: list[tuple[int, int, int]], weights: tuple[float, ...], shards: bool) -> None:
    text, audio, source = np.array(items, dtype=np.int64).T
    windows = ShardWindows(np.arange(len(items), dtype=np.int32) // 5, 2) if shards else None
    mixture = Mix(source, weights)
    plan = BudgetBatchSampler(text, audio, max_positions=120, buckets=4, seed=1, mix=mixture, windows=windows)
    lengths = set()
    for epoch in range(3):
        batches = plan(epoch)
        lengths.add(len(batches))
        visits = [visit for batch in batches for visit in batch]
        assert len(set(visits)) == len(visits), "a repetition is another visit"
        times = Counter(visit % len(items) for visit in visits)
        for number, weight in enumerate(weights):
            members = np.flatnonzero(source == number)
            expected = max(1, round(weight * len(members))) if len(members) else 0
            assert sum(times[index] for index in members.tolist()) == expected
            if len(members) * weight >= 1 and float(weight).is_integer():
                assert {times[index] for index in members.tolist()} == {int(weight)}
        for batch in batches:
            inside = [visit % len(items) for visit in batch]
            assert len(batch) * (text[inside].max() + audio[inside].max()) <= 120
    assert len(lengths) == 1, "the trainer asks for the number of batches only once"


def test_a_long_tail_of_a_small_share_has_its_turn() -> None:
    lengths = np.concatenate([np.full(400, 20), np.array([100, 200, 300, 400, 500])])
    mixture = Mix(np.zeros(len(lengths), np.int64), (0.1,))
    plan = BudgetBatchSampler(np.ones_like(lengths), lengths, max_positions=600, buckets=4, seed=1, mix=mixture)
    seen = {visit % len(lengths) for epoch in range(200) for batch in plan(epoch) for visit in batch}
    assert seen == set(range(len(lengths))), "a group of one would be left out of every epoch"


def test_over_epochs_every_item_has_its_turn() -> None:
    source = np.array([0] * 10 + [1] * 100)
    plan = FixedSizeBatchSampler(110, 4, seed=3, mix=Mix(source, (1.0, 0.1)))
    seen = [index for epoch in range(200) for batch in plan(epoch) for index in batch]
    times = np.bincount(seen, minlength=110)
    assert (times[:10] == 200).all()
    assert times[10:].min() > 5
    assert times[10:].max() < 45
    assert times[10:].sum() == 2000


def test_weights() -> None:
    two = (MixPart("a"), MixPart("b"))
    assert weights_of(two, [10, 40]) == (1.0, 1.0)
    assert weights_of(two, [10, 40], "equal") == (1.0, 0.25)
    assert weights_of((MixPart("a", weight=2.5), MixPart("b")), [10, 40]) == (2.5, 1.0)
    assert weights_of((MixPart("a", share=0.2), MixPart("b", share=0.8)), [10, 20]) == pytest.approx((0.5, 1.0))
    with pytest.raises(UserError, match=r"nothing of 'b'"):
        weights_of(two, [10, 0], "equal")


@pytest.mark.parametrize(
    ("value", "mix", "message"),
    [
        ([], None, "empty list"),
        (["a", "a"], None, "'a' twice"),
        ([{"path": "a", "weight": 0}], None, "weight=0 for 'a'"),
        ([{"path": "a", "weight": True}], None, "weight=True"),
        ([{"path": "a", "wieght": 1}], None, "expected a folder"),
        ([{"weight": 1}], None, "expected a folder"),
        ([{"path": "a", "weight": 1, "share": 0.5}], None, "a weight and a share"),
        ([{"path": "a", "share": 0.5}, "b"], None, r"shares \[0.5\] for 2 folders"),
        ([{"path": "a", "share": 0.5}, {"path": "b", "share": 0.6}], None, "1 in sum"),
        (["a", "b"], "even", "data.mix: got 'even'"),
        ([{"path": "a", "weight": 2}, "b"], "equal", "leave one of them out"),
    ],
)
def test_mistakes(value: Any, mix: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        mix_parts(value, "data.latents", mix)


@pytest.fixture
def two(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> list[str]:
    encoder = CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=3))
    splits = {"train": make_cuts([2000, 4000, 6000, 2600, 3300], "a"), "valid": make_cuts([3000], "v")}
    encode_corpus(encoder, splits, tmp_path / "a")
    encode_corpus(encoder, {"train": make_cuts([5000, 2500], "b")}, tmp_path / "b")
    return [str(tmp_path / "a"), str(tmp_path / "b")]


def lm(latents: Any, **options: Any) -> LMDataModule:
    return LMDataModule(latents, Tokenizer.bytes(), 200, buckets=2, seed=5, **options)


def epoch_of(data: LMDataModule, epoch: int) -> list[Any]:
    loader = data.train_dataloader()
    loader.sampler.set_epoch(epoch)  # type: ignore[attr-defined]
    return list(loader)


def test_a_list_without_weights_is_one_corpus(two: list[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        names = Counter(name for batch in epoch_of(lm(two), 0) for name in batch.cut_ids)
    assert names == Counter({"a000": 1, "a001": 1, "a002": 1, "a003": 1, "a004": 1, "b000": 1, "b001": 1})
    assert f"5 of the 5 utterances of '{two[0]}'; 2 of the 2 utterances of '{two[1]}'" in caplog.text
    assert [batch.cut_ids for batch in lm(two).val_dataloader()] == [("v000",)], "only one of them has the split"


def test_a_repeated_item_is_sampled_anew(two: list[str]) -> None:
    data = lm([two[0], {"path": two[1], "weight": 2}])
    rows = [
        (name, batch.latents[row, :5].numpy().tobytes()) for batch in epoch_of(data, 0) for row, name in enumerate(batch.cut_ids)
    ]  # fmt: skip
    assert Counter(name for name, _ in rows)["b000"] == 2
    assert len({noise for name, noise in rows if name == "b000"}) == 2
    plain = {name: b.latents[row, :5].numpy().tobytes() for b in epoch_of(lm(two), 0) for row, name in enumerate(b.cut_ids)}
    assert plain["b000"] in {noise for name, noise in rows if name == "b000"}, "the first visit is that of the plain corpus"


def test_statistics_are_those_of_a_frame_of_the_mix(two: list[str]) -> None:
    frames, weights = [], []
    data = lm([two[0], {"path": two[1], "weight": 3}])
    for item in data.dataset("train").items:
        stored = item.latents.load().astype(np.float64)
        frames.append(stored)
        weights += [3.0 if item.id.startswith("b") else 1.0] * len(stored)
    both, parts = np.concatenate(frames), np.array(weights) / np.sum(weights)
    mean = parts @ both[:, :4]
    variance = parts @ (np.exp(2 * both[:, 4:]) + both[:, :4] ** 2) - mean**2
    info = data.info()
    np.testing.assert_allclose(info["mean"], mean, rtol=1e-9)
    np.testing.assert_allclose(info["std"], np.sqrt(variance), rtol=1e-9)
    assert info["encoder_hash"] == read_json(Path(two[0], "info.json"))["encoder_hash"]
    assert lm(two[0]).info() == read_json(Path(two[0], "info.json"))
    assert mixed_info([read_json(Path(two[1], "info.json"))], [7.0])["mean"] == read_json(Path(two[1], "info.json"))["mean"]


@pytest.mark.parametrize(("key", "value"), [("encoder_hash", "0" * 64), ("latent_dim", 8), ("sample_rate_hz", 24000), ("hop_length", 320)])
def test_folders_of_different_encoders_do_not_mix(two: list[str], key: str, value: Any) -> None:
    path = Path(two[1], "info.json")
    write_json(path, read_json(path) | {key: value})
    with pytest.raises(UserError, match=f"do not mix: {key} is"):
        lm(two).train_dataloader()


def test_batches_equal_the_padded_samples_of_each_item(two: list[str]) -> None:
    from torch.nn.utils.rnn import pad_sequence

    from kalle.seeds import standard_noise

    data = lm(two[0])
    items = {item.id: index for index, item in enumerate(data.dataset("train").items)}
    for batch in epoch_of(data, 4):
        posteriors = [data.dataset("train").posterior(items[name]) for name in batch.cut_ids]
        samples = [
            p.sample(standard_noise(p.mean.shape, "posterior", 5, 4, name)) for p, name in zip(posteriors, batch.cut_ids, strict=True)
        ]
        assert torch.equal(batch.latents, pad_sequence(samples, batch_first=True))
        assert torch.equal(batch.posterior.mean, pad_sequence([p.mean for p in posteriors], batch_first=True))
