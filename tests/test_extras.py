from __future__ import annotations

import json
import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_tested_versions_cover_everything_that_is_installed_and_meet_the_floors() -> None:
    """All that `make` installs is pinned, and no pin or floor allows a release with a known advisory."""
    root = Path(extras.__file__).parents[2]
    lines = (root / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(line.split("==")[0]): line.split("==")[1] for line in lines if not line.startswith("#")}
    seen: set[tuple[str, frozenset[str]]] = set()

    def need(requirement: Requirement) -> None:
        key = (canonicalize_name(requirement.name), frozenset(requirement.extras))
        if key in seen:
            return
        seen.add(key)
        assert key[0] in pins, f"{key[0]} is not in constraints.txt"
        assert requirement.specifier.contains(pins[key[0]], prereleases=True), f"{requirement} against {pins[key[0]]}"
        try:
            below = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            return
        for line in below:
            found = Requirement(line)
            if found.marker is None or any(found.marker.evaluate({"extra": extra}) for extra in (*requirement.extras, "")):
                need(found)

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    direct = [Requirement(line) for lines in ([project["dependencies"], *project["optional-dependencies"].values()]) for line in lines]
    for requirement in direct:
        need(requirement)
    allowed = {requirement.name: requirement.specifier for requirement in direct}
    for name, bad in {
        "torch": "2.9.1",
        "transformers": "5.2.0",
        "starlette": "0.49.0",
        "python-multipart": "0.0.21",
        "pillow": "12.1.0",
    }.items():
        assert not allowed[name].contains(bad), name
    assert not any(allowed["lightning"].contains(bad) for bad in ("2.6.2", "2.6.3"))
    assert allowed["lightning"].contains("2.6.6")


def test_recognisers_of_single_maintainers_are_pinned_by_hash() -> None:
    lines = (Path(extras.__file__).parents[2] / "recognisers.txt").read_text().splitlines()
    pinned = [line for line in lines if not line.startswith("#")]
    assert len(pinned) == 4
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+ --hash=sha256:[0-9a-f]{64}", line) for line in pinned)
