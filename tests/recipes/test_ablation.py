"""The ablation recipe in miniature."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RUN = ROOT / "recipes/ablation/run.py"


@pytest.mark.slow
def test_every_number_of_the_table_is_measured(tmp_path: Path) -> None:
    words = ["--out", str(tmp_path), "--steps", "3", "3", "--items", "1", "--only", "base", "rate25", "posterior_prediction"]
    done = subprocess.run([sys.executable, str(RUN), *words], capture_output=True, text=True, cwd=ROOT, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["codecs"]) == {"base", "rate25"}
    assert set(results["models"]) == {"base", "rate25", "posterior_prediction"}
    for row in results["models"].values():
        assert all(isinstance(row[name], float) for name in ("share_of_constant", "sigma_ratio", "predicted_mel_l1"))
        assert sum(row["ends"].values()) == 1
    assert "| posterior_prediction | KL direction |" in (tmp_path / "results.md").read_text()


@pytest.mark.slow
def test_an_unknown_variant_is_named(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(RUN), "--out", str(tmp_path), "--only", "bese"], capture_output=True, text=True, timeout=250)
    assert done.returncode == 2
    assert "error: --only: got bese, expected names of" in done.stderr
