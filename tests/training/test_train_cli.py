"""`kalle train` as a user runs it, at toy size."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from kalle.checkpoint import read_json
from kalle.cli.main import main
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.kalle import Kalle
from kalle.training.checkpointing import LAST

ROOT = Path(__file__).parents[2]


def train(stage: str, overrides: list[str], *more: str) -> int:
    return main(["train", stage, *overrides, *more])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "csv" / "version_0" / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def test_flowvae_run_leaves_weights_logs_and_configuration(flowvae_overrides: list[str], toy_corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train("flowvae", flowvae_overrides, f"out={out}", "logger=all", "wandb_offline=true") == 0
    flowvae = FlowVAE.from_pretrained(out / "weights")
    assert flowvae.config.latent_dim == 4
    assert flowvae.decode(flowvae.encode(torch.zeros(1, 3200)).mean).shape == (1, 3200)
    losses = [float(row["train/total"]) for row in rows(out) if row.get("train/total")]
    assert len(losses) == 6
    assert any(row.get("val/mel_l1") for row in rows(out))
    assert any(row.get("lr-AdamW") for row in rows(out))
    assert list((out / "tensorboard").glob("events*"))
    assert list((out / "wandb").glob("offline-run-*"))
    saved = OmegaConf.load(out / "config.yaml")
    assert saved.data.corpus == str(toy_corpus)
    found = {path.name for path in out.iterdir()} - {"git.diff"}  # only with uncommitted changes
    assert found == {"checkpoints", "config.yaml", "csv", "run.json", "tensorboard", "wandb", "weights"}
    assert read_json(out / "weights" / "config.json") == {"format_version": 1, "parts": ["flowvae"], "sample_rate": 16000}


def test_lm_run_leaves_a_folder_that_speaks(lm_overrides: list[str], toy_weights: Path, toy_latents: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train("lm", lm_overrides, f"out={out}", f"flowvae={toy_weights}", "logger=tensorboard") == 0
    info = read_json(toy_latents / "info.json")
    lm = KalleLM.from_pretrained(out / "weights")
    torch.testing.assert_close(lm.latent_mean, torch.tensor(info["mean"]))
    torch.testing.assert_close(lm.latent_std, torch.tensor(info["std"]))
    assert Kalle.from_pretrained(out / "weights", device="cpu").synthesize("Hi.", seed=1).sample_rate == 16000
    described = {"format_version": 1, "parts": ["flowvae", "lm", "tokenizer"], "sample_rate": 16000}
    assert read_json(out / "weights" / "config.json") == described


def test_without_a_flowvae_the_folder_says_so(lm_overrides: list[str], tmp_path: Path) -> None:
    assert train("lm", lm_overrides, f"out={tmp_path}", "trainer.max_steps=1") == 0
    assert read_json(tmp_path / "weights" / "config.json")["parts"] == ["lm", "tokenizer"]


def test_speaker_variant_speaks_with_a_drawn_voice(lm_overrides: list[str], toy_weights: Path, tmp_path: Path) -> None:
    variant = [word.replace("lm=nano", "lm=nano_speaker") for word in lm_overrides]
    more = ["data=lm_speaker", "data.speaker.crop_frames=20", "objective.speaker_drop=0.5", "trainer.max_steps=2"]
    assert train("lm", variant, f"out={tmp_path}", f"flowvae={toy_weights}", *more) == 0
    kalle = Kalle.from_pretrained(tmp_path / "weights", device="cpu")
    assert kalle.lm.speaker_encoder is not None
    one, other = (kalle.synthesize("Hi.", kalle.random_voice(seed), seed=1, max_seconds=0.1).audio for seed in (3, 4))
    assert len(one)
    assert one.shape != other.shape or (one != other).any()


def test_init_continues_from_weights(lm_overrides: list[str], toy_weights: Path, tmp_path: Path) -> None:
    assert train("lm", lm_overrides, f"out={tmp_path}", f"init={toy_weights}", "optimizer.lr=0.0", "trainer.max_steps=2") == 0
    before, after = (load_file(folder / "lm" / "model.safetensors") for folder in (toy_weights, tmp_path / "weights"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("stage", "more", "message"),
    [
        ("lm", ["lm.latent_dim=8"], "the latents have 4 dimensions but lm.latent_dim is 8; set lm.latent_dim=4"),
        (
            "lm",
            ["resume=gone.ckpt"],
            "no checkpoint to resume from: got resume='gone.ckpt', expected auto, never or an existing .ckpt file",
        ),
        ("lm", ["device=tpu9"], "unknown device: got 'tpu9'"),
        ("flowvae", ["data.segment_samples=1000"], "segment_samples must be a positive multiple of the samples per frame (160): got 1000"),
        ("flowvae", ["flowvae.encoder.strides=[10,15]"], "encoder and decoder must agree on the samples per frame: got 150 and 160"),
        ("flowvae", ["data.hop_length=320"], "data.hop_length is 320 but the Flow-VAE has 160 samples a frame; set data.hop_length=160"),
        ("flowvae", ["precision=fp7"], "Lightning refuses its values: Precision 'fp7' is invalid"),
    ],
)
def test_mistakes_are_one_line(stage: str, more: list[str], message: str, flowvae_overrides, lm_overrides, tmp_path, capsys) -> None:
    overrides = flowvae_overrides if stage == "flowvae" else lm_overrides
    assert train(stage, overrides, f"out={tmp_path / 'run'}", *more) == 2
    error = capsys.readouterr().err
    assert message in error, error
    assert len(error.splitlines()) == 1
    assert error.startswith("error: ")
    assert not (tmp_path / "run" / "weights").exists()


def test_ctrl_c_is_one_line_and_130(lm_overrides: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    from lightning.pytorch.callbacks import Callback

    class CtrlC(Callback):
        def on_before_optimizer_step(self, trainer, *_) -> None:
            if trainer.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr("kalle.training.session.StepSeeds", lambda seed: CtrlC())
    assert train("lm", lm_overrides, f"out={tmp_path}") == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; run the same command again to continue"
    assert torch.load(tmp_path / "checkpoints" / LAST, weights_only=True)["global_step"] == 2


def test_ctrl_c_before_the_first_step_is_130_too(lm_overrides: list[str], tmp_path: Path, capsys, monkeypatch) -> None:
    from kalle.training.callbacks import RunProgress

    def press(*_: object) -> None:
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(RunProgress, "on_fit_start", press)
    try:
        assert train("lm", lm_overrides, f"out={tmp_path}") == 130
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores Ctrl-C from then on
    assert capsys.readouterr().err.splitlines()[-1] == "error: interrupted; run the same command again to continue"


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_real_process_is_stopped_and_continues(stop: int, workers: int, lm_overrides: list[str], tmp_path: Path) -> None:
    steps = 400
    longer = [
        f"trainer.max_steps={steps}",
        "callbacks.checkpoint.every_steps=20",
        "trainer.val_check_interval=50",
        f"data.num_workers={workers}",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}

    def start(out: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "kalle", "train", "lm", *lm_overrides, *longer, f"out={out}"]
        return subprocess.Popen(
            command, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
        )

    whole = start(tmp_path / "whole")
    assert whole.wait(600) == 0
    cut, checkpoint = start(tmp_path / "cut"), tmp_path / "cut" / "checkpoints" / LAST
    until = time.monotonic() + 300
    while not checkpoint.is_file() and time.monotonic() < until:
        time.sleep(0.02)
    os.killpg(cut.pid, stop)  # a terminal sends Ctrl-C to the data workers too
    error = cut.communicate(timeout=300)[1]
    state = torch.load(checkpoint, weights_only=True)
    assert 20 <= state["global_step"] < steps, "stopped too late to say anything"
    if stop == signal.SIGINT:
        assert cut.returncode == 130, error
        assert error.splitlines()[-1] == "error: interrupted; run the same command again to continue"
    else:
        assert cut.returncode == -signal.SIGKILL
        assert state["global_step"] % 10 == 0
    assert not (tmp_path / "cut" / "weights").exists()
    assert start(tmp_path / "cut").wait(600) == 0
    one, other = (load_file(tmp_path / name / "weights" / "lm" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)
