"""`kalle train` in two processes, started in each of the ways a user would."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.distributed import ROOT

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "kalle"]
ALONE = [sys.executable, "-m", "kalle"]


def command(start: list[str], *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*start, *words], capture_output=True, text=True, timeout=900, env=environment, check=False)


@pytest.mark.parametrize("stage", ["lm", "flowvae"])
def test_torchrun_and_devices_make_the_same_run(stage: str, lm_overrides: list[str], flowvae_overrides: list[str], tmp_path: Path) -> None:
    overrides = [*(lm_overrides if stage == "lm" else flowvae_overrides), "trainer.max_steps=3", "trainer.val_check_interval=2"]
    if stage == "flowvae":
        overrides.append("data.batch_size=2")
    launched = command(TORCHRUN, "train", stage, *overrides, f"out={tmp_path / 'torchrun'}")
    assert launched.returncode == 0, launched.stderr
    own = command(ALONE, "train", stage, *overrides, f"out={tmp_path / 'own'}", "trainer.devices=2")
    assert own.returncode == 0, own.stderr
    assert own.stderr.count("training 0.") + own.stdout.count("training 0.") == 1, "rank 0 alone says what it does"
    weights = [load_file(tmp_path / name / "weights" / stage / "model.safetensors") for name in ("torchrun", "own")]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert (tmp_path / "own" / "config.yaml").is_file()
    checkpoint = torch.load(tmp_path / "own" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 3


@pytest.mark.parametrize("start", [TORCHRUN, ALONE], ids=["torchrun", "own"])
def test_a_mistake_is_said_once(start: list[str], lm_overrides: list[str], tmp_path: Path) -> None:
    result = command(start, "train", "lm", *lm_overrides, f"out={tmp_path}", "lm.latent_dim=7", "trainer.devices=2")
    assert result.returncode != 0
    assert result.stderr.count("error: the latents have 4 dimensions") == 1, result.stderr
    assert start is TORCHRUN or result.returncode == 2
