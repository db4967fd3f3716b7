"""What a run says before it starts, and what it leaves beside the weights."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch

from kalle.cli.main import main
from kalle.errors import UserError
from kalle.training import session as run_record
from kalle.training.callbacks import StepSeeds
from kalle.training.checkpointing import BEST, LAST, CheckpointConfig, LastCheckpoint, step_paths
from kalle.training.plan import Footprint, Plan, SplitCount
from training.test_update_guard import Line, batches


def test_a_run_leaves_its_record_and_says_what_it_does(lm_overrides: list[str], tmp_path: Path, capfd, monkeypatch) -> None:
    out = tmp_path / "run"
    for steps in (1, 2):
        words = [*lm_overrides, f"out={out}", f"trainer.max_steps={steps}", "scheduler.total_steps=2"]
        monkeypatch.setattr("sys.argv", ["kalle", "train", "lm", *words])  # the record is of the process's own command
        assert main() == 0
    said = "".join(capfd.readouterr())
    assert "data: train 12 utterances" in said
    assert "steps: 2 of " in said
    starts = json.loads((out / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, str(out / "checkpoints" / "step-00000001.ckpt")]
    first = starts[0]
    assert first["seed"] == first["config"]["seed"] == 3
    assert torch.__version__.startswith(first["versions"]["torch"])
    assert first["machine"]["world_size"] == 1
    assert first["command"][1:3] == ["train", "lm"]
    assert f"out={out}" in first["command"]


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_shows_every_step_once_after_a_resume(lm_overrides: list[str], tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = [*lm_overrides, f"out={tmp_path}", "logger=tensorboard", "scheduler.total_steps=7", "callbacks.checkpoint.keep=9"]
    assert main(["train", "lm", *words, "trainer.max_steps=5"]) == 0
    (tmp_path / "checkpoints" / "step-00000005.ckpt").unlink()  # as if killed before it was written
    assert main(["train", "lm", *words, "trainer.max_steps=7"]) == 0
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("train/total", "lr-AdamW"):
        assert [event.step for event in events.Scalars(name)] == list(range(7)), name
    assert [event.step for event in events.Scalars("val/total")] == [3]


@pytest.mark.parametrize("stage", ["lm", "flowvae"])
def test_a_dry_run_counts_and_writes_nothing(stage: str, lm_overrides, flowvae_overrides, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    overrides = lm_overrides if stage == "lm" else flowvae_overrides
    assert main(["train", stage, *overrides, "out=run", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "data: train 12 utterances" in said
    for fact in ("steps: 6 of ", "memory a process, estimated: ", "compute: ", "disk: ", "start: the first step", "nothing was trained"):
        assert fact in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_of_the_full_model_is_cheap(lm_overrides: list[str], tmp_path: Path, capsys) -> None:
    data = next(word for word in lm_overrides if word.startswith("data.latents"))
    words = ["lm=full", "lm.latent_dim=4", "tokenizer=bytes", data, "device=cpu", f"out={tmp_path / 'run'}"]
    assert main(["train", "lm", *words, "compact_vocabulary=false", "--dry-run"]) == 0
    assert "1235.9 M parameters" in capsys.readouterr().out
    assert main(["train", "lm", *words, "lora=default", "packing=true", "activation_checkpointing=true", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "1247.1 M parameters, 11.3 M trained" in said
    assert "packed rows of" in said


def test_a_dry_run_knows_mixes(lm_overrides: list[str], tmp_path: Path, capsys) -> None:
    folder = next(word for word in lm_overrides if word.startswith("data.latents")).partition("=")[2]
    shutil.copytree(folder, tmp_path / "other")
    mix = [f"data.latents=[{folder},{tmp_path / 'other'}]", "data.mix=equal", f"out={tmp_path / 'run'}"]
    assert main(["train", "lm", *lm_overrides, *mix, "--dry-run"]) == 0
    assert "data: train 24 utterances" in capsys.readouterr().out


def test_a_dry_run_finds_mistakes(lm_overrides: list[str], tmp_path: Path, capsys) -> None:
    assert main(["train", "lm", *lm_overrides, f"out={tmp_path / 'run'}", "lm.latent_dim=8", "--dry-run"]) == 2
    assert "the latents have 4 dimensions but lm.latent_dim is 8" in capsys.readouterr().err


def test_the_plan_adds_up() -> None:
    plan = Plan(
        stage="lm", parameters=1_000_000, trained=500_000, averaged=True, precision="32-true", processes=2,
        splits={"train": SplitCount(10, 2.0, {"too long": 3}), "valid": SplitCount(1, 0.1, {})},
        batches_per_epoch=10, accumulate=4, max_steps=30, max_epochs=None, kept_checkpoints=2, resumed_from=None, free_bytes=10,
        footprint=Footprint(1_000_000, 2 * 10**12, "a batch"),
    )  # fmt: skip
    assert plan.steps_per_epoch == 3
    assert plan.checkpoint_bytes == 8_000_000 + 4_000_000
    said = "\n".join(plan.lines())
    assert "train 10 utterances, 2.00 h, 3 left out: too long" in said
    assert "30 of 3 an epoch on 2 process(es): 10.0 epochs, 20.0 h of speech" in said
    assert "15.0 MB = weights 4.0 MB, gradients 2.0 MB, AdamW 4.0 MB, average 4.0 MB, activations 1.0 MB" in said
    assert "8 TFLOP a step" in said
    assert "TOO LITTLE" in said


def test_git_state_of_a_checkout_and_of_none(tmp_path: Path, monkeypatch) -> None:
    assert run_record.git_state(tmp_path) == (None, b"")
    repository = tmp_path / "checkout"
    repository.mkdir()
    source = repository / "run_record.py"
    source.write_text("one\n")
    for words in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "m"]):
        subprocess.run(["git", *words], cwd=repository, check=True)
    monkeypatch.setattr(run_record, "__file__", str(source))
    state, difference = run_record.git_state(repository)
    assert state is not None
    assert len(state["commit"]) == 40
    assert (state["dirty"], difference) == (False, b"")
    source.write_text("two\n")
    (repository / "new").touch()
    state, difference = run_record.git_state(repository)
    assert state is not None
    assert state["dirty"]
    assert state["untracked"] == ["new"]
    assert b"+two" in difference
    monkeypatch.setattr(run_record, "__file__", str(repository / "new"))
    assert run_record.git_state(repository) == (None, b""), "a file that the checkout does not hold"


class Draws(Line):
    """Notes what the global generators give in every step."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[tuple[float, float, float]] = []

    def training_step(self, batch, batch_idx: int):
        self.drawn.append((random.random(), float(np.random.random()), float(torch.rand(()))))  # noqa: NPY002
        return super().training_step(batch, batch_idx)


