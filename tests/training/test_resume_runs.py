"""A run that was cut short and continued equals one that was not, to the last bit."""

from __future__ import annotations

import csv
import dataclasses
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
import yaml
from lightning.pytorch.callbacks import Callback
from safetensors.torch import load_file

from kalle.cli.hydra_entry import compose
from kalle.cli.train import training_config
from kalle.errors import UserError
from kalle.training import FlowVAETrainingConfig, TrainingResult, WarmupCosine, train_flowvae, train_lm
from kalle.training.checkpointing import LAST, CheckpointConfig, step_of, step_path, step_paths

Train = Callable[..., TrainingResult]
STAGES = ("flowvae", "lm")
STEPS = 8


@pytest.fixture(scope="module")
def train(flowvae_overrides: list[str], lm_overrides: list[str]) -> Train:
    """(stage, out, callbacks, ``trainer`` and other changes of the configuration) -> a run of 8 steps."""
    common = {"flowvae": [*flowvae_overrides, "callbacks.metrics=null", "callbacks.media=null"], "lm": lm_overrides}
    configs = {stage: training_config(compose(f"train_{stage}", [*common[stage], "out=o"])) for stage in STAGES}

    def run(stage: str, out: Path, *callbacks: Callback, trainer: dict[str, Any] | None = None, **changes: Any) -> TrainingResult:
        config = configs[stage]
        changed = dataclasses.replace(config.trainer, **{"max_steps": STEPS, **(trainer or {})})
        schedule = {"scheduler": WarmupCosine(2, STEPS)} if stage == "lm" else {}
        config = dataclasses.replace(config, out=out, trainer=changed, **schedule, **changes)
        if isinstance(config, FlowVAETrainingConfig):
            return train_flowvae(config, callbacks=callbacks)
        return train_lm(config, callbacks=callbacks)

    def saving(stage: str, out: Path, *callbacks: Callback, every: int = 3, keep: int = 2, **changes: Any) -> TrainingResult:
        parts = dataclasses.replace(configs[stage].callbacks, checkpoint=CheckpointConfig(every, keep=keep))
        return run(stage, out, *callbacks, callbacks=parts, **changes)

    return saving


