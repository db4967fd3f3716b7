"""Callbacks and loggers of a training: seeds, averaged weights, progress, samples and metrics of a validation; CSV and W&B."""

from __future__ import annotations

import csv
import io
import logging
import math
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from kalle.errors import UserError
from kalle.files import write_atomic
from kalle.losses.waveform import LogMel, MelConfig
from kalle.models.flowvae import FlowVAE
from kalle.models.lm_batch import LMBatch, WaveBatch
from kalle.seeds import step_seed
from kalle.synthesis.generate import generate
from kalle.synthesis.options import StopRule, default_stop
from kalle.text.tokenizer import Tokenizer, prompt_ids
from kalle.training.distributed import sum_over_ranks
from kalle.training.flowvae import FlowVAETraining
from kalle.training.lm import KalleLMTraining

logger = logging.getLogger(__name__)

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
        """Ignore the hyperparameters; out/config.yaml has them."""

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


Sampler = Callable[[KalleLMTraining, str], Tensor]
"""(training module, text) -> waveform (S,)."""
PairMetric = Callable[[NDArray[np.float32], NDArray[np.float32]], float]
"""(recording, reconstruction), both (S,) -> a number; ValueError when this pair cannot be scored."""


class StepSeeds(Callback):
    """Seeds the global generators (python, numpy, torch on CPU and CUDA) before every batch from (seed, step, batch, rank).

    Dropout and whatever else draws from them then continues after a resume as without an interruption, on every rank, with nothing to
    store; and what a validation or a logger draws in between cannot change the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the batch's own stream."""
        state = step_seed(self.seed, trainer.global_step, batch_idx, trainer.global_rank, 1)
        random.seed(state)
        np.random.seed(state % 2**32)  # noqa: NPY002 - libraries draw from it
        torch.manual_seed(state)


def ema_update(decay: float) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    """An update of all averaged tensors at once for ``AveragedModel``, with decay ``min(decay, (1 + n) / (10 + n))`` after n updates.

    With the small decay of the first updates the average does not depend on the initial weights. Counters are copied. n is read from the
    GPU once, because every read waits for all work before it.
    """

    @torch.no_grad()
    def update(averages: list[Tensor], current: list[Tensor], n_averaged: Tensor) -> None:
        if averages[0].is_floating_point():
            n = int(n_averaged)
            torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))
        else:
            torch._foreach_copy_(averages, current)

    return update


class EMA(WeightAveraging):
    """Exponential average of the weights after every update; validation, the final weights and exported folders use the average."""

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__(multi_avg_fn=ema_update(decay))
        self.decay = decay
        self._ended = False

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Make the average on the device that trains; Lightning would make it where the model is before it moves there."""
        WeightAveraging.__init__(self, device=trainer.strategy.root_device, multi_avg_fn=ema_update(self.decay))
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average into the module."""
        super().on_train_end(trainer, pl_module)
        self._ended = True

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Do so also for a run that was complete when it was resumed, which Lightning ends without `on_train_end`."""
        if stage == "fit" and not self._ended:
            self.on_train_end(trainer, pl_module)


class RunProgress(Callback):
    """A rich bar over all steps on a terminal; elsewhere a log line every ``log_every_seconds``."""

    def __init__(self, log_every_seconds: float = 30.0) -> None:
        self.log_every_seconds = log_every_seconds
        self._bar: Progress | None = None
        self._task: Any = None
        self._started = self._logged = 0.0
        self._first_step = self._steps = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Open the bar, at the step of a resumed run."""
        self._started = self._logged = time.monotonic()
        self._first_step = trainer.global_step
        self._steps = trainer.max_steps if trainer.max_steps > 0 else int(trainer.estimated_stepping_batches)
        if trainer.is_global_zero and sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns)
            self._task = self._bar.add_task("train", total=self._steps, completed=trainer.global_step)
            self._bar.start()

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *_: Any) -> None:
        """Advance the bar, or print a line where it is time for one."""
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=trainer.global_step, description=f"train loss {self._loss(trainer)}")
        elif time.monotonic() - self._logged >= self.log_every_seconds:
            self._logged = time.monotonic()
            logger.info("step %d/%d, loss %s, %s left", trainer.global_step, self._steps, self._loss(trainer), self._left(trainer))

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the metrics of the validation."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
            known = ", ".join(f"{name[4:]} {value:.3f}" for name, value in values.items() if not math.isnan(value))
            logger.info("step %d: %s", trainer.global_step, known)

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


def mel_image(wav: Tensor, sample_rate: int) -> np.ndarray:
    """Log-mel of ``wav`` (S,) as a uint8 image (n_mels, frames), low frequencies at the bottom."""
    mel = LogMel(MelConfig(sample_rate=sample_rate))(wav.detach().float().cpu()[None])[0].flip(0)
    scaled = (mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1e-5)
    return (255 * scaled).byte().numpy()


