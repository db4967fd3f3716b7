"""The script that measures on a GPU: its limits add up to what a short lease allows, and its commands are ones that exist."""

from __future__ import annotations

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
LEASE_SECONDS = 12 * 60


def steps() -> list[tuple[int, list[str]]]:
    """The time limit in seconds and the words of each step."""
    listed = subprocess.run([SCRIPT, "--list", "results"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [(int(line.split(" ", 1)[0]), shlex.split(line.split(": ", 1)[1])) for line in listed]


def test_the_steps_fit_the_lease() -> None:
    assert sum(limit for limit, _ in steps()) <= LEASE_SECONDS


def test_every_command_parses() -> None:
    commands = [words[words.index("kalle") + 1 :] for _, words in steps() if "kalle" in words]
    assert len(commands) >= 4
    for name, *arguments in commands:
        context = get_command(importlib.import_module(f"kalle.cli.{name}").app).make_context(name, arguments)
        command, (sub, *rest) = context.command, [*context._protected_args, *context.args]
        assert command.get_command(context, sub).make_context(sub, rest, parent=context) is not None  # type: ignore[attr-defined]


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [SCRIPT, tmp_path / "out"], capture_output=True, text=True, check=False, env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    )
    assert done.returncode == 1
    assert "no CUDA device" in done.stderr
    assert not (tmp_path / "out").exists()
