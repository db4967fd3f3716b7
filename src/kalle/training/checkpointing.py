"""Checkpoints: how their files are written, verified and found again, when one is written, and Ctrl-C, preemption and a full disk."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import signal
import threading
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import lightning
import torch
import torch.distributed as dist
from lightning.fabric.plugins.io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import nn

from kalle.checkpoint import check_fields, mismatches
from kalle.errors import UserError
from kalle.files import DiskError, atomic_file, remove_abandoned, temporary_name
from kalle.training.callbacks import pending_rows

logger = logging.getLogger(__name__)

LAST, BEST = "last.ckpt", "best.ckpt"
_STEP_NAME = re.compile(r"step-(\d+)\.ckpt")


def step_path(folder: Path, step: int) -> Path:
    """Where the state after ``step`` updates is kept."""
    return folder / f"step-{step:08d}.ckpt"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None for any other file."""
    match = _STEP_NAME.fullmatch(path.name)
    return None if match is None else int(match[1])


def step_paths(folder: Path) -> list[Path]:
    """The checkpoints of ``folder`` with a step in their name, newest first."""
    found = [path for path in folder.glob("step-*.ckpt") if step_of(path) is not None]
    return sorted(found, key=lambda path: step_of(path) or 0, reverse=True)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable; file systems that cannot do that for a folder are left alone."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def save_atomic(state: Any, path: Path) -> None:
    """Replace ``path`` as a whole and durably; a DiskError, the old file intact and nothing else left when there is no room for it."""
    with atomic_file(path) as partial, partial.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:  # its archive cannot be closed after a write that failed
            if not isinstance(error.__context__, OSError):
                raise
            raise error.__context__ from None
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


class DirectCheckpointIO(TorchCheckpointIO):
    """Writes beside the target and renames; Lightning's own builds the file in memory and then in the system's temporary folder.

    What the disk refused is kept in ``error`` instead of raised: under DDP the other ranks wait for this one behind the write.
    """

    def __init__(self) -> None:
        super().__init__()
        self.error: DiskError | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any | None = None) -> None:
        """Write ``checkpoint`` to ``path``, whole or not at all."""
        self.error = None
        try:
            save_atomic(checkpoint, Path(path))
        except DiskError as error:
            self.error = error


def point_last(path: Path) -> None:
    """Let last.ckpt beside ``path`` mean ``path``: a relative link, so that it costs nothing and survives a move of the folder."""
    last = path.with_name(LAST)
    temporary = temporary_name(last)
    try:
        temporary.symlink_to(path.name)
        os.replace(temporary, last)
    except OSError as error:  # a file system without links; resume=auto goes by the steps in the names
        logger.debug("no link '%s': %s", last, error)
    sync_folder(path.parent)


def keep_best_checkpoints(path: Path) -> None:
    """Let best.ckpt beside ``path`` hold the same state, whatever is pruned later."""
    best = path.with_name(BEST)
    with atomic_file(best) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:
            shutil.copyfile(path, temporary)
    sync_folder(path.parent)


def prune(folder: Path, kept: list[Path]) -> None:
    """Remove every checkpoint with a step in its name that is not in ``kept``, and what a killed process left half written."""
    remove_abandoned(folder)
    for path in step_paths(folder):
        if path not in kept and not path.is_dir():
            path.unlink(missing_ok=True)


def damage(path: Path) -> str | None:
    """The defect of a checkpoint, or None. Every record of a file is read and its checksum compared.

    A folder, torch's distributed form, is refused: its metadata is a pickle, which runs what it holds when it is read.
    """
    if path.is_dir():
        return "a folder, and only a file is safe to read"
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken is not None:
            return f"checksum of {broken} differs"
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zipfile, torch.load and what they read raise whatever they like
        return f"{type(error).__name__}: {' '.join(str(error).split())[:80]}"
    return None if isinstance(state, dict) and "state_dict" in state else "holds no state of a run"


