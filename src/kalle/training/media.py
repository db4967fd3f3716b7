"""Pictures and sounds in the logger, so that a run can be looked at and listened to."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import Tensor

from kalle.losses.spectral import LogMel, MelConfig
from kalle.models.batch import LMBatch, WaveBatch
from kalle.training.flowvae import FlowVAETraining
from kalle.training.lm import KalleLMTraining

logger = logging.getLogger(__name__)

Sampler = Callable[[KalleLMTraining, str], Tensor]
"""(training module, text) -> waveform (S,)."""


def mel_picture(wav: Tensor, sample_rate: int) -> np.ndarray:
    """Log-mel of ``wav`` (S,) as a uint8 picture (n_mels, frames), low frequencies at the bottom."""
    mel = LogMel(MelConfig(sample_rate=sample_rate))(wav.detach().float().cpu()[None])[0].flip(0)
    scaled = (mel - mel.min()) / (mel.max() - mel.min()).clamp(min=1e-5)
    return (255 * scaled).byte().numpy()


def log_speech(loggers: list[Logger], name: str, wav: Tensor, sample_rate: int, step: int) -> None:
    """Send the sound and its mel picture of ``wav`` (S,) to every logger that can hold them."""
    audio = wav.detach().float().cpu().clamp(-1, 1)
    picture = mel_picture(audio, sample_rate)
    for target in loggers:
        if isinstance(target, TensorBoardLogger):
            target.experiment.add_audio(name, audio, step, sample_rate)
            target.experiment.add_image(f"{name}/mel", picture, step, dataformats="HW")
        elif isinstance(target, WandbLogger):
            target.log_audio(name, [audio.numpy()], step=step, sample_rate=[sample_rate])
            target.log_image(f"{name}/mel", [picture], step=step)


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
    """Fixed texts, spoken at every validation by a sampler that the caller binds."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts
        self._sampler: Sampler | None = None
        self._sample_rate = 0

    def bind(self, sampler: Sampler, sample_rate: int) -> None:
        """Give the callback its voice; without one it stays silent."""
        self._sampler, self._sample_rate = sampler, sample_rate

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
        if not last or self._sampler is None or trainer.sanity_checking or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, KalleLMTraining)
        for index, text in enumerate(self.texts):
            wav = self._sampler(pl_module, text)
            if len(wav) == 0:
                logger.info("step %d: %r ended before its first frame", trainer.global_step, text)
                continue
            log_speech(trainer.loggers, f"speech/{index}", wav, self._sample_rate, trainer.global_step)
