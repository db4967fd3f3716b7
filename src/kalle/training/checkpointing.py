"""When checkpoints are written, and what happens on Ctrl-C, preemption and a full disk."""

from __future__ import annotations

import logging
import math
import signal
import time
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
from lightning.pytorch.callbacks import Checkpoint

from kalle.errors import UserError
from kalle.training.checkpoint_files import (
    LAST,
    DirectCheckpointIO,
    check_checkpoint,
    keep_best,
    point_last,
    prune,
    resume_path,
    state_file,
    step_of,
    step_path,
    step_paths,
)
from kalle.training.log_tail import pending_row
from kalle.training.stopping import Agreement, Preempted, StopSignals

__all__ = ["LAST", "LastCheckpoint", "check_checkpoint", "resume_path"]

logger = logging.getLogger(__name__)


class LastCheckpoint(Checkpoint):
    """Keeps the newest ``keep`` states in ``folder``/step-N.ckpt, with last.ckpt a link to the newest.

    They are written every ``every_steps`` updates, every ``every_minutes`` if given, before a validation, after the last update, and
    when a run is cut short. A state is only ever taken between two updates, with the optimizer's weights in place and no gradients
    accumulated, so that the continued run equals an uninterrupted one. The first Ctrl-C therefore waits for the end of the update, as
    SIGTERM and SIGUSR1 do, and all ranks stop at the same one; a second Ctrl-C stops at once and saves nothing. An old state goes only
    when a new one is whole; what does not fit on the disk is tried again at the next period, and is an error at the end of a run.

    ``best`` names a validation metric: best.ckpt then holds the state in which it was smallest (``best_mode: max``: largest).

    Lightning runs `Checkpoint` callbacks after all others, so the averaged weights in the file are those of the same step.
    """

    def __init__(
        self,
        folder: str,
        every_steps: int,
        *,
        keep: int = 2,
        every_minutes: float | None = None,
        best: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        for name, value in {"every_steps": every_steps, "keep": keep}.items():
            if value < 1:
                raise UserError(f"callbacks.checkpoint.{name}: got {value}, expected at least 1; correct it")
        if every_minutes is not None and every_minutes <= 0:
            raise UserError(f"callbacks.checkpoint.every_minutes: got {every_minutes}, expected more than 0, or null; correct it")
        if best_mode not in ("min", "max"):
            raise UserError(f"callbacks.checkpoint.best_mode: got '{best_mode}', expected min or max; correct it")
        self.folder, self.every_steps, self.keep, self.every_minutes = Path(folder), every_steps, keep, every_minutes
        self.best, self.best_mode = best, best_mode
        self._signals, self._agreement = StopSignals(), Agreement()
        self._saved_step = self._tried_step = -1
        self._saved_at = 0.0
        self._between_updates = False
        self._kept: list[Path] = []
        self._state: dict[str, Any] = {"validation_due": False, "row": {}, "row_step": -1}
        self._best_value: float | None = None

    @property
    def stop_asked(self) -> bool:
        """Whether Ctrl-C was pressed in this run."""
        return self._signals.asked == signal.SIGINT

    def state_dict(self) -> dict[str, Any]:
        """What was logged and what was due when the state was taken, so that logs continue without a hole."""
        return {**self._state, "best_value": self._best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._best_value = state_dict.get("best_value")
        self._state = {name: state_dict[name] for name in self._state}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Have checkpoints written where they belong."""
        trainer.strategy.checkpoint_io = DirectCheckpointIO()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to listen for signals; a resumed run stands where its checkpoint was written, and catches up with its log."""
        self._saved_step = self._tried_step = trainer.global_step
        self._saved_at, self._between_updates = time.monotonic(), True
        resumed = None if trainer.ckpt_path is None else Path(trainer.ckpt_path)
        self._kept = []
        if resumed is not None and resumed.resolve().parent == self.folder.resolve():
            self._kept = [path for path in reversed(step_paths(self.folder)) if (step_of(path) or 0) <= trainer.global_step]
        self._agreement = Agreement()
        self._signals.listen()
        if resumed is not None:
            self._catch_up(trainer)

    def _catch_up(self, trainer: lightning.Trainer) -> None:
        """Log what followed the checkpoint and precedes the next update: the row of its step, and a validation that was due."""
        if self._state["row"]:
            for target in trainer.loggers:
                target.log_metrics(dict(self._state["row"]), step=self._state["row_step"])
                target.save()
        if self._state["validation_due"]:
            # As Lightning's training loop does it; its own way back into a validation counts a step twice.
            loop = trainer.fit_loop.epoch_loop
            connector = trainer._logger_connector
            first, connector._first_loop_iter = connector._first_loop_iter, None
            trainer.validating, loop.val_loop.restarting = True, False
            loop.val_loop.run()
            trainer.training, connector._first_loop_iter = True, first

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """From here to the end of the batch the state is in motion."""
        self._between_updates = False
        if not self._agreement.alone:
            self._agreement.ask(*self._wishes())

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any) -> None:
        """Save when due, and stop when asked to."""
        if self._agreement.alone:
            self._agreement.ask(*self._wishes())
        stop, minutes_due = self._agreement.answer()
        self._between_updates = not trainer.fit_loop.epoch_loop._should_accumulate()
        if not self._between_updates:
            return
        final = bool(stop) or _at_the_end(trainer)
        if final or minutes_due or trainer.global_step % self.every_steps == 0:
            self._save(trainer, final)
        if stop:
            self._stop(trainer, stop)

    def _wishes(self) -> tuple[int, int]:
        due = self.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.every_minutes
        return self._signals.asked, int(due)

    def _stop(self, trainer: lightning.Trainer, signal_number: int) -> None:
        self._signals.asked = signal_number  # also on a rank that was not asked itself
        if signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted(signal_number, trainer.global_step)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save before a validation, which may take long and ends at once on Ctrl-C."""
        if self._between_updates:
            self._save(trainer)

    def on_validation_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any) -> None:
        """Stop when asked to; several ranks finish the validation, whose batches they do not count in step."""
        if self._signals.asked and self._agreement.alone and trainer.state.fn == "fit":
            self._stop(trainer, self._signals.asked)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the state that was just validated when it is the best so far."""
        if self.best is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.best not in trainer.callback_metrics:
            names = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"callbacks.checkpoint.best: got '{self.best}', expected one of {names}; correct it")
        value = float(trainer.callback_metrics[self.best])
        sign = 1 if self.best_mode == "min" else -1
        # A validation that is repeated after a resume finds its own value again, and must end alike.
        if math.isnan(value):
            logger.warning("step %d: %s is not a number and so not the best", trainer.global_step, self.best)
            return
        if self._best_value is None or sign * value < sign * self._best_value:
            self._best_value = value
            path = step_path(self.folder, trainer.global_step)
            if trainer.is_global_zero and path.is_file():
                keep_best(path)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give the signals back."""
        self._release()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Save what was reached since the last time when the weights are whole and nobody else is needed, then give the signals back."""
        try:
            if self._between_updates and not trainer.validating and self._agreement.alone:
                self._save(trainer, final=True)
        finally:
            self._release()

    def _save(self, trainer: lightning.Trainer, final: bool = False) -> None:
        """Write the state of this step unless that was done or, short of a ``final`` state, tried before."""
        step = trainer.global_step
        if step == self._saved_step or (step == self._tried_step and not final):
            return
        self._tried_step, self._saved_at = step, time.monotonic()
        loop = trainer.fit_loop.epoch_loop
        row, row_step = pending_row(trainer)
        fetcher = trainer.fit_loop._data_fetcher
        due = fetcher is not None and bool(loop._should_check_val_fx(fetcher))
        self._state = {"validation_due": due, "row": row, "row_step": row_step}
        path = step_path(self.folder, step)
        trainer.save_checkpoint(path)
        written = trainer.strategy.checkpoint_io
        error = written.error if isinstance(written, DirectCheckpointIO) else None
        if error is not None and not final:
            logger.warning("step %d is not saved, the run goes on and tries again later: %s", step, error)
            return
        if final and trainer.strategy.broadcast(error is not None):
            self._tried_step = self._saved_step = step  # the exception on its way is the last word
            raise error or UserError("the first process cannot save this run's state; see its message")
        self._saved_step = step
        self._kept = [*(kept for kept in self._kept if kept != path), path][-self.keep :]
        if trainer.is_global_zero:
            point_last(path)
            prune(self.folder, self._kept)

    def _release(self) -> None:
        self._between_updates = False
        self._signals.release()


def _at_the_end(trainer: lightning.Trainer) -> bool:
    """Whether no update follows the one just made."""
    epochs = trainer.max_epochs
    last_epoch = epochs is not None and 0 < epochs <= trainer.current_epoch + 1
    return trainer.global_step == trainer.max_steps or trainer.should_stop or (last_epoch and trainer.is_last_batch)


def saved_log_step(path: Path) -> int | None:
    """The step under which the run logged the last update of the checkpoint ``path``; None when it does not say."""
    state = torch.load(state_file(path), map_location="cpu", weights_only=True, mmap=True)
    step = state.get("callbacks", {}).get(LastCheckpoint.__qualname__, {}).get("row_step")
    return None if step is None else int(step)