def resume_path(resume: str, folder: Path) -> Path | None:
    """The checkpoint that ``resume`` ("auto", "never" or a path) means for a run with checkpoints in ``folder``; it is whole.

    ``auto`` takes the newest whole one and says which it passed over. A UserError when there are some but none is whole, and for a path
    that is none.
    """
    if resume == "never":
        return None
    if resume == "auto":
        return _newest_whole(folder)
    path = Path(resume)
    if not path.exists():
        raise UserError(f"no checkpoint to resume from: got resume='{resume}', expected auto, never or an existing .ckpt file")
    reason = damage(path)
    if reason is not None:
        raise UserError(
            f"not a checkpoint: got '{path}', expected a .ckpt file that a training run wrote ({reason}); "
            "choose another file or resume=never"
        )
    return path


def check_no_foreign_checkpoint(out: Path) -> None:
    """A UserError when ``out`` holds what Lightning, under SLURM, takes for a checkpoint of its own and reads before anything of ours.

    Lightning looks for hpc_ckpt_ in the names there when a run begins from its first step, and nothing verifies such a file; a folder
    may have a pickle for metadata.
    """
    found = sorted(out.glob("*hpc_ckpt_*"))
    if found:
        raise UserError(
            f"not a checkpoint of ours: got '{found[0]}', which Lightning would read under SLURM; expected none in the folder of a run; "
            "move it away, or choose out=NEW"
        )


def _newest_whole(folder: Path) -> Path | None:
    last = folder / LAST
    # A last.ckpt that is no link comes from a version that kept only this one, so everything with a step in its name is newer.
    candidates = step_paths(folder) + ([last] if last.is_file() and not last.is_symlink() else [])
    passed_over: list[str] = []
    for path in candidates:
        reason = damage(path)
        if reason is None:
            if passed_over:
                logger.warning("damaged, so continuing from '%s' instead: %s", path, "; ".join(passed_over))
            return path
        passed_over.append(f"'{path.name}' ({reason})")
    if passed_over:
        raise UserError(
            f"no whole checkpoint in '{folder}': {'; '.join(passed_over)}; copy one back from elsewhere and run again, "
            "or start from the first step with resume=never"
        )
    return None


def check_checkpoint(path: Path, module: nn.Module) -> None:
    """A UserError when the tensors of the checkpoint ``path`` are not those of ``module``."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    problems = mismatches(module.state_dict(), state)
    if problems:
        raise UserError(
            f"'{path}' holds another model ({len(problems)} tensors differ; {problems[0]}); choose out=NEW or resume=never, "
            "or train with its configuration"
        )


PREEMPTION_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""Preemption, and SLURM's warning (``--signal=USR1@120``)."""


class Preempted(Exception):
    """A run that ``signal_number`` ended early, after its state was saved."""

    def __init__(self, signal_number: int, step: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name} at step {step}")
        self.signal_number, self.step = signal_number, step

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells have it: 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.signal_number


