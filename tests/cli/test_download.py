"""`kalle download` as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hub_server import COMMIT, REPOSITORY, Hub, serve, use_as_default
from kalle import hub as hub_module
from kalle.cli.main import main

FILES = {"model.pt": bytes(range(256)) * 40, "flowvae.pt": b"short", "tokenizer/tokenizer.json": b"{}"}


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    with serve(FILES) as running:
        use_as_default(monkeypatch, running.endpoint)
        yield running


def test_it_says_what_it_did(hub: Hub, tmp_path: Path, capsys, caplog) -> None:
    out = tmp_path / "ckpt"
    assert main(["download", REPOSITORY, "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 files of {REPOSITORY} at {COMMIT[:12]}, 3 fetched, all checked\n"
    assert all((out / name).read_bytes() == content for name, content in FILES.items())
    (out / "model.pt").write_bytes(b"damaged")
    (out / "kalle-release").mkdir()
    assert main(["download", REPOSITORY, "--out", str(out), "--revision", "v2"]) == 0
    assert "1 fetched, all checked" in capsys.readouterr().out
    assert "model.pt differs from the hub's: it has 7 bytes" in caplog.text
    assert "was converted from the files that were here before" in caplog.text


def test_the_release_is_the_default(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["download"]) == 2
    assert "got 'kxxia/KALL-E'" in capsys.readouterr().err
    assert hub.requests[0][0] == "/api/models/kxxia/KALL-E"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["nobody/none"], "no such repository"), (["x/y/z"], "not a hub id"), ([REPOSITORY, "--revision", "v9"], "has no 'v9'")],
)
def test_mistakes_are_one_line(hub: Hub, tmp_path: Path, capsys, arguments: list[str], words: str) -> None:
    assert main(["download", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_what_has_come(hub: Hub, tmp_path: Path, monkeypatch, capsys) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "out"
    hub.cut_after["model.pt"] = [2000]
    monkeypatch.setattr(hub_module.time, "sleep", interrupted)
    assert main(["download", REPOSITORY, "--out", str(out)]) == 130
    assert "run the same command again to continue where it stopped" in capsys.readouterr().err
    assert [path.stat().st_size for path in out.glob("model.pt.*.partial")] == [2000]
    monkeypatch.undo()
    use_as_default(monkeypatch, hub.endpoint)
    assert main(["download", REPOSITORY, "--out", str(out)]) == 0
    assert hub.ranges("model.pt") == [None, "bytes=2000-"]


def test_a_place_that_cannot_be_written(hub: Hub, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["download", REPOSITORY, "--out", str(tmp_path / "file" / "ckpt")]) == 2
    assert "cannot write" in capsys.readouterr().err


def test_as_a_command_with_another_hub_in_the_environment(tmp_path: Path) -> None:
    with serve(FILES) as running:
        environment = {**os.environ, "HF_ENDPOINT": running.endpoint, "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "kalle", "download", REPOSITORY, "--out", str(tmp_path / "out")]
        result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert result.returncode == 0, result.stderr
    assert "3 fetched, all checked" in result.stdout
    assert "HTTP Request" not in result.stderr
