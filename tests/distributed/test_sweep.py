"""A sweep through the launcher for clusters, on this machine."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml

from training.distributed import kalle_on_ranks

pytestmark = pytest.mark.slow


def test_jobs_of_a_sweep_train_side_by_side_in_folders_of_their_own(lm_overrides: list[str], tmp_path: Path) -> None:
    directions = ["prediction_posterior", "posterior_prediction"]
    words = [
        "train",
        "lm",
        "-m",
        "hydra/launcher=submitit_local",
        f"objective.direction={','.join(directions)}",
        f"out={tmp_path / 'runs'}",
    ]
    result: subprocess.CompletedProcess[str] = kalle_on_ranks(
        [*words, *lm_overrides, "trainer.max_steps=2", "trainer.devices=1"], world_size=1, timeout_seconds=900
    )[0]
    assert result.returncode == 0, result.stderr
    for number, direction in enumerate(directions):
        run = tmp_path / "runs" / str(number)
        assert yaml.safe_load((run / "config.yaml").read_text())["objective"]["direction"] == direction
        assert (run / "weights" / "lm" / "model.safetensors").is_file()