def log_speech(loggers: list[Logger], name: str, wav: Tensor, sample_rate: int, step: int) -> None:
    """Send the sound and its mel image of ``wav`` (S,) to every logger that can hold them."""
    audio = wav.detach().float().cpu().clamp(-1, 1)
    image = mel_image(audio, sample_rate)
    for target in loggers:
        if isinstance(target, TensorBoardLogger):
            target.experiment.add_audio(name, audio, step, sample_rate)
            target.experiment.add_image(f"{name}/mel", image, step, dataformats="HW")
        elif isinstance(target, WandbLogger):
            target.log_audio(name, [audio.numpy()], step=step, sample_rate=[sample_rate])
            target.log_image(f"{name}/mel", [image], step=step)


class ReconstructionMedia(Callback):
    """The first validation utterances: the recording once, its reconstruction (from the mean) at every validation."""

    def __init__(self, utterances: int = 3) -> None:
        self.utterances = utterances
        self._recordings_sent = False

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: WaveBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Log utterance ``batch_idx`` when it is one of the first."""
        if batch_idx >= self.utterances or trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, FlowVAETraining)
        flowvae = pl_module.flowvae
        wav = flowvae.decode(flowvae.encode(batch.wav[:1]).mean)
        rate = flowvae.config.sample_rate
        log_speech(trainer.loggers, f"reconstruction/{batch_idx}", wav[0], rate, trainer.global_step)
        if not self._recordings_sent:
            log_speech(trainer.loggers, f"recording/{batch_idx}", batch.wav[0], rate, trainer.global_step)
            self._recordings_sent = batch_idx == self.utterances - 1


class SpeechMedia(Callback):
    """Fixed texts, spoken at every validation by ``sampler`` at ``sample_rate`` Hz."""

    def __init__(self, texts: Sequence[str], sampler: Sampler, sample_rate: int) -> None:
        self.texts, self.sampler, self.sample_rate = tuple(texts), sampler, sample_rate

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: LMBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Speak every text after the last batch: at the end of the epoch averaged weights may have been taken out already."""
        last = batch_idx + 1 == trainer.num_val_batches[dataloader_idx]
        if not last or trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, KalleLMTraining)
        for index, text in enumerate(self.texts):
            wav = self.sampler(pl_module, text)
            if len(wav) == 0:
                logger.info("step %d: %r ended before its first frame", trainer.global_step, text)
                continue
            log_speech(trainer.loggers, f"speech/{index}", wav, self.sample_rate, trainer.global_step)


def speech_sampler(flowvae: FlowVAE, tokenizer: Tokenizer, seed: int, max_frames: int = 100, stop: StopRule | None = None) -> Sampler:
    """A sampler that speaks with the module's current weights and always the same noise."""

    def sample(module: KalleLMTraining, text: str) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        ids = prompt_ids(tokenizer, text).to(module.device)
        rule = stop or default_stop(module.lm.config.stop_head)
        frames = list(generate(module.lm, ids, generator=generator, stop=rule, max_frames=max_frames))
        if not frames:
            return torch.zeros(0)
        z = torch.stack([frame.z for frame in frames])[None].cpu()
        return flowvae.decode(z)[0]

    return sample


class ReconstructionMetrics(Callback):
    """Logs ``val/NAME``, the mean over the first ``utterances`` of the validation split, over all ranks, of each of ``metrics``.

    A pair that a metric cannot score (silence, say) is left out, counted and named in a warning. Nothing is logged for a metric
    that scored no pair. Every rank must have the same metrics.
    """

    def __init__(self, metrics: Mapping[str, PairMetric], utterances: int) -> None:
        self.metrics, self.utterances = dict(metrics), utterances
        self._sums = torch.zeros(0)

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Reset the sums."""
        self._sums = torch.zeros(len(self.metrics), 3, dtype=torch.float64)  # sum, scored, failed

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: WaveBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch's utterance when it is one of the first; batches are dealt out to the ranks in turn."""
        if batch_idx * trainer.world_size + trainer.global_rank >= self.utterances or trainer.sanity_checking:
            return
        samples = min(outputs["wav"].shape[1], batch.wav.shape[1])
        recording, audio = (side[0, :samples].float().cpu().numpy() for side in (batch.wav, outputs["wav"]))
        for index, (name, metric) in enumerate(self.metrics.items()):
            try:
                self._sums[index] += torch.tensor([metric(recording, audio), 1, 0], dtype=torch.float64)
            except ValueError as error:
                self._sums[index, 2] += 1
                logger.warning("no %s of '%s' at step %d: %s", name, batch.cut_ids[0], trainer.global_step, error)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the means."""
        if trainer.sanity_checking or not self.metrics:
            return
        for name, (total, scored, failed) in zip(self.metrics, sum_over_ranks(self._sums, pl_module.device).tolist(), strict=True):
            if scored:
                pl_module.log(f"val/{name}", total / scored, sync_dist=True)
            if failed:
                pl_module.log(f"val/{name}_not_scored", failed, sync_dist=True)
