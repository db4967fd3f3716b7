"""Fetching from the hub: whole, checked, resumed; every refusal in one line."""

from __future__ import annotations

import fcntl
import hashlib
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import COMMIT, REPOSITORY, Hub, serve
from kalle import hub as hub_module
from kalle.errors import UserError
from kalle.hub import RECORD_NAME, download

BIG = hashlib.sha256(b"seed").digest() * 3000
FILES = {
    "model.pt": BIG,
    "flowvae.pt": BIG[:5000],
    "tokenizer/tokenizer.json": b'{"a": 1}',
    "README.md": b"# Model card",
    ".gitattributes": b"*.pt filter=lfs",
}
WEIGHTS = ("flowvae.pt", "model.pt", "tokenizer/tokenizer.json")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve(FILES) as running:
        yield running


def fetch(hub: Hub, out: Path, revision: str | None = None) -> list[str]:
    return download(REPOSITORY, out, revision, hub.endpoint, pause_seconds=0)[1]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def expected() -> dict[str, bytes]:
    return {name: FILES[name] for name in WEIGHTS}


def without_record(folder: Path) -> dict[str, bytes]:
    return {name: content for name, content in contents(folder).items() if name != RECORD_NAME}


def test_the_weights_are_fetched_and_a_second_run_fetches_nothing(hub: Hub, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    snapshot, fetched = download(REPOSITORY, tmp_path / "out", None, hub.endpoint)
    assert sorted(fetched) == sorted(WEIGHTS)
    assert snapshot.commit == COMMIT
    assert without_record(tmp_path / "out") == expected()
    assert json.loads((tmp_path / "out" / RECORD_NAME).read_text())["commit"] == COMMIT
    assert "left out: README.md, .gitattributes" in caplog.text
    assert "HTTP Request" not in caplog.text
    hub.requests.clear()
    assert fetch(hub, tmp_path / "out") == []
    assert hub.fetched() == []


def test_a_broken_connection_goes_on_where_it_broke(hub: Hub, tmp_path: Path, caplog) -> None:
    hub.cut_after["model.pt"] = [20_000, 0, 30_000]
    fetch(hub, tmp_path / "out")
    assert without_record(tmp_path / "out") == expected()
    assert hub.ranges("model.pt") == [None, "bytes=20000-", "bytes=20000-", "bytes=50000-"]
    assert "model.pt: the connection broke" in caplog.text


def test_an_interrupted_download_goes_on_in_the_next_run(hub: Hub, tmp_path: Path, caplog) -> None:
    caplog.set_level("INFO")
    hub.cut_after["model.pt"] = [20_000] + [0] * hub_module.TRIES_WITHOUT_PROGRESS
    with pytest.raises(UserError, match=r"the connection broke at 0\.0 of 0\.1 MB of 'model\.pt' .*run the same command again"):
        fetch(hub, tmp_path / "out")
    kept = [path for path in (tmp_path / "out").iterdir() if path.name.startswith("model.pt")]
    assert [path.suffix for path in kept] == [".partial"]
    assert kept[0].read_bytes() == BIG[:20_000]
    assert not (tmp_path / "out" / RECORD_NAME).exists()
    hub.requests.clear()
    fetch(hub, tmp_path / "out")
    assert hub.ranges("model.pt") == ["bytes=20000-"]
    assert "model.pt: continuing at 0.0 of 0.1 MB" in caplog.text
    assert without_record(tmp_path / "out") == expected()


def test_a_server_that_ignores_the_range_starts_over(hub: Hub, tmp_path: Path) -> None:
    hub.ignores_range = True
    hub.cut_after["model.pt"] = [20_000]
    fetch(hub, tmp_path / "out")
    assert without_record(tmp_path / "out") == expected()


def test_what_another_revision_left_is_not_continued(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "model.pt.0badc0de.partial").write_bytes(b"x" * 100)
    fetch(hub, out, "v2")
    assert hub.ranges("model.pt") == [None]
    assert (out / "model.pt").read_bytes() == BIG


def test_a_file_that_arrives_damaged_is_fetched_again(hub: Hub, tmp_path: Path, caplog) -> None:
    hub.corrupt = {"model.pt": 1, "tokenizer/tokenizer.json": 1}
    fetch(hub, tmp_path / "out")
    assert without_record(tmp_path / "out") == expected()
    for words in ("model.pt arrived damaged: its sha256 is", "tokenizer/tokenizer.json arrived damaged: its sha1 is"):
        assert words in caplog.text


def test_a_file_that_keeps_arriving_damaged_is_refused_and_not_kept(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = {"tokenizer/tokenizer.json": 9}
    with pytest.raises(UserError, match=r"'tokenizer/tokenizer\.json' arrives damaged: its sha1 is"):
        fetch(hub, tmp_path / "out")
    assert sorted(contents(tmp_path / "out")) == ["flowvae.pt", "model.pt"]
    assert not (tmp_path / "out" / "tokenizer").exists()


@pytest.mark.parametrize("name", ["model.pt", "tokenizer/tokenizer.json"])
@pytest.mark.parametrize("damage", [lambda content: content[:-3], lambda content: b"#" + content[1:]], ids=["short", "changed"])
def test_a_damaged_local_file_is_noticed_and_replaced(hub: Hub, tmp_path: Path, caplog, name: str, damage) -> None:
    fetch(hub, tmp_path / "out")
    (tmp_path / "out" / name).write_bytes(damage(FILES[name]))
    hub.requests.clear()
    assert fetch(hub, tmp_path / "out") == [name]
    assert hub.fetched() == [name]
    assert f"{name} differs from the hub's: it" in caplog.text
    assert without_record(tmp_path / "out") == expected()


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (404, {"X-Error-Code": "RepoNotFound"}, "no such repository on http://127.0.0.1"),
        (401, {}, "status 401: .*log in with"),
        (401, {"X-Error-Message": "Invalid credentials in Authorization header"}, "status 401: .*log in with"),
        (403, {"X-Error-Code": "GatedRepo"}, "accept them at http://127.0.0.1"),
        (500, {}, "status 500: .*try again later"),
    ],
)
def test_what_the_hub_refuses_is_one_line(hub: Hub, tmp_path: Path, status: int, headers: dict[str, str], words: str) -> None:
    hub.refusal = (status, headers)
    with pytest.raises(UserError, match=words) as caught:
        fetch(hub, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_what_is_not_there_is_named(hub: Hub, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'somebody/tiny' has no 'v9', expected a branch, tag or commit"):
        fetch(hub, tmp_path / "out", "v9")
    with pytest.raises(UserError, match=r"no such repository .*got 'nobody/tiny'"):
        download("nobody/tiny", tmp_path / "out", None, hub.endpoint)
    with pytest.raises(UserError, match="not a hub id: got 'a/b/c', expected OWNER/NAME"):
        download("a/b/c", tmp_path / "out", None, hub.endpoint)
    assert not (tmp_path / "out").exists()


def test_without_a_connection(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    from huggingface_hub import constants

    closed = "http://127.0.0.1:9"
    with pytest.raises(UserError, match=f"cannot reach the hub {closed} .*check the connection, or put the released files"):
        download(REPOSITORY, tmp_path / "out", None, closed)
    monkeypatch.setattr(constants, "is_offline_mode", lambda: True)
    with pytest.raises(UserError, match="offline: HF_HUB_OFFLINE is set"):
        fetch(hub, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("listing", "words"),
    [
        (b"<html>log in to the network</html>", "not a hub: .* answers with something else"),
        (b'{"id": "x", "sha": "s", "siblings": [{"rfilename": "README.md"}]}', "no weights in 'somebody/tiny': got 1 files"),
        (b'{"id": "x", "sha": "s", "siblings": [{"rfilename": "model.pt"}]}', "metadata of 'somebody/tiny' cannot be used"),
        (b'{"id": "x", "sha": "s", "siblings": [{"rfilename": "../x.pt", "size": 1, "blobId": "b"}]}', "expected a plain path"),
        (b'{"id": "x", "sha": "s", "siblings": [{"rfilename": "/x.pt", "size": 1, "blobId": "b"}]}', "expected a plain path"),
    ],
)
def test_metadata_that_cannot_be_used_is_refused(hub: Hub, tmp_path: Path, listing: bytes, words: str) -> None:
    hub.listing = listing
    with pytest.raises(UserError, match=words):
        fetch(hub, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_too_little_room_is_known_before_anything_is_fetched(hub: Hub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 50, 50))
    with pytest.raises(UserError, match=r"0\.0 GB are to come and 0\.0 GB are free, expected room"):
        fetch(hub, tmp_path / "out")
    assert hub.fetched() == []
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_keeps_what_can_go_on(hub: Hub, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write '.*model\.pt\..*\.partial'.*make room on the disk"):
            fetch(hub, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "out" / "model.pt").exists()
    fetch(hub, tmp_path / "out")
    assert without_record(tmp_path / "out") == expected()


def test_two_downloads_do_not_write_into_one_file(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    digest = hashlib.sha256(BIG).hexdigest()[:8]
    with (out / f"model.pt.{digest}.partial").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use: another download is writing"):
            fetch(hub, out)
    fetch(hub, out)
    assert without_record(out) == expected()
