from __future__ import annotations

import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kalle.training import callbacks as progress
from kalle.training.callbacks import RunProgress


@pytest.fixture
def trainer() -> Any:
    return SimpleNamespace(is_global_zero=True, sanity_checking=False, global_step=100, max_steps=200, callback_metrics={})


def test_log_lines_tell_step_loss_and_time(trainer: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    caplog.set_level("INFO")
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    line = RunProgress(log_every_seconds=30)
    line.on_train_start(trainer, None)  # type: ignore[arg-type]
    now[0] += 20
    trainer.global_step = 110
    line.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    assert not caplog.text
    now[0] += 40
    trainer.global_step, trainer.callback_metrics = 120, {"train/loss": torch.tensor(1.5)}
    line.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    # 20 steps since the resume took 60 s, so the 80 to go take 240 s.
    assert "step 120/200, loss 1.500, 4.0 min left" in caplog.text


def test_a_run_of_epochs_knows_its_steps(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trainer.max_steps, trainer.estimated_stepping_batches = -1, 150
    line = RunProgress(log_every_seconds=0)
    line.on_train_start(trainer, None)  # type: ignore[arg-type]
    line.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    assert "step 100/150" in caplog.text


def test_validation_is_reported(trainer: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    trainer.callback_metrics = {"train/loss": torch.tensor(2.0), "val/mel_l1": torch.tensor(0.25)}
    RunProgress().on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert caplog.messages == ["step 100: mel_l1 0.250"]
    trainer.is_global_zero = False
    RunProgress().on_validation_end(trainer, None)  # type: ignore[arg-type]
    assert len(caplog.messages) == 1


def test_a_terminal_gets_a_bar_that_is_closed_on_failure(trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = RunProgress()
    bar.on_train_start(trainer, None)  # type: ignore[arg-type]
    assert bar._bar is not None
    assert bar._bar.tasks[0].completed == 100
    trainer.global_step = 101
    bar.on_train_batch_end(trainer, None)  # type: ignore[arg-type]
    assert bar._bar.tasks[0].completed == 101
    assert bar._bar.tasks[0].total == 200
    bar.on_exception(trainer, None, RuntimeError())  # type: ignore[arg-type]
    assert bar._bar is None
    bar.on_train_end(trainer, None)  # type: ignore[arg-type]
