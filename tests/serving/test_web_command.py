"""`kalle web` and scripts/web.py up to the moment the page would be served."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from kalle.cli.main import main
from kalle.serving import server as serving
from kalle.serving.server import WebOptions
from kalle.synthesis.kalle import Kalle
from kalle.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference"


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Kalle, WebOptions]]:
    """What would have been served."""
    calls: list[tuple[Kalle, WebOptions]] = []
    monkeypatch.setattr(serving, "require_gradio", lambda: None)
    monkeypatch.setattr(serving, "serve", lambda kalle, options: calls.append((kalle, options)))
    return calls


@pytest.fixture
def script() -> Any:
    spec = importlib.util.spec_from_file_location("web_script", ROOT / "scripts" / "web.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """The golden weights under the released file names."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for source, target in (("flowvae_tiny.pt", "flowvae.pt"), ("flowvae_tiny.json", "flowvae.json"), ("lm_tiny.pt", "model.pt")):
        shutil.copy(REFERENCE / source, folder / target)
    shutil.copy(REFERENCE / "lm_tiny.json", folder / "lm.json")
    Tokenizer.bytes().save(folder / "tokenizer")
    return folder


def test_the_command_listens_on_this_machine_only_unless_told(
    toy_weights: Path, served: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "listenable_port", lambda host, port: port)
    assert main(["web", "--model", str(toy_weights), "--device", "cpu"]) == 0
    assert served[0][1] == WebOptions()
    assert (served[0][1].host, served[0][1].share) == ("127.0.0.1", False)
    more = ["--host", "0.0.0.0", "--port", "0", "--share", "--voices", str(tmp_path), "--max-text", "9", "--open"]
    assert main(["web", "--model", str(toy_weights), "--device", "cpu", *more]) == 0
    assert served[1][1] == WebOptions("0.0.0.0", 0, True, tmp_path, 9, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--port", "70000"], "bad port: got 70000"),
        (["--max-text", "0"], "bad limit of the text"),
        (["--model", "none", "--port", "0"], "'none'"),
    ],
)
def test_mistakes_are_one_line(flags: list[str], message: str, served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["web", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not served


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "192.0.2.1"])
def test_an_address_that_is_not_to_be_had_is_said_before_the_model_is_loaded(
    host: str, script: Any, ckpt: Path, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as other:
        other.bind(("" if host == "127.0.0.2" else "127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        for call in (main, lambda given: script.main(["--ckpt", str(ckpt), *given[1:]])):
            assert call(["web", "--host", host, "--port", port]) == 2
            error = capsys.readouterr().err
            assert error.startswith(f"error: cannot serve on {host}:{port}: ")
            assert error.endswith("; choose another --port (0 takes a free one) or --host\n")
            assert error.count("\n") == 1
    assert not (ckpt / "kalle-release").exists()
    assert not served


def test_the_end_of_the_page_is_no_error(toy_weights: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    caplog.set_level("INFO")
    closed: list[object] = []

    class Page:
        share_url, local_url = None, "http://127.0.0.1:1/"

        def close(self, verbose: bool) -> None:
            closed.append(verbose)

    def launch(*_: object) -> Page:
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return Page()

    monkeypatch.setattr(serving, "launch", launch)
    monkeypatch.setattr(serving, "require_gradio", lambda: None)
    assert main(["web", "--model", str(toy_weights), "--device", "cpu", "--port", "0"]) == 0
    assert "the page has ended" in caplog.text
    assert closed == [False]


def test_an_interrupted_start_is_one(
    toy_weights: Path, monkeypatch: pytest.MonkeyPatch, served: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Kalle, "from_pretrained", interrupted)
    assert main(["web", "--port", "0", "--model", str(toy_weights)]) == 130
    assert capsys.readouterr().err == "error: interrupted before the page was there; run the same command again\n"


def test_the_script_converts_the_release_once_and_says_so(
    script: Any, ckpt: Path, served: list[Any], caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "listenable_port", lambda host, port: port)
    caplog.set_level("INFO")
    assert script.main(["--ckpt", str(ckpt), "--device", "cpu"]) == 0
    assert "converting the released files" in caplog.text
    assert served[0][0].folder == ckpt / "kalle-release"
    assert served[0][1] == WebOptions()
    caplog.clear()
    assert script.main(["--ckpt", str(ckpt), "--device", "cpu", "--host", "0.0.0.0", "--share"]) == 0
    assert "converting" not in caplog.text
    assert (served[1][1].host, served[1][1].share) == ("0.0.0.0", True)


def test_the_script_names_what_is_missing(script: Any, tmp_path: Path, served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["--ckpt", str(tmp_path), "--port", "0"]) == 2
    assert "lacks flowvae.pt, model.pt" in capsys.readouterr().err
    assert not served
