from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from kalle import extras
from kalle.checkpoint import read_json, read_tensors, write_json, write_tensors
from kalle.cli import doctor as command
from kalle.cli.doctor import Fact, examine_machine
from kalle.cli.main import main
from kalle.text.tokenizer import Tokenizer


@pytest.fixture
def model(toy_weights: Path, tmp_path: Path) -> Path:
    """A copy of the toy weights that a test may break."""
    return Path(shutil.copytree(toy_weights, tmp_path / "ckpt" / "toy"))


def fact_of(model: Path, name: str = "toy", quick: bool = False) -> tuple[Fact, bool]:
    facts, able = examine_machine(model, quick)
    return next(fact for fact in facts if fact.name == name), able


def test_a_machine_that_speaks(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--model", str(model)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("speaking works: yes\n")
    assert "toy: 0." in printed
    assert "; spoke 0." in printed
    assert main(["doctor", "--quick", "--json", "--model", str(model)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["speaking_works"] is True
    assert {fact["section"] for fact in said["findings"]} == {"versions", "weights", "extras", "device", "audio", "disk"}


def test_a_fresh_install_has_no_problem() -> None:
    facts, able = examine_machine(None, quick=True, ckpt=Path("nowhere"))
    assert able, "the weights that ship speak"
    assert [fact for fact in facts if fact.status == "problem"] == []
    assert any(fact.name == "kalle-nano" for fact in facts)


def test_without_weights_nothing_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--quick", "--model", str(tmp_path)]) == 1
    printed = capsys.readouterr().out
    assert "PROBLEM" in printed
    assert printed.endswith("speaking works: no\n")


def test_weights_that_are_not_finite_are_named(model: Path) -> None:
    path = model / "lm" / "model.safetensors"
    tensors = read_tensors(path)
    name = next(name for name, tensor in tensors.items() if tensor.is_floating_point())
    write_tensors(path, tensors | {name: torch.full_like(tensors[name], float("nan"))})
    fact, able = fact_of(model)
    assert (fact.status, able) == ("problem", False)
    assert name in fact.value or "finite" in fact.value


def test_torn_weights_and_a_configuration_that_does_not_fit(model: Path) -> None:
    path = model / "lm" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    fact, able = fact_of(model, quick=True)
    assert (fact.status, able) == ("problem", False)
    assert "model.safetensors" in fact.value
    path.write_bytes(whole)
    values = read_json(model / "lm" / "config.json")
    write_json(model / "lm" / "config.json", values | {"latent_dim": 5})
    assert fact_of(model, quick=True)[0].status == "problem"


def test_released_files_speak_after_a_conversion(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "flowvae.pt")
    fact, able = fact_of(tmp_path, "released files")
    assert (fact.status, able) == ("problem", False)
    assert f"kalle download --out '{tmp_path}'" in (fact.remedy or "")
    torch.save({}, tmp_path / "model.pt")
    Tokenizer.bytes().save(tmp_path / "tokenizer")
    fact, able = fact_of(tmp_path, "released files")
    assert (fact.status, able) == ("note", True)


def test_packages_that_are_missing_or_too_old(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needed = {
        "": [Requirement("numpy>=999")],
        "eval": [Requirement("no-such-package>=1"), Requirement("numpy")],
        "serve": [Requirement("no-such")],
    }
    monkeypatch.setattr(extras, "requirements", lambda: needed)
    facts = {fact.name: fact for fact in examine_machine(model, quick=True)[0]}
    assert (facts["numpy"].status, facts["numpy"].remedy) == ("problem", "pip install 'numpy>=999'")
    assert facts["eval"].value == "incomplete: missing, expected no-such-package>=1"
    assert (facts["serve"].value, facts["serve"].status) == ("not installed", "note")
    assert "[serve]" in (facts["serve"].remedy or "")
    assert not examine_machine(model, quick=True)[1]


def test_a_check_that_raises_is_a_problem(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[Fact]:
        raise OSError("libtorch.so: cannot open")

    monkeypatch.setattr(command, "version_facts", broken)
    facts, able = examine_machine(model, quick=True)
    assert not able
    assert any("OSError: libtorch.so" in fact.value for fact in facts)


def test_a_folder_that_cannot_be_written_and_a_full_disk_are_notes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.os, "access", lambda path, mode: False)
    assert all("not writable" in fact.value and fact.status == "note" for fact in command.disk_facts(tmp_path))
    monkeypatch.undo()
    monkeypatch.setattr(command, "ENOUGH_DISK_BYTES", 1e18)
    assert all("make room" in (fact.remedy or "") for fact in command.disk_facts(tmp_path))
