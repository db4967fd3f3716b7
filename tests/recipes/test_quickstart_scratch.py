"""The quickstart from random weights in miniature, as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "recipes/quickstart/scratch.py"


def command(out: Path, *more: str) -> list[str]:
    return [sys.executable, str(RUN), "--steps", "10", "10", "--items", "3", "--out", str(out), *more]


def weights(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.glob("*/weights/*/model.safetensors"))}


def run(out: Path, *more: str) -> str:
    done = subprocess.run(command(out, *more), capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_budget_is_a_function_of_the_minutes(recipe: Any) -> None:
    Budget = recipe("quickstart", "scratch").Budget
    short, long = Budget.for_minutes(15), Budget.for_minutes(60)
    assert long.flowvae_steps > 3 * short.flowvae_steps
    assert long.lm_steps > 3 * short.lm_steps
    for minutes in (float("nan"), float("inf"), 0.0, -1.0, 5.5):
        with pytest.raises(ValueError, match="minutes"):
            Budget.for_minutes(minutes)


@pytest.mark.slow
def test_the_chain_runs_resumes_and_repeats(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    output = run(first)
    summary = json.loads((first / "summary.json").read_text())
    mel, kl = summary["learning"][0], summary["learning"][1]
    assert mel["end"] < mel["start"]
    assert kl["end"] < kl["start"]
    assert "| synthesis |" in output
    for name in ("summary.md", "reconstruction/figure.png", "synthesis/figure.png", "synthesis/results.json", "speech/sentence0.wav"):
        assert (first / name).stat().st_size > 0, name
    assert "done before" in run(first)

    interrupted = subprocess.Popen(command(second), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 300
    while not (second / "flowvae/config.yaml").exists():
        assert interrupted.poll() is None, "the quickstart ended before it could be interrupted"
        assert time.monotonic() < deadline, "the quickstart never started to train"
        time.sleep(0.1)
    os.killpg(interrupted.pid, signal.SIGINT)
    assert interrupted.wait(120) == 130
    run(second)
    assert weights(first) == weights(second)
    assert len(weights(first)) == 3


@pytest.mark.slow
def test_another_seed_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(json.dumps({"settings": {"seed": 0}, "seconds": {}, "done": []}))
    done = subprocess.run(command(tmp_path, "--seed", "1"), capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode != 0
    assert "error:" in done.stderr
    assert "--out" in done.stderr
