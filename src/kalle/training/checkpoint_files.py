"""Checkpoint files: writing, rotation, verification, and the choice of the one that a run continues from."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io import TorchCheckpointIO
from torch import nn

from kalle.checkpoint import mismatches
from kalle.errors import UserError
from kalle.files import DiskError, atomic_file, remove_abandoned, temporary_name

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


def keep_best(path: Path) -> None:
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
