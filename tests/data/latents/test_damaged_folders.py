"""Our own files when they are damaged: the command makes them anew, or says so in one line."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
from lhotse.cut import MonoCut
from safetensors import safe_open
from safetensors.numpy import save

from kalle.data.corpus.items import PrepareOptions
from kalle.data.corpus.lists import read_folder
from kalle.data.corpus.prepare import prepare_corpus
from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus
from kalle.data.latents.shards import read_items
from kalle.data.latents.storage import Folder
from kalle.data.latents.table import array_of
from kalle.data.latents.waves import ShardWaves, WaveShardConfig, write_wave_shards
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE

MakeCuts = Callable[..., list[MonoCut]]
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "noise": lambda content: bytes(255 - byte for byte in content),
    "deep": lambda content: b'{"a": ' + b"[" * 50_000,
    "digits": lambda content: b'{"total_frames": ' + b"9" * 5000 + b"}",
    "another object": lambda content: b'{"splits": {"train": {}}, "fingerprint": 3, "bytes": []}',
    "a list": lambda content: b"[1, 2]",
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_or_problem(read: Callable[[], object]) -> object:
    try:
        return read()
    except UserError as error:
        return error


def is_line(found: object) -> bool:
    return isinstance(found, UserError) and "\n" not in str(found) and len(str(found)) < 600


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_corpus_is_prepared_anew(tmp_path: Path, damage: str) -> None:
    for n in range(4):
        noise = (0.1 * np.random.default_rng(n).standard_normal((8000, 1 + n % 2))).clip(-0.9, 0.9)
        (tmp_path / "in").mkdir(exist_ok=True)
        soundfile.write(tmp_path / "in" / f"{n}.wav", noise, 16000)
        (tmp_path / "in" / f"{n}.txt").write_text(f"prompt {n}")
    source, out = read_folder(tmp_path / "in"), tmp_path / "out"
    prepare_corpus(source, out, PrepareOptions())
    whole = contents(out)
    for name in whole:
        if not name.startswith("audio"):
            (out / name).write_bytes(DAMAGES[damage](whole[name]))
            assert not prepare_corpus(source, out, PrepareOptions()).unchanged, name
            assert contents(out) == whole, name
    assert prepare_corpus(source, out, PrepareOptions()).unchanged


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_journal_is_dropped(tmp_path: Path, damage: str) -> None:
    (tmp_path / "in").mkdir()
    for n in range(3):
        soundfile.write(tmp_path / "in" / f"{n}.wav", 0.1 * np.sin(np.arange(8000) / 9), 16000)
        (tmp_path / "in" / f"{n}.txt").write_text(f"prompt {n}")
    source, out = read_folder(tmp_path / "in"), tmp_path / "out"

    def stop(items: list) -> list:
        yield from items[:2]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(source, out, PrepareOptions(), stop)
    journal = out / "journal.jsonl"
    first, *rest = journal.read_bytes().split(b"\n")
    journal.write_bytes(b"\n".join([first, DAMAGES[damage](rest[0]), *rest]))
    assert prepare_corpus(source, out, PrepareOptions()).report["kept"] == 3


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_latent_folder_is_encoded_anew_or_named(tmp_path: Path, make_cuts: MakeCuts, tiny_flowvae: FlowVAE, damage: str) -> None:
    encoder, cuts = CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2)), {"train": make_cuts([1600, 2400, 3200])}
    out = tmp_path / "latents"
    encode_corpus(encoder, cuts, out)
    whole = contents(out)
    for name in whole:
        (out / name).write_bytes(DAMAGES[damage](whole[name]))
        found = read_or_problem(lambda: list(read_items(out, "train").texts))
        assert found == [cut.supervisions[0].text for cut in cuts["train"]] or is_line(found), name
        if damage == "noise" and name.startswith("train/"):  # of the same size: only reading tells
            (out / name).unlink()
        encode_corpus(encoder, cuts, out)
        assert contents(out) == {**whole, ".completed": (out / ".completed").read_bytes()}, name


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_of_wave_shards_is_written_anew_or_named(tmp_path: Path, make_cuts: MakeCuts, damage: str) -> None:
    cuts, out, config = {"train": make_cuts([1600, 2400, 3200])}, tmp_path / "waves", WaveShardConfig(items=2)
    write_wave_shards(cuts, out, config)
    whole = contents(out)
    for name in whole:
        (out / name).write_bytes(DAMAGES[damage](whole[name]))
        found = read_or_problem(lambda: len(ShardWaves(Folder(out), "train", 16000).audio(0)))
        assert found == 1600 or is_line(found), name
        if damage == "noise" and name.startswith("train/"):
            (out / name).unlink()
        write_wave_shards(cuts, out, config)
        assert contents(out) == {**whole, ".completed": (out / ".completed").read_bytes()}, name


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("speaker", lambda column: column + 99),
        ("language", lambda column: column - 99),
        ("shard", lambda column: column + 99),
        ("frames", lambda column: -column),
        ("latents.offset", lambda column: -column - 1),
        ("latents.size", lambda column: column.astype(np.float32)),
    ],
)
def test_an_index_that_points_outside_is_not_used(toy_latents: Path, tmp_path: Path, name: str, change: Callable) -> None:
    folder = tmp_path / "latents"
    shutil.copytree(toy_latents, folder)
    path = folder / "index.train.safetensors"
    with safe_open(path, "np") as file:
        metadata, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    path.write_bytes(save(arrays | {name: change(arrays[name])}, metadata))
    found, whole = read_items(folder, "train"), read_items(toy_latents, "train")
    assert [(item.id, item.text, item.speaker, item.frames) for item in found] == [
        (item.id, item.text, item.speaker, item.frames) for item in whole
    ]
    assert np.array_equal(found[1].latents.load(), whole[1].latents.load())


def test_a_text_of_the_index_that_is_no_text_is_named(toy_latents: Path, tmp_path: Path) -> None:
    shutil.copytree(toy_latents, tmp_path / "latents")
    path = tmp_path / "latents" / "index.train.safetensors"
    with safe_open(path, "np") as file:
        metadata, arrays = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
    path.write_bytes(save(arrays | {"texts": np.full_like(arrays["texts"], 0xFF)}, metadata))
    assert is_line(read_or_problem(lambda: read_items(tmp_path / "latents", "train")[0]))


@pytest.mark.parametrize(("offset", "size"), [(0, 2**40), (2**40, 10), (-5, 10), (0, -10)])
def test_a_place_that_a_shard_does_not_have_is_named(toy_latents: Path, offset: int, size: int) -> None:
    name = next(path.name for path in (toy_latents / "train").glob("*.tar"))
    assert is_line(read_or_problem(lambda: Folder(toy_latents).read_range(f"train/{name}", offset, size)))


@pytest.mark.parametrize("value", [np.array(["text"]), np.arange(4), np.zeros((2, 2), np.complex64), np.array([b"x"])])
def test_an_array_of_anything_but_fractions_is_named(value: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, value)
    assert is_line(read_or_problem(lambda: array_of(bytearray(buffer.getvalue()), "a.npy")))
