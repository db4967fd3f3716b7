from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from kalle import extras
from kalle.errors import UserError


def test_requirements_are_those_of_the_package() -> None:
    needed = extras.requirements()
    assert "torch" in {requirement.name for requirement in needed[""]}
    assert "lightning" in {requirement.name for requirement in needed["train"]}
    assert "lightning" not in {requirement.name for requirement in needed[""]}


def test_a_missing_module_names_its_extra() -> None:
    error = extras.missing_extra("gradio.blocks")
    assert error is not None
    assert "[serve]" in str(error)
    assert extras.missing_extra("no_such_module") is None
    with pytest.raises(UserError, match=r"drawing needs the package no_such_module.*\[serve\]"):
        extras.require("no_such_module", "serve", "drawing")


def test_the_command_fits_a_checkout_a_wheel_and_an_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkout = Path(extras.__file__).parents[2]
    monkeypatch.chdir(checkout)
    assert extras.install_command("serve") == "pip install -e '.[serve]'"
    monkeypatch.chdir(tmp_path)
    assert extras.install_command("serve") == f"pip install -e '.[serve]' in {checkout}"
    monkeypatch.setattr(extras, "__file__", str(tmp_path / "lib" / "kalle" / "extras.py"))
    origin = {"url": "file:///wheels/kalle_tts-0.1.0-py3-none-any.whl", "archive_info": {}}
    monkeypatch.setattr(extras, "_installed", lambda: SimpleNamespace(read_text=lambda name: json.dumps(origin)))
    assert extras.install_command("serve") == "pip install 'kalle-tts[serve] @ file:///wheels/kalle_tts-0.1.0-py3-none-any.whl'"
    monkeypatch.setattr(extras, "_installed", lambda: None)
    assert extras.install_command("serve") == "pip install 'kalle-tts[serve]'"
