"""The quickstart from finished weights."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kalle.checkpoint import write_json

ROOT = Path(__file__).parents[2]
RUN = ROOT / "recipes/quickstart/run.py"


def test_steps_are_a_function_of_the_minutes(recipe: Any) -> None:
    steps_for = recipe("quickstart", "run").steps_for
    assert steps_for(30) > 3 * steps_for(10) > 0
    for minutes in (float("nan"), float("inf"), 0.0, -1.0, 6.5):
        with pytest.raises(ValueError, match="minutes"):
            steps_for(minutes)


def test_missing_weights_are_named_with_the_other_chain(tmp_path: Path, recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe("quickstart", "run").run(["--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "no weights: got" in error
    assert "make quickstart-scratch" in error
    assert not (tmp_path / "out").exists()


def test_a_run_of_another_seed_is_refused(tmp_path: Path, nano_weights: Path, recipe: Any, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "stages.json", {"settings": {"seed": 0}, "seconds": {}, "done": []})
    assert recipe("quickstart", "run").run(["--model", str(nano_weights), "--out", str(tmp_path), "--seed", "1"]) == 2
    assert "--out" in capsys.readouterr().err


@pytest.mark.parametrize("hears", [True, False])
def test_the_training_fits_the_weights(hears: bool, tmp_path: Path, nano_weights: Path, recipe: Any) -> None:
    """Every command composes, and listens to the speaker only where the weights do."""
    from kalle.cli.hydra_entry import compose, folder_override

    model = nano_weights
    if not hears:
        model = tmp_path / "weights"
        shutil.copytree(nano_weights, model)
        config = json.loads((model / "lm/config.json").read_text())
        write_json(model / "lm/config.json", config | {"speaker": None})
    given = argparse.Namespace(out=tmp_path, model=model, seed=3, override=["optimizer.lr=1e-5"], asr="auto", items=0)
    quickstart = recipe("quickstart", "run").Quickstart(given, 7)
    asked: dict[str, list[str]] = {}
    quickstart.stages.command = lambda name, *words: asked.update({name: list(words)})
    quickstart.tune()
    encode = compose("encode", folder_override(asked["encode"][1:], "flowvae"))
    train = compose("train_lm", folder_override(asked["train lm"][2:], "flowvae"))
    assert encode.speaker_mels == hears
    assert (train.data.speaker is not None) == hears
    assert train.init == str(model)
    assert train.optimizer.lr == 1e-5
    assert (train.trainer.max_steps, train.seed) == (7, 3)


def test_the_table_has_before_and_after(recipe: Any) -> None:
    rows = [
        {"number": "wer", "recordings": 0.05, "default": 0.1, "before": 0.5, "after": 0.25},
        {"number": "KL", "recordings": None, "default": None, "before": 2, "after": 1},
    ]
    text = recipe("quickstart", "summary").table(rows)
    assert text[-2:] == ["| wer | 0.100 | 0.500 | 0.250 | 0.050 |", "| KL | - | 2.000 | 1.000 | - |"]


@pytest.mark.slow
def test_the_chain_runs_and_resumes(tmp_path: Path, nano_weights: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, str(RUN), "--model", str(nano_weights), "--steps", "5", "--items", "2", "--out", str(out)]
    done = subprocess.run([*command, "--override", "device=cpu"], capture_output=True, text=True, cwd=ROOT, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((out / "summary.json").read_text())
    kl = next(row for row in summary["rows"] if row["number"].startswith("KL per dimension"))
    assert kl["after"] < kl["before"]
    spoken = [f"{name}-{index}.wav" for name in ("speak", "random-voice", "clone", "speak-tuned") for index in range(4)]
    for name in ("summary.md", "before/figure.png", "after/results.json", *(f"speech/{name}" for name in spoken)):
        assert (out / name).stat().st_size > 0, name
    assert json.loads((out / "lm/weights/config.json").read_text())["voice"] == "corpus-speaker"
    again = subprocess.run([*command, "--override", "device=cpu"], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert again.returncode == 0
    assert "done before" in again.stdout
    assert "stage 1 of 24" in done.stdout
    assert (out / "summary.md").read_text() in again.stdout + "\n"
