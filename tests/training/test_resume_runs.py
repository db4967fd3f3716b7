"""A run that was cut short and continued equals one that was not, to the last bit."""

from __future__ import annotations

import csv
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from kalle.cli.hydra_entry import compose
from kalle.cli.train_flowvae import train_flowvae
from kalle.cli.train_lm import train_lm
from kalle.cli.train_run import TrainingRun
from kalle.errors import UserError
from kalle.training.checkpointing import LAST, LastCheckpoint

Train = Callable[..., TrainingRun]
STAGES = ("flowvae", "lm")


@pytest.fixture
def train(flowvae_overrides: list[str], lm_overrides: list[str]) -> Train:
    def run(stage: str, out: Path, *overrides: str) -> TrainingRun:
        common, function = (flowvae_overrides, train_flowvae) if stage == "flowvae" else (lm_overrides, train_lm)
        return function(compose(f"train_{stage}", [*common, f"out={out}", *overrides]))

    return run


def checkpoint(out: Path) -> dict[str, Any]:
    """The last checkpoint, read without running any code that it may hold."""
    return torch.load(out / "checkpoints" / LAST, weights_only=True)


def assert_equal(one: Any, other: Any, where: str = "") -> None:
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_equal(a, b, f"{where}/{index}")
    else:
        assert one == other, where


def log_rows(out: Path) -> list[dict[str, str]]:
    """Everything a run logged, one dictionary a step and kind of row, whatever the order of the columns; no step may appear twice."""
    assert [path.name for path in (out / "csv").iterdir()] == ["version_0"]
    with (out / "csv" / "version_0" / "metrics.csv").open() as file:
        rows = [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]
    merged: dict[int, dict[str, str]] = {}
    for row in rows:
        step = merged.setdefault(int(row["step"]), {})
        assert not {name for name in row if name not in ("step", "epoch")} & step.keys(), f"twice in the log: {row}"
        step |= row
    return [merged[step] for step in sorted(merged)]


def assert_same_end(one: Path, other: Path, stage: str) -> None:
    a, b = checkpoint(one), checkpoint(other)
    for key in ("global_step", "state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers"):
        assert_equal(a[key], b[key], key)
    assert_equal(*(load_file(out / "weights" / stage / "model.safetensors") for out in (one, other)))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("step", [1, 3, 4, 6])
def test_resume_from_any_step_equals_uninterrupted(stage: str, step: int, train: Train, tmp_path: Path) -> None:
    """In the middle of an epoch of six batches or fewer, at its end and in the next; validation falls on step 4."""
    longer = ("trainer.max_steps=8",)
    whole = train(stage, tmp_path / "whole", *longer)
    batches = whole.trainer.num_training_batches
    assert 4 <= batches <= 7, "the cuts are meant to fall inside and behind the first epoch"
    # A schedule that ends with max_steps would make the first part another run than the beginning of the whole.
    train(stage, tmp_path / "cut", f"trainer.max_steps={step}", *(["scheduler.total_steps=8"] if stage == "lm" else []))
    assert checkpoint(tmp_path / "cut")["global_step"] == step
    resumed = train(stage, tmp_path / "cut", *longer)
    assert resumed.trainer.global_step == whole.trainer.global_step == 8
    assert resumed.metrics["train/loss"] == whole.metrics["train/loss"]
    assert_same_end(tmp_path / "whole", tmp_path / "cut", stage)


@pytest.mark.parametrize("stage", STAGES)
def test_last_checkpoint_holds_both_kinds_of_weights(stage: str, train: Train, tmp_path: Path) -> None:
    run = train(stage, tmp_path / "run")
    state, part = checkpoint(tmp_path / "run"), stage
    exported = load_file(tmp_path / "run" / "weights" / part / "model.safetensors")
    averaged = {name: tensor for name, tensor in state["state_dict"].items() if name.startswith(f"{part}.")}
    current = {name: tensor for name, tensor in state["current_model_state"].items() if name.startswith(f"{part}.")}
    assert exported
    for name, tensor in exported.items():
        assert torch.equal(tensor, averaged[f"{part}.{name}"]), name
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)
    assert_equal({name: tensor.cpu() for name, tensor in run.module.state_dict().items()}, dict(state["state_dict"]))
    assert state["global_step"] == 6


@pytest.mark.parametrize("stage", STAGES)
def test_a_complete_run_exports_the_same_again(stage: str, train: Train, tmp_path: Path) -> None:
    train(stage, tmp_path / "run")
    before = load_file(tmp_path / "run" / "weights" / stage / "model.safetensors")
    shutil.rmtree(tmp_path / "run" / "weights")
    train(stage, tmp_path / "run")
    assert_equal(before, load_file(tmp_path / "run" / "weights" / stage / "model.safetensors"))


def test_never_starts_anew_and_a_path_is_taken(train: Train, tmp_path: Path) -> None:
    train("lm", tmp_path / "one", "trainer.max_steps=3", "scheduler.total_steps=6")
    source = shutil.copy(tmp_path / "one" / "checkpoints" / LAST, tmp_path / "kept.ckpt")
    from_path = train("lm", tmp_path / "two", f"resume={source}")
    anew = train("lm", tmp_path / "one", "resume=never")
    assert from_path.trainer.global_step == anew.trainer.global_step == 6
    assert_same_end(tmp_path / "one", tmp_path / "two", "lm")


