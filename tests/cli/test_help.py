"""Help is one screen and a half; what few people need stands behind --help-all."""

from __future__ import annotations

import importlib
from dataclasses import MISSING, fields
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest

from kalle.cli.main import main
from kalle.cli.speaking import SAY_FLAGS, STREAM_FLAGS
from kalle.errors import UserError
from kalle.synthesis.options import GenerationOptions

MOST_LINES = 60
COMMANDS = ["say", "stream", "adapt", "export", "calibrate", "convert", "download", "bench", "serve", "web", "doctor", "prepare", "data"]
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


VALUES = {
    "seed": "7",
    "temperature": "0.5",
    "guidance": "2.0",
    "max_seconds": "3.0",
    "language": "zh",
    "normalise": "",
    "by_sentences": "",
    "pause_s": "0.5",
    "paragraph_pause_s": "1.5",
    "rolling": "",
    "retries": "4",
    "latency_frames": "6",
    "chunk_frames": "3",
}


@pytest.mark.parametrize(("command", "flags"), [("say", SAY_FLAGS), ("stream", STREAM_FLAGS)], ids=["say", "stream"])
def test_every_flag_reaches_the_library_as_the_option_of_its_name(command: str, flags, tmp_path: Path, monkeypatch) -> None:
    """The recipe of docs/architecture.md: a field and a flag are all that an option needs to get to the place that uses it."""
    received: list[GenerationOptions] = []

    def speak(kalle: object, text: str, told: object, voice: object, options: GenerationOptions, **_: object) -> None:
        received.append(options)
        raise UserError("enough")

    monkeypatch.setattr("kalle.cli.say.speak_to_file", speak)
    monkeypatch.setattr("kalle.cli.say.speak_long_to_file", speak)
    model = SimpleNamespace(stream=lambda text, voice, options: speak(None, text, None, voice, options))
    for name in ("say", "stream"):
        monkeypatch.setattr(f"kalle.cli.{name}.load_model", lambda *_: model)
    monkeypatch.setattr("kalle.cli.say.model_folder", lambda *_, **__: None)
    for name in flags:
        declared = get_args(flags[name])[1]
        written = [each for each in (declared.default, *(declared.param_decls or ())) if isinstance(each, str)]
        flag = next(iter(written), f"--{name.replace('_', '-')}").split("/")[0]
        value = [VALUES[name]] if VALUES[name] else []
        assert main([command, "Hi.", "-o", str(tmp_path / "a.wav"), flag, *value]) == 2
        assert getattr(received[-1], name) != getattr(GenerationOptions(), name), name
    assert len(received) == len(flags)