@pytest.fixture(scope="module")
def whole(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run of a stage that nothing disturbs, with the states of all steps."""
    made: dict[str, Path] = {}

    def get(stage: str) -> Path:
        if stage not in made:
            made[stage] = tmp_path_factory.mktemp(stage) / "whole"
            batches = train(stage, made[stage], every=1, keep=STEPS + 1).trainer.num_training_batches
            assert 4 <= batches <= 7, "the cuts are meant to fall inside and behind the first epoch"
        return made[stage]

    return get


def cut(whole: Path, out: Path, step: int) -> Path:
    """``whole`` as a process would have left it that was killed after ``step`` was saved and later ones were logged."""
    shutil.copytree(whole, out, symlinks=True, ignore=shutil.ignore_patterns("weights"))
    for path in step_paths(out / "checkpoints"):
        if (step_of(path) or 0) > step:
            path.unlink()
    (out / "checkpoints" / LAST).unlink()
    (out / "checkpoints" / LAST).symlink_to(step_path(out, step).name)
    return out


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
def test_resume_from_any_step_equals_uninterrupted(
    stage: str, step: int, train: Train, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    """In the middle of an epoch of six batches or fewer, at its end and in the next; validation falls on step 4."""
    out = cut(whole(stage), tmp_path / "cut", step)
    resumed = train(stage, out)
    assert resumed.trainer.global_step == STEPS
    assert_same_end(whole(stage), out, stage)
    tables = [folder / "csv" / "version_0" / "metrics.csv" for folder in (whole(stage), out)]
    lines = [table.read_text().splitlines() for table in tables]
    assert lines[0] == lines[1]
    assert tables[0].read_bytes() == tables[1].read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_last_checkpoint_holds_both_kinds_of_weights(stage: str, whole: Callable[[str], Path]) -> None:
    state, exported = checkpoint(whole(stage)), load_file(whole(stage) / "weights" / stage / "model.safetensors")
    averaged = {name: tensor for name, tensor in state["state_dict"].items() if name.startswith(f"{stage}.")}
    current = {name: tensor for name, tensor in state["current_model_state"].items() if name.startswith(f"{stage}.")}
    assert exported
    for name, tensor in exported.items():
        assert torch.equal(tensor, averaged[f"{stage}.{name}"]), name
    assert any(not torch.equal(averaged[name], current[name]) for name in averaged)
    assert state["global_step"] == STEPS


@pytest.mark.parametrize("stage", STAGES)
def test_a_complete_run_exports_the_same_again(stage: str, train: Train, whole: Callable[[str], Path], tmp_path: Path) -> None:
    out = cut(whole(stage), tmp_path / "run", STEPS)
    train(stage, out)
    assert_equal(*(load_file(folder / "weights" / stage / "model.safetensors") for folder in (whole(stage), out)))


def test_a_run_of_an_earlier_version_goes_on(train: Train, whole: Callable[[str], Path], tmp_path: Path) -> None:
    """Its checkpoints held one row in place of all rows of a step; its config.yaml other keys, and what builds each part."""
    out = cut(whole("lm"), tmp_path / "old", 3)
    path = step_path(out / "checkpoints", 3)
    state = torch.load(path, weights_only=True)
    pending = state["callbacks"]["LastCheckpoint"]
    pending["row"] = {name: value for row in pending.pop("rows") for name, value in row.items()}
    torch.save(state, path)
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["objective"]["_target_"] = config["data"]["_target_"] = "somewhere.else"
    config["data"] |= {"seed": 3, "packing": False}
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    train("lm", out)
    assert_same_end(whole("lm"), out, "lm")
    assert log_rows(whole("lm")) == log_rows(out)


def test_never_starts_anew_and_a_path_is_taken(train: Train, whole: Callable[[str], Path], tmp_path: Path) -> None:
    source = shutil.copy(step_path(whole("lm") / "checkpoints", 3), tmp_path / "kept.ckpt")
    from_path = train("lm", tmp_path / "two", resume=str(source))
    anew = train("lm", cut(whole("lm"), tmp_path / "one", 3), resume="never")
    assert from_path.trainer.global_step == anew.trainer.global_step == STEPS
    assert_same_end(whole("lm"), tmp_path / "two", "lm")
    assert_same_end(whole("lm"), tmp_path / "one", "lm")


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


@pytest.mark.parametrize(
    ("stage", "where", "step", "saved"),
    [("lm", "train", 1, 2), ("lm", "train", 4, 5), ("lm", "validation", 4, 4), ("flowvae", "train", 4, 5), ("flowvae", "validation", 4, 4)],
)
def test_ctrl_c_saves_and_the_run_can_go_on(
    stage: str, where: str, step: int, saved: int, train: Train, whole: Callable[[str], Path], tmp_path: Path
) -> None:
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(stage, tmp_path / "cut", CtrlC(step, where))
    assert signal.getsignal(signal.SIGINT) is handler
    assert not (tmp_path / "cut" / "weights").exists()
    names = sorted(path.name for path in (tmp_path / "cut" / "checkpoints").iterdir())
    assert names[0] == LAST
    assert names[-1] == f"step-{saved:08d}.ckpt"
    assert len(names) <= 3
    assert checkpoint(tmp_path / "cut")["global_step"] == saved
    train(stage, tmp_path / "cut")
    assert_same_end(whole(stage), tmp_path / "cut", stage)
    assert log_rows(whole(stage)) == log_rows(tmp_path / "cut")


def test_a_second_ctrl_c_does_not_wait(train: Train, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train("lm", tmp_path / "cut", CtrlC(5, times=2))
    # Step 5 was in motion: what counts is the state before the validation at step 4.
    assert checkpoint(tmp_path / "cut")["global_step"] == 4


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_ends_with_its_epochs_is_complete_too(stage: str, train: Train, tmp_path: Path) -> None:
    ends = {"max_steps": -1, "max_epochs": 2, "val_check_interval": 1000}
    run = train(stage, tmp_path / "run", every=1000, trainer=ends)
    state, last = checkpoint(tmp_path / "run"), tmp_path / "run" / "weights" / stage / "model.safetensors"
    assert state["global_step"] == run.trainer.global_step == 2 * run.trainer.num_training_batches
    current, average = state["current_model_state"], state["state_dict"]
    assert any(not torch.equal(current[name], average[name]) for name in current), "the weights in training, not their average twice"
    before = load_file(last)
    shutil.rmtree(tmp_path / "run" / "weights")
    again = train(stage, tmp_path / "run", every=1000, trainer=ends)
    assert again.trainer.global_step == run.trainer.global_step
    assert_equal(before, load_file(last))


def test_a_full_disk_is_one_line_and_keeps_the_old_checkpoint(train: Train, whole: Callable[[str], Path], tmp_path: Path) -> None:
    path = cut(whole("lm"), tmp_path / "run", 2) / "checkpoints" / LAST
    step_path(path.parent, 1).unlink()
    old = path.read_bytes()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old) // 2, before[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write '.*step-00000004.ckpt': .*make room on the disk or choose another folder"):
            train("lm", tmp_path / "run", trainer={"max_steps": 4})
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
    train("lm", tmp_path / "run", trainer={"max_steps": 2})
    assert [Path(name).parent for name in written] == [tmp_path / "run" / "checkpoints"]
    assert [Path(name).name[:18] for name in written] == ["step-00000002.ckpt"]


def test_every_steps_must_be_positive() -> None:
    with pytest.raises(UserError, match=r"every_steps: got 0, expected at least 1"):
        CheckpointConfig(every_steps=0)