class CtrlC(Callback):
    """Presses Ctrl-C ``times`` in the middle of an update, or in the middle of a validation."""

    def __init__(self, step: int, where: str = "train", times: int = 1) -> None:
        self.step, self.where, self.times = step, where, times

    def _press(self, trainer: lightning.Trainer, where: str) -> None:
        if trainer.global_step == self.step and where == self.where:
            while self.times:  # once, not at every batch of a validation
                self.times -= 1
                os.kill(os.getpid(), signal.SIGINT)

    def on_before_optimizer_step(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._press(trainer, "train")

    def on_validation_batch_start(self, trainer: lightning.Trainer, *_: Any) -> None:
        self._press(trainer, "validation")


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("where", "step", "saved"), [("train", 1, 2), ("train", 4, 5), ("validation", 4, 4)])
def test_ctrl_c_saves_and_the_run_can_go_on(
    stage: str, where: str, step: int, saved: int, train: Train, tmp_path: Path, monkeypatch
) -> None:
    train(stage, tmp_path / "whole")
    handler = signal.getsignal(signal.SIGINT)
    with monkeypatch.context() as patch:
        _add_callback(patch, CtrlC(step, where))
        with pytest.raises(KeyboardInterrupt):
            train(stage, tmp_path / "cut")
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "cut" / "weights").exists()
    names = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert names[0] == LAST
    assert names[-1] == f"step-{saved:08d}.ckpt"
    assert len(names) <= 3
    assert checkpoint(tmp_path / "cut")["global_step"] == saved
    train(stage, tmp_path / "cut")
    assert_same_end(tmp_path / "whole", tmp_path / "cut", stage)
    assert log_rows(tmp_path / "whole") == log_rows(tmp_path / "cut")


def test_a_second_ctrl_c_does_not_wait(train: Train, tmp_path: Path, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        _add_callback(patch, CtrlC(5, times=2))
        with pytest.raises(KeyboardInterrupt):
            train("lm", tmp_path / "cut")
    # Step 5 was in motion: what counts is the state before the validation at step 4.
    assert checkpoint(tmp_path / "cut")["global_step"] == 4


def _add_callback(patch: pytest.MonkeyPatch, callback: Callback) -> None:
    from kalle.cli import train_flowvae, train_lm

    original = train_lm.build_callbacks
    for module in (train_flowvae, train_lm):
        patch.setattr(module, "build_callbacks", lambda config: [callback, *original(config)])


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_ends_with_its_epochs_is_complete_too(stage: str, train: Train, tmp_path: Path) -> None:
    more = ("trainer.max_steps=-1", "trainer.max_epochs=2", "callbacks.checkpoint.every_steps=1000")
    more += ("trainer.val_check_interval=1000", *(["scheduler.total_steps=20"] if stage == "lm" else []))
    run = train(stage, tmp_path / "run", *more)
    state, last = checkpoint(tmp_path / "run"), tmp_path / "run" / "weights" / stage / "model.safetensors"
    assert state["global_step"] == run.trainer.global_step == 2 * run.trainer.num_training_batches
    current, average = state["current_model_state"], state["state_dict"]
    assert any(not torch.equal(current[name], average[name]) for name in current), "the weights in training, not their average twice"
    before = load_file(last)
    shutil.rmtree(tmp_path / "run" / "weights")
    again = train(stage, tmp_path / "run", *more)
    assert again.trainer.global_step == run.trainer.global_step
    assert_equal(before, load_file(last))


def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(train: Train, tmp_path: Path) -> None:
    train("lm", tmp_path / "run", "trainer.max_steps=2")
    path = tmp_path / "run" / "checkpoints" / LAST
    old = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write '.*step-00000004.ckpt': .*make room on the disk or choose another folder"):
            train("lm", tmp_path / "run", "trainer.max_steps=4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert sorted(file.name for file in path.parent.iterdir()) == [LAST, "step-00000002.ckpt"]
    assert path.read_bytes() == old


def test_checkpoints_are_written_where_they_belong(train: Train, tmp_path: Path, monkeypatch) -> None:
    """Neither a copy in memory nor one in the system's temporary folder, which may be small."""
    written: list[Any] = []
    original = torch.save

    def save(state: Any, file: Any, *rest: Any, **more: Any) -> None:
        written.append(getattr(file, "name", file))
        original(state, file, *rest, **more)

    monkeypatch.setattr(torch, "save", save)
    train("lm", tmp_path / "run", "trainer.max_steps=2")
    assert [Path(name).parent for name in written] == [tmp_path / "run" / "checkpoints"]
    assert [Path(name).name[:18] for name in written] == ["step-00000002.ckpt"]


def test_every_steps_must_be_positive(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"every_steps: got 0, expected at least 1"):
        LastCheckpoint(str(tmp_path), 0)
