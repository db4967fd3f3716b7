"""`kalle web` and scripts/web.py up to the moment the page would be served."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest

from kalle.cli.main import main
from kalle.serving import web as serving
from kalle.serving.web import WebOptions
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


def test_the_command_listens_on_this_machine_only_unless_told(toy_weights: Path, served: list[Any], tmp_path: Path) -> None:
    assert main(["web", "--model", str(toy_weights), "--device", "cpu"]) == 0
    assert served[0][1] == WebOptions()
    assert (served[0][1].host, served[0][1].share) == ("127.0.0.1", False)
    more = ["--host", "0.0.0.0", "--port", "0", "--share", "--voices", str(tmp_path), "--max-text", "9", "--open"]
    assert main(["web", "--model", str(toy_weights), "--device", "cpu", *more]) == 0
    assert served[1][1] == WebOptions("0.0.0.0", 0, True, tmp_path, 9, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [(["--port", "70000"], "bad port: got 70000"), (["--max-text", "0"], "bad limit of the text"), (["--model", "none"], "'none'")],
)
def test_mistakes_are_one_line(flags: list[str], message: str, served: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["web", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not served


def test_the_script_converts_the_release_once_and_says_so(script: Any, ckpt: Path, served: list[Any], caplog: Any) -> None:
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
    assert script.main(["--ckpt", str(tmp_path)]) == 2
    assert "lacks flowvae.pt, model.pt" in capsys.readouterr().err
    assert not served
