"""Where checkpoints are written, which one a run continues from, and what happens on Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from kalle.checkpoint import mismatches
from kalle.disk import whole_file
from kalle.errors import UserError

logger = logging.getLogger(__name__)

LAST = "last.ckpt"


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; Lightning's own builds the file in memory and then in the system's temporary folder."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        """Replace ``path`` as a whole; a UserError, the old file intact and nothing else left when there is no room for it."""
        with whole_file(Path(path)) as partial, partial.open("wb") as file:
            try:
                torch.save(checkpoint, file)
            except RuntimeError as error:  # its archive cannot be closed after a write that failed
                if not isinstance(error.__context__, OSError):
                    raise
                raise error.__context__ from None
            file.flush()
            os.fsync(file.fileno())


class LastCheckpoint(Checkpoint):
    """Keeps the newest state in ``folder``/last.ckpt: every ``every_steps`` updates, after the last one, and when a run is cut short.

    A state is only ever taken between two updates, with the optimizer's weights in place, so that the continued run equals an
    uninterrupted one. The first Ctrl-C therefore waits for the end of the batch; a second one stops at once and saves nothing.
    Lightning runs `Checkpoint` callbacks after all others, so the averaged weights in the file are those of the same step.
    """

    def __init__(self, folder: str, every_steps: int) -> None:
        if every_steps < 1:
            raise UserError(f"callbacks.checkpoint.every_steps: got {every_steps}, expected at least 1; correct it")
        self.path, self.every_steps = Path(folder) / LAST, every_steps
        self.stop_asked = False
        self._saved_step = -1
        self._between_updates = False
        self._handler_before: Any = None

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Have checkpoints written where they belong."""
        trainer.strategy.checkpoint_io = DirectCheckpointIO()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Begin to listen for Ctrl-C; a resumed run stands where its checkpoint was written."""
        self.stop_asked, self._saved_step, self._between_updates = False, trainer.global_step, True
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGINT, self._ask_to_stop)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """From here to the end of the batch the state is in motion."""
        self._between_updates = False

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any) -> None:
        """Save when due, and stop when asked to."""
        self._between_updates = True
        due = trainer.global_step % self.every_steps == 0 or self.stop_asked
        if (due or _at_the_end(trainer)) and trainer.global_step != self._saved_step:
            self._save(trainer)
        if self.stop_asked:
            raise KeyboardInterrupt

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save before a validation, which may take long and ends at once on Ctrl-C."""
        if self._between_updates and trainer.global_step != self._saved_step:
            self._save(trainer)

    def on_validation_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any) -> None:
        """Stop when asked to."""
        if self.stop_asked:
            raise KeyboardInterrupt

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Give Ctrl-C back."""
        self._release()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Save what was reached since the last time when the weights are whole, then give Ctrl-C back."""
        try:
            if self._between_updates and not trainer.validating and trainer.global_step != self._saved_step:
                self._save(trainer)
        finally:
            self._release()

    def _save(self, trainer: lightning.Trainer) -> None:
        self._saved_step = trainer.global_step  # whether it succeeds or not: a full disk is not asked twice
        trainer.save_checkpoint(self.path)

    def _ask_to_stop(self, signal_number: int, frame: Any) -> None:
        if self.stop_asked:
            raise KeyboardInterrupt
        self.stop_asked = True
        logger.info("stopping after this batch; press Ctrl-C again to stop at once")

    def _release(self) -> None:
        self._between_updates = False
        if self._handler_before is not None:
            signal.signal(signal.SIGINT, self._handler_before)
            self._handler_before = None


def _at_the_end(trainer: lightning.Trainer) -> bool:
    """Whether no update follows the one just made."""
    epochs = trainer.max_epochs
    last_epoch = epochs is not None and 0 < epochs <= trainer.current_epoch + 1
    return trainer.global_step == trainer.max_steps or trainer.should_stop or (last_epoch and trainer.is_last_batch)


def resume_path(resume: str, folder: Path) -> Path | None:
    """The checkpoint that ``resume`` ("auto", "never" or a path) means for a run with checkpoints in ``folder``."""
    if resume == "never":
        return None
    if resume == "auto":
        last = folder / LAST
        return last if last.is_file() else None
    path = Path(resume)
    if not path.is_file():
        raise UserError(f"no checkpoint to resume from: got resume='{resume}', expected auto, never or an existing .ckpt file")
    return path


def check_checkpoint(path: Path, module: nn.Module) -> None:
    """A UserError when ``path`` is not a checkpoint of a run like ours, or when its tensors are not those of ``module``."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = checkpoint["state_dict"]
    except Exception as error:  # torch.load and what it reads raise whatever they like
        raise UserError(
            f"not a checkpoint: got '{path}', expected a .ckpt file that a training run wrote ({type(error).__name__}); "
            "choose another file or resume=never"
        ) from None
    problems = mismatches(module.state_dict(), state)
    if problems:
        raise UserError(
            f"'{path}' holds another model ({len(problems)} tensors differ; {problems[0]}); choose out=NEW or resume=never, "
            "or train with its configuration"
        )
