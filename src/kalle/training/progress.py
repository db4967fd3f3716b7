"""One line that tells how far a whole run is, how fast it goes and when it will end."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

import lightning
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

logger = logging.getLogger(__name__)


class RunProgress(Callback):
    """A rich bar over all steps on a terminal; elsewhere a log line every ``log_every_seconds``."""

    def __init__(self, log_every_seconds: float = 30.0) -> None:
        self.log_every_seconds = log_every_seconds
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = self._logged = 0.0
        self._first_step = self._steps = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the bar, at the step where a resumed run stands."""
        self._started = self._logged = time.monotonic()
        self._first_step = trainer.global_step
        self._steps = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._task = self._bar.add_task("train", total=self._steps, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Advance."""
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=f"train loss {self._loss(trainer)}")
        elif time.monotonic() - self._logged >= self.log_every_seconds:
            self._logged = time.monotonic()
            logger.info("step %d/%d, loss %s, %s left", trainer.global_step, self._steps, self._loss(trainer), self._left(trainer))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Say what validation found."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            logger.info("step %d: %s", trainer.global_step, ", ".join(f"{name[4:]} {value:.3f}" for name, value in metrics.items()))

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Close the bar."""
        self._close()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Close the bar, so that the terminal is usable for the message."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _loss(self, trainer: lightning.Trainer) -> str:
        value = trainer.callback_metrics.get("train/loss")
        return "-" if value is None else f"{float(value):.3f}"

    def _left(self, trainer: lightning.Trainer) -> str:
        done = max(1, trainer.global_step - self._first_step)
        seconds = (time.monotonic() - self._started) / done * (self._steps - trainer.global_step)
        return f"{seconds / 60:.1f} min"