def test_global_generators_are_a_function_of_the_step(fit) -> None:
    drawn = []
    for disturbed in (0, 3):
        module = Draws()
        for _ in range(disturbed):
            random.random(), torch.rand(())
        fit(module, batches(4), 4, callbacks=[StepSeeds(7)])
        drawn.append(module.drawn)
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 4


class Judged(Line):
    """Validates to a value a list gives."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = iter(values)

    def validation_step(self, batch, batch_idx: int) -> None:
        self.log("val/loss", next(self.values))


def checkpointed(tmp_path: Path, values: list[float], **options: object) -> lightning.Trainer:
    module = Judged(values)
    callback = LastCheckpoint(tmp_path, CheckpointConfig(100, **options))  # type: ignore[arg-type]
    trainer = lightning.Trainer(
        max_steps=8, max_epochs=-1, accelerator="cpu", logger=False, callbacks=[callback], num_sanity_val_steps=0, val_check_interval=2,
        check_val_every_n_epoch=None, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    made = batches(8)
    loaders = [torch.utils.data.DataLoader(part, batch_size=None, collate_fn=lambda batch: batch) for part in (made, made[:1])]
    trainer.fit(module, *loaders)
    return trainer


@pytest.mark.parametrize("first", [3.0, float("nan")])
@pytest.mark.parametrize(("mode", "step"), [("min", 4), ("max", 6)])
def test_the_best_state_outlives_the_newest(mode: str, step: int, first: float, tmp_path: Path) -> None:
    checkpointed(tmp_path, [first, 1.0, 4.0, 2.0], best="val/loss", best_mode=mode, keep=1)
    assert torch.load(tmp_path / BEST, weights_only=True)["global_step"] == step
    assert [path.name for path in step_paths(tmp_path)] == ["step-00000008.ckpt"]
    assert torch.load(tmp_path / LAST, weights_only=True)["global_step"] == 8


def test_an_unknown_metric_is_an_error_that_lists_the_known(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"best: got 'val/los', expected one of val/loss"):
        checkpointed(tmp_path, [1.0] * 9, best="val/los")


def test_a_disk_that_is_full_for_a_while_costs_nothing(tmp_path: Path, monkeypatch, caplog) -> None:
    """The state in the middle is not saved, the run goes on, the next is."""
    import errno

    import kalle.training.checkpointing as files

    original = torch.save

    def save(state: dict, file: object) -> None:
        if state["global_step"] == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(state, file)

    monkeypatch.setattr(files.torch, "save", save)
    checkpointed(tmp_path, [1.0] * 9, keep=5)
    assert [path.name for path in step_paths(tmp_path)] == [f"step-0000000{step}.ckpt" for step in (8, 6, 2)]
    assert "step 4 is not saved, the run continues and tries again later: cannot write" in caplog.text


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"every_minutes": 0.0}, {"best_mode": "least"}])
def test_wrong_values_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        CheckpointConfig(**wrong)  # type: ignore[arg-type]


def test_minutes_make_a_state_due_as_well(tmp_path: Path) -> None:
    checkpointed(tmp_path, [1.0] * 9, keep=9, every_minutes=1e-9)
    assert len(step_paths(tmp_path)) == 8
