"""The curve of test-time training, as a user draws it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from kalle.audio import write_audio

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_a_curve_on_toy_weights(toy_weights: Path, tmp_path: Path) -> None:
    time = np.arange(8000) / 16000
    for name, low in (("a", 150), ("b", 260)):
        write_audio(tmp_path / f"{name}.wav", 0.3 * np.sin(2 * np.pi * (low + 900 * time) * time), 16000)
    out = tmp_path / "out"
    command = ["bash", str(ROOT / "recipes/adapt/run.sh"), str(toy_weights), str(tmp_path / "a.wav"), "one two"]
    command += ["--validate", str(tmp_path / "b.wav"), "--validate-text", "three", "--steps", "0", "2", "5", "--texts", "0"]
    command += ["--lr", "0.01", "0.01", "--out", str(out), "--device", "cpu"]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=250, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    points = json.loads((out / "curve.json").read_text())["points"]
    assert points["lora 0"]["kl"] == pytest.approx(points["full 0"]["kl"])
    for mode in ("lora", "full"):
        kls = [points[f"{mode} {steps}"]["kl"] for steps in (0, 2, 5)]
        assert kls == sorted(kls, reverse=True)
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "| lora 5 |" in (out / "curve.md").read_text()
    before = (out / "curve.json").stat().st_mtime_ns
    again = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=250, check=True)
    assert "| lora 5 |" in again.stdout
    assert (out / "curve.json").stat().st_mtime_ns == before
