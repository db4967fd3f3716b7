from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalle.data.latents import shards
from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus
from kalle.data.latents.shards import index_name, read_items
from kalle.data.latents.storage import Folder
from kalle.data.latents.table import Member, Ragged, Texts, array_of, joined_tables
from kalle.data.loading.samplers import BudgetBatchSampler, FixedSizeBatchSampler, ShardWindows
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.speaker import SpeakerMel

MakeCuts = Callable[..., list[Any]]


@pytest.fixture
def folder(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> Path:
    encoder = CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2, speaker_mels=True), SpeakerMel())
    encode_corpus(encoder, {"train": make_cuts([3000 + 500 * n for n in range(5)]), "valid": make_cuts([4000], "v")}, tmp_path / "out")
    return tmp_path / "out"


def facts(folder: Path) -> list[Any]:
    return [
        (i.id, i.text, i.speaker, i.language, i.frames, {f: (m.name, m.offset, m.size, m.load().tobytes()) for f, m in i.members.items()})
        for i in read_items(folder, "train")
    ]  # fmt: skip


def test_the_index_says_what_the_shards_say(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    plain = shards.tar_members
    monkeypatch.setattr(shards, "tar_members", lambda root, name: (calls.append(name), plain(root, name))[1])
    indexed = facts(folder)
    assert not calls, "no shard is opened when there is an index"
    (folder / index_name("train")).unlink()
    assert facts(folder) == indexed
    assert len(calls) == 2 * 3
    assert [(item[0], item[3]) for item in indexed] == [(f"c{n:03d}", "en") for n in range(5)]


@pytest.mark.parametrize("damage", ["of other shards", "torn", "of another version"])
def test_an_index_that_does_not_fit_is_not_used(folder: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    indexed, path = facts(folder), folder / index_name("train")
    content = path.read_bytes()
    if damage == "of other shards":
        path.write_bytes((folder / index_name("valid")).read_bytes())
    elif damage == "torn":
        path.write_bytes(content[:-40])
    else:
        path.write_bytes(content.replace(b'\\"version\\": 2', b'\\"version\\": 7'))
    assert facts(folder) == indexed
    assert "does not fit the shards; reading them instead" in caplog.text


def test_encoding_again_adds_a_missing_index(folder: Path, make_cuts: MakeCuts, tiny_flowvae: FlowVAE) -> None:
    before = (folder / index_name("train")).read_bytes()
    (folder / index_name("train")).unlink()
    encoder = CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2, speaker_mels=True), SpeakerMel())
    encode_corpus(encoder, {"train": make_cuts([3000 + 500 * n for n in range(5)]), "valid": make_cuts([4000], "v")}, folder)
    assert (folder / index_name("train")).read_bytes() == before


def test_an_item_costs_little_more_than_its_strings(folder: Path) -> None:
    table = read_items(folder, "train")
    strings = len(table.ids.rows.values) + len(table.texts.rows.values)
    assert table.nbytes - strings <= (2 * 8 + 4 * 4 + 2 * (8 + 4)) * len(table) + 16


def test_tables_are_taken_and_joined(folder: Path) -> None:
    train, valid = read_items(folder, "train"), read_items(folder, "valid")
    keep = np.array([True, False, True, False, True])
    both = joined_tables([train.take(keep), valid])
    assert [item.id for item in both] == ["c000", "c002", "c004", "v000"]
    assert [item.speaker for item in both] == ["a", "a", "a", "a"]
    assert [item.text for item in both[1:]] == [train[2].text, train[4].text, valid[0].text]
    assert both[3].latents.load().tobytes() == valid[0].latents.load().tobytes()
    assert both.shard.tolist() == [0, 1, 2, 3]
    assert both[-1].id == "v000"
    with pytest.raises(IndexError):
        both[4]


def test_strings_survive_columns() -> None:
    strings = ["", "abc", "äß 好", "x\ny", ""]
    texts = Texts.of(strings)
    assert list(texts) == strings
    assert texts[1:3] == strings[1:3]
    assert texts[-2] == "x\ny"
    assert list(Texts(Ragged.joined([texts.rows, texts.rows.take(np.array([0, 1, 1, 0, 0], bool))]))) == [*strings, "abc", "äß 好"]


@pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 and so on", b"\x93NUMPY\x01\x00\x10\x00{'descr': '<f2'}", b"\x93NUMPY\x01\x00\x02\x00{}"]
)
def test_what_is_no_array_is_refused(content: bytes) -> None:
    with pytest.raises(UserError, match=r"unreadable array in 'x.tar'"):
        array_of(bytearray(content), "x.tar")


def test_manifest_errors_name_the_file(folder: Path) -> None:
    (folder / index_name("train")).unlink()
    (folder / "train" / "cuts.000001.jsonl.gz").write_bytes(b"no gzip")
    with pytest.raises(UserError, match=r"unreadable manifest: .*cuts.000001"):
        read_items(folder, "train")


def test_a_member_reads_its_bytes(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.arange(6, dtype=np.float16).reshape(2, 3))
    size = (tmp_path / "x.npy").stat().st_size
    member = Member(Folder(tmp_path), "x.npy", 0, size)
    assert member.load().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert json.dumps(member.folder.where("x.npy")) == json.dumps(str(tmp_path / "x.npy"))


def windows_touched(batches: Any, shard: np.ndarray) -> list[int]:
    """For each shard, from its first to its last batch, how many batches pass."""
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for number, batch in enumerate(batches):
        for index in batch:
            first.setdefault(int(shard[index]), number)
            last[int(shard[index])] = number
    return [last[key] - first[key] + 1 for key in first]


def test_a_shard_is_read_within_its_window() -> None:
    generator = np.random.default_rng(0)
    shard = np.repeat(np.arange(40, dtype=np.int32), 25)
    audio, text = generator.integers(5, 60, 1000), generator.integers(3, 20, 1000)
    options: dict[str, Any] = {"max_positions": 400, "buckets": 4, "seed": 2}
    items = BudgetBatchSampler(text, audio, **options)
    shards = BudgetBatchSampler(text, audio, windows=ShardWindows(shard, 4), **options)
    for epoch in range(3):
        batches = shards(epoch)
        assert sorted(index for batch in batches for index in batch) == list(range(1000))
        assert len(batches) == len(items(epoch)), "windows change the order and no number"
        assert max(windows_touched(batches, shard)) <= len(batches) / 10 * 2 + 4, "its window, and the one that takes what is carried"
        assert max(windows_touched(items(epoch), shard)) > len(batches) / 2
    order = [next(iter(dict.fromkeys(int(shard[index]) for index in batch))) for batch in shards(0)]
    assert order != [next(iter(dict.fromkeys(int(shard[index]) for index in batch))) for batch in shards(1)]
    fixed = FixedSizeBatchSampler(1000, 8, seed=1, windows=ShardWindows(shard, 4))
    assert sorted(index for batch in fixed(1) for index in batch) == list(range(1000))
    assert len({int(shard[index]) for batch in fixed(1)[:12] for index in batch}) == 4
