"""What a run logs last before a checkpoint, so that a resumed run can log it again where a kill came in between."""

from __future__ import annotations

from typing import Any

import lightning
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loggers.logger import Logger


class LogTail(Logger):
    """A logger that remembers only the rows of the newest step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1
        self.row: dict[str, float] = {}

    @property
    def name(self) -> str:
        """Part of the interface of loggers."""
        return "tail"

    @property
    def version(self) -> str:
        """Part of the interface of loggers."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to remember."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Forget an older step; several rows of one step become one."""
        assert step is not None
        if step != self.step:
            self.step, self.row = step, {}
        self.row |= {name: float(value) for name, value in metrics.items()}


def pending_row(trainer: lightning.Trainer) -> tuple[dict[str, float], int]:
    """All that is logged for the update just made, whether its row is written already or follows the checkpoint; and its step.

    Lightning counts the rows of update n (from 1) as step n - 1, and writes them after the callbacks of the batch.
    """
    step = trainer.fit_loop.epoch_loop._batches_that_stepped
    row: dict[str, float] = {}
    for tail in trainer.loggers:
        if isinstance(tail, LogTail) and tail.step == step:
            row |= {name: value for name, value in tail.row.items() if not name.startswith("val/")}
    connector = trainer._logger_connector
    if trainer.training and trainer.loggers and connector._first_loop_iter is not None and connector.should_update_logs:
        now = convert_tensors_to_scalars(connector.metrics["log"])
        row |= {name: float(value) for name, value in now.items()} | {"epoch": float(trainer.current_epoch)}
    return row, step
