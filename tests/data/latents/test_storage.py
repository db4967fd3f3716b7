from __future__ import annotations

import functools
import http.server
import pickle
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch

from kalle.data.latents import storage
from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus
from kalle.data.latents.shards import index_name
from kalle.data.latents.storage import Folder, storage_errors
from kalle.data.latents.waves import WaveShardConfig, write_wave_shards
from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.text.tokenizer import Tokenizer

MakeCuts = Callable[..., list[Any]]


@pytest.fixture
def folders(make_cuts: MakeCuts, tiny_flowvae: FlowVAE, tmp_path: Path) -> Path:
    splits = {"train": make_cuts([2000 + 700 * n for n in range(6)]), "valid": make_cuts([3000], "v")}
    encode_corpus(CorpusEncoder(tiny_flowvae, EncodeConfig(shard_size=2)), splits, tmp_path / "up" / "latents")
    write_wave_shards(splits, tmp_path / "up" / "waves", WaveShardConfig(items=2))
    return tmp_path / "up"


class RangeHandler(http.server.SimpleHTTPRequestHandler):
    """Serves byte ranges, as object stores do, and remembers what it was asked for."""

    asked: list[tuple[str, str]]

    def do_GET(self) -> None:
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        self.asked.append((self.path, self.headers.get("Range", "")))
        path = Path(self.translate_path(self.path))
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        content = path.read_bytes()[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Range", f"bytes {wanted[1]}-{int(wanted[1]) + len(content) - 1}/{path.stat().st_size}")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folders: Path) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    asked: list[tuple[str, str]] = []
    handler = type("Handler", (RangeHandler,), {"asked": asked})
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(handler, directory=str(folders)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_address[1]}", asked
    running.shutdown()
    running.server_close()


def to_memory(folders: Path, name: str) -> str:
    memory = fsspec.filesystem("memory")
    url = f"memory://{folders.parent.name}/{name}"
    for path in (folders / name).rglob("*"):
        if path.is_file():
            memory.pipe_file(f"/{folders.parent.name}/{name}/{path.relative_to(folders / name)}", path.read_bytes())
    return url


def batches(folder: str | Path, kind: str, **options: Any) -> list[bytes]:
    if kind == "latents":
        data: Any = LMDataModule(folder, Tokenizer.bytes(), 200, seed=5, buckets=2, **options)
    else:
        data = FlowVAEDataModule(folder, 1600, 3, hop_length=160, gap_seconds=(0.01, 0.02), seed=5, **options)
    return [(batch.latents if kind == "latents" else batch.wav).numpy().tobytes() for batch in data.train_dataloader()]


@pytest.mark.parametrize("kind", ["latents", "waves"])
def test_a_url_gives_what_the_folder_gives(folders: Path, tmp_path: Path, kind: str, server: tuple[str, list[Any]]) -> None:
    torch.set_num_threads(1)
    here = batches(folders / kind, kind)
    for url in (to_memory(folders, kind), f"file://{folders / kind}", f"{server[0]}/{kind}"):
        assert batches(url, kind) == here
        assert batches(url, kind, cache_dir=tmp_path / "cache") == here
        assert batches(url, kind, shuffle="shards", window_shards=1) == batches(folders / kind, kind, shuffle="shards", window_shards=1)


def test_members_come_by_range_and_shards_once(folders: Path, tmp_path: Path, server: tuple[str, list[tuple[str, str]]]) -> None:
    url, asked = server
    batches(f"{url}/latents", "latents")
    tars = [span for path, span in asked if path.endswith(".tar")]
    assert len([span for span in tars if span]) == 6, "one range for each utterance"
    assert all(tars), "and no shard as a whole"
    asked.clear()
    for _ in range(2):
        batches(f"{url}/latents", "latents", cache_dir=tmp_path / "cache")
    kept = sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))
    assert kept == [f"latents.{number:06d}.tar" for number in range(3)]
    first = len([path for path, _ in asked if path.endswith(".tar")])
    asked.clear()
    batches(f"{url}/latents", "latents", cache_dir=tmp_path / "cache")
    assert not [path for path, _ in asked if path.endswith(".tar")], "the second time nothing is fetched"
    assert first >= 3
    assert not list((tmp_path / "cache").rglob("*.partial"))


