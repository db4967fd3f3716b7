"""Loggers that a resumed run continues without a hole and without a step that appears twice."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

from kalle.errors import UserError
from kalle.files import write_atomic

FILE_NAME = "metrics.csv"
KINDS = ("tensorboard", "csv", "wandb")


def build_loggers(names: Sequence[str], out: str, first_step: int | None, offline: bool = True) -> list[Logger]:
    """The loggers ``names`` (some of `KINDS`), which write below ``out``.

    ``first_step`` is the first step that a resumed run logs anew; None for a run from its start. ``offline``: wandb uploads nothing.
    """
    unknown = [name for name in names if name not in KINDS]
    if unknown:
        raise UserError(f"logger: got '{unknown[0]}', expected some of {', '.join(KINDS)}, all, or null; correct it")
    makers: dict[str, Callable[[], Logger]] = {
        "tensorboard": lambda: TensorBoardLogger(out, name="tensorboard", version="", purge_step=first_step),
        "csv": lambda: MetricsCSV(out, resume_step=first_step),
        "wandb": lambda: WandbLogger(save_dir=out, project="kalle", offline=offline),
    }
    return [makers[name]() for name in names]


class MetricsCSV(Logger):
    """``save_dir``/``name``/version_N/metrics.csv, a row a call, each on the disk at once.

    A new run takes the first free N. A resumed one (``resume_step`` given: the first step that it logs anew) continues the table with the
    largest N, from which the rows of that step and later, which another process wrote before it was killed, are removed; 0 removes all.
    """

    def __init__(self, save_dir: str, name: str = "csv", resume_step: int | None = None) -> None:
        super().__init__()
        self._root, self._name, self._resume_step = Path(save_dir), name, resume_step
        self._columns: list[str] = []
        self._path: Path | None = None

    @property
    def name(self) -> str:
        """Folder name under the run's."""
        return self._name

    @property
    def version(self) -> int:
        """N of version_N."""
        folder = self._root / self._name
        taken = [int(match[1]) for path in folder.glob("version_*") if (match := re.fullmatch(r"version_(\d+)", path.name))]
        if self._path is not None:
            return int(self._path.parent.name.removeprefix("version_"))
        if self._resume_step is not None and taken:
            return max(taken)
        return max(taken, default=-1) + 1

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """The run's configuration is in its config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        path = self._path or self._open()
        row = {**{name: float(value) for name, value in metrics.items()}, "step": step}
        new = [name for name in row if name not in self._columns]
        if new:
            self._rewrite(path, [*self._columns, *new], _rows(path))
        with path.open("a", encoding="utf-8", newline="") as file:
            file.write(_text([row], self._columns))

    def _open(self) -> Path:
        path = self._root / self._name / f"version_{self.version}" / FILE_NAME
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        if path.is_file():
            rows = _rows(path)
            if self._resume_step is not None:
                rows = [row for row in rows if int(row["step"]) < self._resume_step]
            with path.open(encoding="utf-8", newline="") as file:
                columns = next(csv.reader(file), [])
            self._rewrite(path, columns, rows)
        return path

    def _rewrite(self, path: Path, columns: list[str], rows: list[dict[str, str]]) -> None:
        self._columns = columns
        write_atomic(path, _text([dict(zip(columns, columns, strict=True))], columns) + _text(rows, columns))


def _rows(path: Path) -> list[dict[str, str]]:
    """The whole rows of a table; a last line that a kill cut off is left out."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    return [row for row in csv.DictReader(io.StringIO(whole)) if row.get("step")]


def _text(rows: list[dict[str, Any]], columns: list[str]) -> str:
    buffer = io.StringIO()
    csv.DictWriter(buffer, columns, restval="", lineterminator="\n").writerows(rows)
    return buffer.getvalue()


class LogTail(Logger):
    """A logger that remembers only the rows of the newest step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = -1
        self.rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        """A part of the interface of loggers."""
        return "tail"

    @property
    def version(self) -> str:
        """A part of the interface of loggers."""
        return ""

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Remember nothing."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Remember the row, and forget those of an older step."""
        assert step is not None
        if step != self.step:
            self.step, self.rows = step, []
        self.rows.append({name: float(value) for name, value in metrics.items()})


def pending_rows(trainer: lightning.Trainer, before_log: bool) -> list[dict[str, float]]:
    """The rows of the update just made: those that are written (`LogTail`) and, with ``before_log``, the one still to be written.

    Lightning counts the rows of update n (from 1) as step n - 1, and writes its own after the callbacks of the batch. Rows of a
    validation are left out: it is repeated.
    """
    rows: list[dict[str, float]] = []
    for tail in trainer.loggers:
        if isinstance(tail, LogTail) and tail.step == trainer.global_step - 1:
            rows += [row for row in tail.rows if not any(name.startswith("val/") for name in row)]
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    if before_log and trainer.loggers and every and (trainer.global_step % every == 0 or trainer.should_stop):
        now = {name: float(value) for name, value in trainer.logged_metrics.items() if name.startswith("train/")}
        rows.append({**now, "epoch": float(trainer.current_epoch)})
    return rows
