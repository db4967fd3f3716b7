"""Help is one screen and a half; what few people need stands behind --help-all."""

from __future__ import annotations

import importlib
from dataclasses import MISSING, fields
from typing import get_args

import pytest

from kalle.cli.main import main
from kalle.cli.speaking import SAY_FLAGS, STREAM_FLAGS
from kalle.synthesis.options import GenerationOptions

MOST_LINES = 60
COMMANDS = ["say", "stream", "adapt", "export", "calibrate", "convert", "download", "bench", "web", "doctor", "prepare", "data"]
VOICES = ["create", "random", "list", "show", "play", "check"]


@pytest.mark.parametrize("command", [[name] for name in COMMANDS] + [["voices", name] for name in VOICES], ids=" ".join)
def test_help_is_short(command: list[str], capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*command, "--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) < MOST_LINES


@pytest.mark.parametrize("command", ["say", "stream"])
def test_the_rest_is_shown_where_it_is_asked_for(command: str, capsys) -> None:
    assert main([command, "--help"]) == 0
    short = capsys.readouterr().out
    assert main([command, "--help-all"]) == 0
    whole = capsys.readouterr().out
    assert "--help-all shows" in short
    assert "--guidance" not in short
    assert "--guidance" in whole
    assert "--help-all" not in whole


@pytest.mark.parametrize("flags", [SAY_FLAGS, STREAM_FLAGS])
def test_a_flag_says_the_default_of_its_option(flags) -> None:
    """The flags are declared without importing torch, so their help repeats the numbers of the dataclass."""
    defaults = {field.name: field.default for field in fields(GenerationOptions) if field.default is not MISSING}
    for name, annotation in flags.items():
        shown = get_args(annotation)[1].show_default
        assert name in defaults
        if isinstance(shown, str) and shown.replace(".", "").isdigit():
            assert float(shown) == defaults[name], name


def test_every_command_is_declared_without_torch() -> None:
    import subprocess
    import sys

    code = "import sys, kalle.cli.say, kalle.cli.stream, kalle.cli.voices; raise SystemExit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert importlib.import_module("kalle.cli.say").say.__name__ == "say"