def test_another_folder_at_the_same_url_is_not_taken_from_the_cache(folders: Path, tmp_path: Path) -> None:
    url = to_memory(folders, "latents")
    first = Folder(url, tmp_path / "cache").local("train/latents.000000.tar")
    fsspec.filesystem("memory").pipe_file(f"/{folders.parent.name}/latents/info.json", b'{"splits": {}}')
    assert Folder(url, tmp_path / "cache").local("train/latents.000000.tar") != first


def test_an_interrupted_download_leaves_no_shard(folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(to_memory(folders, "latents"), tmp_path / "cache")
    monkeypatch.setattr(storage, "CHUNK_BYTES", 100)
    plain = folder._fsspec()[0].open

    def torn(*arguments: Any) -> Any:
        stream = plain(*arguments)
        reads = iter([stream.read(100)])
        monkeypatch.setattr(stream, "read", lambda _: next(reads, None) or (_ for _ in ()).throw(ConnectionError("reset by peer")))
        return stream

    monkeypatch.setattr(folder._fsspec()[0], "open", torn)
    with pytest.raises(UserError, match=r"ConnectionError: reset by peer.*run the same command again"):
        folder.local("train/latents.000000.tar")
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.suffix != ".lock"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("memory://nowhere/at/all", "not a complete latent folder"),
        ("nosuchstore://bucket/x", "cannot read .*Protocol not known"),
        ("file:///nowhere/at/all", "not a complete latent folder"),
    ],
)
def test_bad_addresses(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        LMDataModule(url, Tokenizer.bytes(), 200).train_dataloader()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ImportError("Install s3fs to access S3"), "no package for 's3://b/x': Install s3fs"),
        (FileNotFoundError("b"), "nothing at 's3://b/x': no such bucket"),
        (PermissionError("Forbidden"), "no access to 's3://b/x'.*set its credentials"),
        (RuntimeError("Unable to locate credentials"), "no access to"),
        (TimeoutError(), "cannot read 's3://b/x' .TimeoutError: no explanation"),
    ],
)
def test_what_storage_clients_raise(error: Exception, message: str) -> None:
    with pytest.raises(UserError, match=message), storage_errors("s3://b/x"):
        raise error


def test_torn_and_missing_shards(folders: Path) -> None:
    data = LMDataModule(folders / "latents", Tokenizer.bytes(), 200)
    loader = data.train_dataloader()
    tar = folders / "latents" / "train" / "latents.000001.tar"
    tar.write_bytes(tar.read_bytes()[:600])
    with pytest.raises(UserError, match=r"incomplete shard: .*latents.000001.tar"):
        list(loader)
    tar.unlink()
    (folders / "latents" / index_name("train")).unlink()
    with pytest.raises(UserError, match=r"missing shard: no 'latents.000001.tar'"):
        LMDataModule(folders / "latents", Tokenizer.bytes(), 200).train_dataloader()


def test_open_files_are_few_and_do_not_travel(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "OPEN_FILES", 2)
    folder = Folder(folders / "latents")
    for _ in range(2):
        for number in range(3):
            assert folder.read_range(f"train/latents.{number:06d}.tar", 0, 4)
    assert len(folder._descriptors) == 2
    again = pickle.loads(pickle.dumps(folder))
    assert not again._descriptors
    assert again.read_range("train/latents.000000.tar", 0, 9) == folder.read_range("train/latents.000000.tar", 0, 9)


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_workers_make_their_own_clients(folders: Path, tmp_path: Path, server: tuple[str, list[Any]], cached: bool) -> None:
    options = {"cache_dir": tmp_path / "cache"} if cached else {}
    url = f"{server[0]}/latents"
    assert batches(url, "latents", num_workers=3, **options) == batches(folders / "latents", "latents")
