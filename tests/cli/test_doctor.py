from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from kalle.checkpoint import read_json, write_json
from kalle.cli import doctor as command
from kalle.cli import doctor_packages as packages
from kalle.cli.doctor_findings import Finding, examined, gigabytes
from kalle.cli.doctor_weights import folder_findings, found_findings, speaks, weight_folders
from kalle.cli.main import main
from kalle.models.lm import KalleLM
from kalle.synthesis.kalle import Kalle
from kalle.text.tokenizer import Tokenizer

REALLY_IMPORT = packages.import_problems


@pytest.fixture(autouse=True)
def _quick_imports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Importing torch once more in a process of its own takes seconds; one test does it."""
    monkeypatch.setattr(packages, "import_problems", lambda modules: dict.fromkeys(modules))


@pytest.fixture
def model(toy_weights: Path, tmp_path: Path) -> Path:
    """A copy of the toy weights that a test may break."""
    folder = tmp_path / "ckpt" / "toy"
    for path in toy_weights.rglob("*"):
        if path.is_file():
            copy = folder / path.relative_to(toy_weights)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    return folder


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


def test_a_machine_that_speaks(model: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "import_problems", REALLY_IMPORT)
    assert main(["doctor", "--quick", "--model", str(model)]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith("speaking works: yes\n")
    assert "a tiny random model spoke 2 frames" in printed
    assert "toy speaking: yes, stop threshold 0.5 (not calibrated)" in printed


def test_json_says_the_same(model: Path, capsys) -> None:
    assert main(["doctor", "--quick", "--json", "--model", str(model)]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["speaking_works"] is True
    torch = next(finding for finding in said["findings"] if finding["name"] == "torch")
    assert (torch["section"], torch["status"] != "problem") == ("versions", True)
    assert {finding["section"] for finding in said["findings"]} >= {
        "versions",
        "devices",
        "weights",
        "audio",
        "memory and disk",
        "self-test",
    }


def test_without_weights_nothing_speaks(tmp_path: Path, capsys) -> None:
    findings, able = command.examine(None, quick=True, ckpt=tmp_path)
    assert not able
    (empty,) = [finding for finding in findings if "no weight folder and no released files" in finding.value]
    assert (empty.status, "`kalle download`" in empty.remedy) == ("problem", True)
    assert main(["doctor", "--quick", "--model", str(tmp_path)]) == 1
    assert "PROBLEM" in capsys.readouterr().out


@pytest.mark.parametrize("given", [None, "", "kalle-release"])
def test_released_files_speak_after_a_conversion(tmp_path: Path, given: str | None) -> None:
    ckpt = tmp_path / "ckpt"
    model = None if given is None else ckpt / given

    def look() -> tuple[Finding, bool]:
        looked_at = [*found_findings(ckpt, model), *(found for folder in weight_folders(ckpt, model) for found in folder_findings(folder))]
        (finding,) = looked_at
        return finding, speaks(looked_at)

    ckpt.mkdir()
    torch.save({}, ckpt / "flowvae.pt")
    finding, able = look()
    assert "lack model.pt and a folder with tokenizer.json" in finding.value
    assert (finding.status, able, f"kalle download --out '{ckpt}'" in finding.remedy) == ("problem", False, True)
    torch.save({}, ckpt / "model.pt")
    assert look()[0].value.endswith("lack a folder with tokenizer.json")
    Tokenizer.bytes().save(ckpt / "tokenizer")
    finding, able = look()
    assert (finding.status, able) == ("note", True)
    assert "converted at first use" in finding.value
    (ckpt / "model.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    finding, able = look()
    assert (finding.status, able, "stored with LFS" in finding.value) == ("problem", False, True)


def test_what_was_converted_is_looked_at(model: Path) -> None:
    ckpt = model.parent
    (ckpt / "flowvae.pt").touch()
    model.rename(ckpt / "kalle-release")
    assert list(found_findings(ckpt, None)) == list(found_findings(ckpt, ckpt)) == []
    assert weight_folders(ckpt, None) == weight_folders(ckpt, ckpt) == [ckpt / "kalle-release"]


def test_a_folder_is_described_from_its_files(model: Path, toy_weights: Path) -> None:
    kalle = Kalle.from_pretrained(model, "cpu")
    (model / "voices").mkdir()
    (model / "voices" / "bad.safetensors").write_bytes(b"no")
    found = by_name(folder_findings(model))
    counts = {part: sum(value.numel() for value in getattr(kalle, part).state_dict().values()) for part in ("flowvae", "lm")}
    assert found["toy/flowvae"].value.startswith(
        f"{counts['flowvae'] / 1e6:.1f} M parameters in {len(kalle.flowvae.state_dict())} tensors, F32"
    )
    assert found["toy/lm"].value.startswith(f"{counts['lm'] / 1e6:.1f} M parameters")
    assert kalle.hashes["flowvae_encoder"][:12] in found["toy hashes"].value
    assert "1, of which 1 can't be used: bad" in found["toy voices"].value
    assert weight_folders(model.parent, None) == [model]
    assert weight_folders(model.parent, toy_weights) == [toy_weights]


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        (
            "",
            {"stop": {"threshold": 0.3, "min_index": 3, "false_stop_rate": 0.01}},
            "0.3 (calibrated: false stop rate 1.0%)",
        ),
        ("", {"stop": {"threshold": 0.3, "min_index": 3}}, "set by hand"),
        ("", {"stop": {"probability": 0.9}}, "no: config.json stops by probability 0.9 but the language model has no stop head"),
        ("", {"sample_rate": 24000}, "config.json says 24000 Hz, the Flow-VAE 16000 Hz"),
        ("", {"format_version": 99}, "format_version 99"),
        ("lm", {"latent_dim": 5}, "a part is missing or broken"),
    ],
)
def test_what_the_configuration_says(model: Path, part: str, change: dict, message: str) -> None:
    path = model / part / "config.json"
    write_json(path, read_json(path) | change)
    findings = folder_findings(model)
    assert message in by_name(findings)["toy speaking"].value
    assert speaks(findings) == ("calibrated" in message or "by hand" in message)


def test_the_weights_that_ship_are_whole() -> None:
    """They have a speaker encoder, and with it counters that are integers."""
    findings = folder_findings(Path(__file__).parents[2] / "ckpt" / "kalle-nano")
    assert {finding.status for finding in findings} == {"ok"}, findings
    assert speaks(findings)


def test_the_rule_of_a_stop_head(model: Path) -> None:
    lm = KalleLM.from_pretrained(model)
    lm.add_stop_head(torch.Generator())
    lm.save_pretrained(model)
    assert by_name(folder_findings(model))["toy speaking"].value == "yes, stop probability 0.5 (of the stop head)"
    path = model / "config.json"
    write_json(path, read_json(path) | {"stop": {"probability": 0.9}})
    assert by_name(folder_findings(model))["toy speaking"].value == "yes, stop probability 0.9 (set by hand)"


def test_broken_weights(model: Path) -> None:
    path = model / "lm" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])
    findings = folder_findings(model)
    assert "not a readable safetensors file" in by_name(findings)["toy/lm"].value
    assert not speaks(findings)
    (model / "tokenizer" / "tokenizer.json").unlink()
    (model / "lm" / "config.json").write_text("[]")
    assert not speaks(folder_findings(model))


def test_a_tensor_that_does_not_fit_is_named(model: Path) -> None:
    path = model / "lm" / "config.json"
    values = read_json(path)
    write_json(path, values | {"backbone": values["backbone"] | {"num_hidden_layers": 1}})
    finding = by_name(folder_findings(model))["toy/lm"]
    assert finding.status == "problem"
    assert "tensors do not fit its config.json: superfluous: backbone.layers.1." in finding.value


def test_broken_and_missing_packages_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in {"fine": "", "raising": "raise RuntimeError('no luck')", "exiting": "import os; os._exit(9)", "after": ""}.items():
        (tmp_path / f"{name}.py").write_text(body)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    problems = REALLY_IMPORT(["fine", "raising", "exiting", "after", "absent"])
    assert problems["fine"] is problems["after"] is None
    assert problems["raising"] == "RuntimeError: no luck"
    assert problems["exiting"] == "the import ended the process with exit code 9"
    assert problems["absent"].startswith("ModuleNotFoundError")


def test_a_broken_core_package_stops_speaking_and_a_broken_extra_does_not(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = {"": {"numpy": ">=1"}, "eval": {"jiwer": ">=99", "no-such-package": ""}, "serve": {"no-such-package": ""}, "dev": {"x": ""}}
    monkeypatch.setattr(packages, "requirements", lambda: needs)
    findings, able = command.examine(model, quick=False)
    assert able
    found = by_name(findings)
    assert found["eval"].value == "2 of 2 packages are missing or broken"
    assert (found["serve"].value, found["serve"].remedy) == ("not installed", "pip install 'kalle-tts[serve]'")
    assert "expected >=99" in found["jiwer"].value
    monkeypatch.setattr(packages, "import_problems", lambda modules: dict.fromkeys(modules, "OSError: libnumpy"))
    findings, able = command.examine(model, quick=True)
    assert not able
    assert "cannot be imported: OSError: libnumpy" in by_name(findings)["numpy"].value


def test_a_check_that_raises_is_a_finding() -> None:
    def check():
        yield Finding("s", "one", "fine")
        raise OSError("libtorch.so: cannot open")

    (finding,) = examined("s", check, essential=True)
    assert finding.stops_speaking
    assert "OSError: libtorch.so" in finding.value


def test_a_broken_torch_is_reported_too(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():
        raise ImportError("torch is torn")
        yield

    monkeypatch.setattr(command, "self_test", broken)
    findings, able = command.examine(model, quick=True)
    assert not able
    assert any("torch is torn" in finding.value for finding in findings)


def test_requirements_and_tested_versions() -> None:
    needed = packages.requirements()
    assert needed[""]["torch"].startswith(">=")
    assert "lightning" in needed["train"]
    assert packages.tested_versions()["torch"]
    assert gigabytes(2.5e9) == "2.5 GB"
    assert gigabytes(3.2e6) == "3.2 MB"
    assert sys.version_info >= packages.OLDEST_PYTHON