class StopSignals:
    """Handles signals that end a run: ``requested`` is the first one, 0 for none; a second Ctrl-C raises at once."""

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Install the handlers, which is possible in the main thread only."""
        self.requested = 0
        if threading.current_thread() is threading.main_thread() and not self._before:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._ctrl_c)
            for number in PREEMPTION_SIGNALS:
                self._before[number] = signal.signal(number, self._preempt)

    def release(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _ctrl_c(self, number: int, frame: Any) -> None:
        if self.requested == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = self.requested or number
        logger.info("stopping after this batch; press Ctrl-C again to stop at once")

    def _preempt(self, number: int, frame: Any) -> None:
        if not self.requested:
            logger.info("%s: saving after this batch and ending", signal.Signals(number).name)
        self.requested = self.requested or number


class Agreement:
    """The maximum of some small numbers over all ranks, exchanged while a batch is computed.

    The exchange uses gloo whatever backend the gradients use: the numbers are on the CPU, so no rank waits for its GPU.
    """

    def __init__(self) -> None:
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = dist.new_group(backend="gloo") if several else None
        self._values = torch.zeros(0, dtype=torch.int64)
        self._work: Any = None

    @property
    def alone(self) -> bool:
        """Whether there is a single process."""
        return self._group is None

    def begin(self, *values: int) -> None:
        """Begin to compare ``values`` with those of the other ranks; every rank must call it equally often."""
        self._values = torch.tensor(values, dtype=torch.int64)
        if self._group is not None:
            self._work = dist.all_reduce(self._values, op=dist.ReduceOp.MAX, group=self._group, async_op=True)

    def result(self) -> list[int]:
        """The maxima of the last `begin`."""
        if self._work is not None:
            self._work.wait()
            self._work = None
        return [int(value) for value in self._values]


@dataclass(frozen=True)
class CheckpointConfig:
    """When states are written, and how many stay."""

    every_steps: int = 1000
    """Updates between two states."""
    keep: int = 2
    """Newest states that stay; a new one is whole before an old one goes."""
    every_minutes: float | None = None
    """Also by time."""
    best: str | None = None
    """A validation metric; best.ckpt holds the state in which it was smallest."""
    best_mode: Literal["min", "max"] = "min"
    """max: largest."""

    def __post_init__(self) -> None:
        check_fields(self, "callbacks.checkpoint")
        for name, value in {"every_steps": self.every_steps, "keep": self.keep}.items():
            if value < 1:
                raise UserError(f"callbacks.checkpoint.{name}: got {value}, expected at least 1; correct it")
        if self.every_minutes is not None and self.every_minutes <= 0:
            raise UserError(f"callbacks.checkpoint.every_minutes: got {self.every_minutes}, expected more than 0, or null; correct it")


class LastCheckpoint(Checkpoint):
    """Keeps the newest ``config.keep`` states in ``folder``/step-N.ckpt, with last.ckpt a link to the newest.

    They are written every ``every_steps`` updates, every ``every_minutes`` if given, before a validation, after the last update, and
    when a run is cut short. A state is only ever taken between two updates, with the optimizer's weights in place and no gradients
    accumulated, so that the continued run equals an uninterrupted one. The first Ctrl-C therefore waits for the end of the update, as
    SIGTERM and SIGUSR1 do, and all ranks stop at the same one; a second Ctrl-C stops at once and saves nothing. An old state goes only
    when a new one is whole; what does not fit on the disk is tried again at the next period, and is an error at the end of a run.

    ``best`` names a validation metric: best.ckpt then holds the state in which it was smallest (``best_mode: max``: largest).

    Lightning runs `Checkpoint` callbacks after all others, so the averaged weights in the file are those of the same step.
    """

    def __init__(self, folder: str | Path, config: CheckpointConfig) -> None:
        self.folder, self.config = Path(folder), config
        self._signals, self._agreement = StopSignals(), Agreement()
        self._saved_step = self._tried_step = self._begun_step = -1
        self._saved_at = 0.0
        self._between_updates = False
        self._kept: list[Path] = []
        self._state: dict[str, Any] = {"validation_due": False, "rows": [], "row_step": -1}
        self._best_value: float | None = None

    @property
    def stop_requested(self) -> bool:
        """Whether Ctrl-C was pressed in this run."""
        return self._signals.requested == signal.SIGINT

    def state_dict(self) -> dict[str, Any]:
        """The rows logged and the validation due when the state was taken, so that logs continue without a gap."""
        return {**self._state, "best_value": self._best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self._best_value = state_dict.get("best_value")
        rows = state_dict.get("rows", [state_dict["row"]] if state_dict.get("row") else [])  # "row" is what older checkpoints have
        self._state = {**{name: state_dict[name] for name in ("validation_due", "row_step")}, "rows": rows}

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Have checkpoints written beside their target."""
        trainer.strategy.checkpoint_io = DirectCheckpointIO()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Install the signal handlers; a resumed run logs what its checkpoint had still to log."""
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
        """Log what followed the checkpoint and precedes the next update: the rows of its step, and a validation that was due."""
        for row in self._state["rows"]:
            for target in trainer.loggers:
                target.log_metrics(dict(row), step=self._state["row_step"])
                target.save()
        if self._state["validation_due"]:
            # As Lightning's training loop does it; its own way back into a validation counts a step twice.
            validation = trainer.fit_loop.epoch_loop.val_loop
            trainer.validating, validation.restarting = True, False
            validation.run()
            trainer.training = True

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """Note that the state changes from here to the end of the batch."""
        if self._between_updates:
            self._begun_step = trainer.global_step
        self._between_updates = False
        if not self._agreement.alone:
            self._agreement.begin(*self._wishes())

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any) -> None:
        """Save when due, and stop when requested."""
        if self._agreement.alone:
            self._agreement.begin(*self._wishes())
        stop, minutes_due = self._agreement.result()
        self._between_updates = trainer.global_step > self._begun_step
        if not self._between_updates:  # gradients are being accumulated
            return
        final = bool(stop) or _at_the_end(trainer)
        if final or minutes_due or trainer.global_step % self.config.every_steps == 0:
            self._save(trainer, final, before_log=True)
        if stop:
            self._stop(trainer, stop)

    def _wishes(self) -> tuple[int, int]:
        due = self.config.every_minutes is not None and time.monotonic() - self._saved_at >= 60 * self.config.every_minutes
        return self._signals.requested, int(due)

    def _stop(self, trainer: lightning.Trainer, signal_number: int) -> None:
        self._signals.requested = signal_number  # also on a rank that got no signal itself
        if signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        raise Preempted(signal_number, trainer.global_step)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Save before a validation, which may take long and ends at once on Ctrl-C."""
        if self._between_updates:
            self._save(trainer)

    def on_validation_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any) -> None:
        """Stop when requested; several ranks finish the validation first, because they are not at the same batch of it."""
        if self._signals.requested and self._agreement.alone and trainer.state.fn == "fit":
            self._stop(trainer, self._signals.requested)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Keep the state just validated when it is the best so far."""
        if self.config.best is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.config.best not in trainer.callback_metrics:
            names = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"callbacks.checkpoint.best: got '{self.config.best}', expected one of {names}; correct it")
        value = float(trainer.callback_metrics[self.config.best])
        sign = 1 if self.config.best_mode == "min" else -1
        # A validation that is repeated after a resume finds its own value again, and must end alike.
        if math.isnan(value):
            logger.warning("step %d: %s is not a number and so not the best", trainer.global_step, self.config.best)
            return
        if self._best_value is None or sign * value < sign * self._best_value:
            self._best_value = value
            path = step_path(self.folder, trainer.global_step)
            if trainer.is_global_zero and path.is_file():
                keep_best_checkpoints(path)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Restore the signal handlers."""
        self._release()

    def on_exception(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException) -> None:
        """Save the state between two updates of a single process, then restore the signal handlers."""
        try:
            if self._between_updates and not trainer.validating and self._agreement.alone:
                self._save(trainer, final=True)
        finally:
            self._release()

    def _save(self, trainer: lightning.Trainer, final: bool = False, before_log: bool = False) -> None:
        """Write the state of this step unless that was done or, short of a ``final`` state, tried before.

        ``before_log``: Lightning has not yet logged this update.
        """
        step = trainer.global_step
        if step == self._saved_step or (step == self._tried_step and not final):
            return
        self._tried_step, self._saved_at = step, time.monotonic()
        rows = pending_rows(trainer, before_log)
        self._state = {"validation_due": _validation_due(trainer), "rows": rows, "row_step": trainer.global_step - 1}
        path = step_path(self.folder, step)
        trainer.save_checkpoint(path)
        written = trainer.strategy.checkpoint_io
        error = written.error if isinstance(written, DirectCheckpointIO) else None
        if error is not None and not final:
            logger.warning("step %d is not saved, the run continues and tries again later: %s", step, error)
            return
        if final and trainer.strategy.broadcast(error is not None):
            self._tried_step = self._saved_step = step  # no other attempt: an exception follows
            raise error or UserError("the first process cannot save this run's state; see its message")
        self._saved_step = step
        self._kept = [*(kept for kept in self._kept if kept != path), path][-self.config.keep :]
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


def _validation_due(trainer: lightning.Trainer) -> bool:
    """Whether a validation follows the batch just trained on."""
    every = trainer.val_check_batch
    if not trainer.enable_validation or not isinstance(every, int):
        return False
    loop, epochs = trainer.fit_loop.epoch_loop, trainer.check_val_every_n_epoch
    if epochs is not None and (trainer.current_epoch + 1) % epochs:
        return False
    return ((loop.total_batch_idx if epochs is None else loop.batch_idx) + 1) % every == 0


def saved_log_step(path: Path) -> int | None:
    """The step under which the run logged the last update of the checkpoint ``path``; None when it does not say."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    step = state.get("callbacks", {}).get(LastCheckpoint.__qualname__, {}).get("row_step")
    return None if step is None else int(step)
