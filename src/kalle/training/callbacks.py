"""Callbacks of a training: seeds, averaged weights, progress, and samples and metrics of a validation."""

from __future__ import annotations

import logging
import math
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, WeightAveraging
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from kalle.losses.spectral import LogMel, MelConfig
from kalle.models.batch import LMBatch, WaveBatch
from kalle.models.flowvae import FlowVAE
from kalle.synthesis.generate import generate
from kalle.synthesis.options import StopRule, default_stop
from kalle.text.tokenizer import Tokenizer, prompt_ids
from kalle.training.distributed import sum_over_ranks
from kalle.training.flowvae import FlowVAETraining
from kalle.training.lm import KalleLMTraining

logger = logging.getLogger(__name__)

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
        counters = [self.seed, trainer.global_step, batch_idx, trainer.global_rank, 1]
        state = int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> np.uint64(1))
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
        """Advance."""
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
