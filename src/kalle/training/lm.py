"""Training of the language model: the KL between its prediction and the posterior of the next frame (KALL-E paper, section 3.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kalle.checkpoint import check_fields
from kalle.losses.latent import Direction, next_distribution_loss, speaker_kl
from kalle.models.batch import LMBatch
from kalle.models.lm import KalleLM
from kalle.training.seeding import step_generator

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class LMObjective:
    """Terms of the loss. The defaults are the paper's weights and the authors' scripts' direction."""

    direction: Direction = "prediction_posterior"
    end_weight: float = 0.02
    speaker_weight: float = 0.1
    speaker_drop: float = 0.0
    """Probability that a batch is trained without its speaker position."""
    input_noise: float = 0.0
    """Largest share k of noise mixed into the input latents, sqrt(k) eps + sqrt(1 - k) z with k ~ U(0, input_noise) per frame
    (CALM, arXiv 2509.06926); in units of the latents' own standard deviation. Training only."""

    def __post_init__(self) -> None:
        check_fields(self, "objective")


class KalleLMTraining(lightning.LightningModule):
    """Teacher-forced training of a KalleLM; the loss is fp32 whatever the backbone runs in."""

    def __init__(
        self,
        lm: KalleLM,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        objective: LMObjective,
        seed: int = 0,
    ) -> None:
        """``optimizer`` and ``scheduler`` are partials."""
        super().__init__()
        self.lm, self.objective, self.seed = lm, objective, seed
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler

    def configure_optimizers(self) -> Any:
        """AdamW (or whatever the partial makes) over all weights, and a schedule stepped at every update."""
        optimizer = self.optimizer_factory(self.lm.parameters())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler_factory(optimizer), "interval": "step"}}

    def training_step(self, batch: LMBatch, batch_idx: int) -> Tensor:
        """The loss of one batch, in nats per dimension."""
        generator = step_generator(self.seed, self.global_step, batch_idx, self.global_rank)
        losses = self.losses(self.augmented(batch, generator))
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=len(batch.text_ids))
        self.log("train/loss", losses["total"].detach(), prog_bar=True, logger=False, batch_size=len(batch.text_ids))
        return losses["total"]

    def losses(self, batch: LMBatch) -> dict[str, Tensor]:
        """``total`` and its parts for ``batch``."""
        loss = next_distribution_loss(self.lm(batch), batch, self.objective.direction, self.objective.end_weight)
        losses = {"total": loss.total, "frame_kl": loss.frame_kl, "end_kl": loss.end_kl}
        if batch.speaker_mels is not None:
            losses["speaker_kl"] = speaker_kl(self.lm.encode_speaker(batch.speaker_mels))
            losses["total"] = losses["total"] + self.objective.speaker_weight * losses["speaker_kl"]
        return losses

    def augmented(self, batch: LMBatch, generator: torch.Generator) -> LMBatch:
        """``batch`` with input noise and speaker dropping applied, both drawn from ``generator``."""
        if batch.speaker_mels is not None and torch.rand((), generator=generator) < self.objective.speaker_drop:
            batch = dataclasses.replace(batch, speaker_mels=None, speaker_noise=None)
        if self.objective.input_noise == 0:
            return batch
        share = self.objective.input_noise * torch.rand((*batch.latents.shape[:2], 1), generator=generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        share, noise = share.to(batch.latents.device), noise.to(batch.latents.device)
        mean, std = self._latent_scale()
        latents = mean + share.sqrt() * noise * std + (1 - share).sqrt() * (batch.latents - mean)
        return dataclasses.replace(batch, latents=latents)

    def _latent_scale(self) -> tuple[Tensor | float, Tensor | float]:
        if self.lm.config.normalise_latents:
            return self.lm.latent_mean, self.lm.latent_std
        return 0.0, 1.0

    @torch.no_grad()
    def validation_step(self, batch: LMBatch, batch_idx: int) -> None:
        """Losses on held-out utterances, and the same with every text swapped for another's.

        The KL is averaged over the frames of the whole split, everything else over its utterances.
        """
        metrics = {f"val/{name}": value for name, value in self.losses(batch).items()}
        if len(batch.text_ids) > 1:
            swapped = dataclasses.replace(batch, text_ids=batch.text_ids.roll(1, 0), text_lengths=batch.text_lengths.roll(1, 0))
            metrics["val/frame_kl_swapped_text"] = self.losses(swapped)["frame_kl"]
        frames = int(batch.latent_lengths.sum())
        for name, value in metrics.items():
            self.log(name, value, batch_size=frames if "frame_kl" in name else len(batch.text_ids), sync_dist=True)
