"""The Docker file and the systemd unit call `kalle serve` with flags that it has."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from kalle.cli.main import typer_command

RECIPE = Path(__file__).parents[2] / "recipes" / "serve"


def docker_words() -> list[str]:
    lines = (RECIPE / "Dockerfile").read_text().splitlines()
    return json.loads(next(line for line in lines if line.startswith("CMD ")).removeprefix("CMD "))


def unit_words() -> list[str]:
    found = re.search(r"^ExecStart=(.+)$", (RECIPE / "kalle.service").read_text(), re.MULTILINE)
    assert found is not None
    return shlex.split(found[1])


@pytest.mark.parametrize("words", [docker_words(), unit_words()], ids=["docker", "systemd"])
def test_the_flags_are_those_of_the_command(words: list[str]) -> None:
    pytest.importorskip("fastapi")
    assert Path(words[0]).name == "kalle"
    assert words[1] == "serve"
    context = typer_command("serve").make_context("serve", words[2:])
    assert context.params["api_keys"] is not None
    assert not context.params["insecure"]
