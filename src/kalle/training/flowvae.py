"""Training of the Flow-VAE: reconstruction, prior KL and, optionally, discriminators (KALL-E paper, equations 3-7)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from kalle.checkpoint import check_fields
from kalle.losses.adversarial import discriminator_loss, feature_matching_loss, generator_loss
from kalle.losses.latent import flow_kl, latent_health
from kalle.losses.spectral import LogMel, MelConfig, MelL1, mel_l1
from kalle.models.batch import WaveBatch
from kalle.models.discriminators import Discriminators
from kalle.models.flowvae import FlowVAE
from kalle.models.flowvae.model import FlowVAEOutput
from kalle.training.seeding import step_generator

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class FlowVAEObjective:
    """Weights and reductions of the terms. The defaults are the paper's weights with BigVGAN's own mel factor."""

    kl_weight: float = 32.0
    kl_reduction: Literal["mean", "sum_dim"] = "mean"
    mel_weight: float = 45.0
    adversarial_weight: float = 1.0
    feature_weight: float = 1.0
    discriminator_start_step: int = 0
    """First step at which the discriminators train and judge."""

    def __post_init__(self) -> None:
        check_fields(self, "objective")


@dataclass(frozen=True)
class ClipSchedule:
    """Largest gradient norm: ``early`` for the first ``early_steps``, ``norm`` after (BigVGAN: 100 then 1000)."""

    norm: float = 1000.0
    early: float = 100.0
    early_steps: int = 20_000

    def __post_init__(self) -> None:
        check_fields(self, "clip")

    def at(self, step: int) -> float:
        """The limit at ``step``."""
        return self.early if step < self.early_steps else self.norm


class FlowVAETraining(lightning.LightningModule):
    """Discriminator step on detached audio first, then the generator on a fresh judgement, as BigVGAN does.

    Optimisation is manual. Only generator updates count as steps: the discriminators' optimizer is stepped without
    Lightning's counter. ``discriminators=None`` trains on reconstruction and KL alone.
    """

    def __init__(
        self,
        flowvae: FlowVAE,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        objective: FlowVAEObjective,
        clip: ClipSchedule,
        discriminators: Discriminators | None = None,
        mel_loss: nn.Module | None = None,
        seed: int = 0,
    ) -> None:
        """``optimizer`` and ``scheduler`` are partials; ``mel_loss`` (real, fake (B, S)) -> scalar defaults to the single-scale mel L1."""
        super().__init__()
        self.automatic_optimization = False
        self.flowvae, self.discriminators = flowvae, discriminators
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.objective, self.clip, self.seed = objective, clip, seed
        mel = MelConfig(sample_rate=flowvae.config.sample_rate)
        self.mel_loss = mel_loss if mel_loss is not None else MelL1(mel)
        self.log_mel = LogMel(mel)

    def configure_optimizers(self) -> Any:
        """One optimizer and schedule for the generator, one more pair for the discriminators when there are any."""
        modules = [self.flowvae] if self.discriminators is None else [self.flowvae, self.discriminators]
        optimizers = [self.optimizer_factory(module.parameters()) for module in modules]
        return optimizers, [self.scheduler_factory(optimizer) for optimizer in optimizers]

    @property
    def adversarial(self) -> bool:
        """Whether the discriminators take part at this step."""
        return self.discriminators is not None and self.global_step >= self.objective.discriminator_start_step

    def training_step(self, batch: WaveBatch, batch_idx: int) -> None:
        """One update of each side."""
        noise = step_generator(self.seed, self.global_step, self.global_rank)
        output = self.flowvae(batch.wav, generator=noise)
        real = batch.wav[:, : output.wav.shape[1]]
        losses: dict[str, Tensor] = {}
        if self.adversarial:
            losses["discriminator"] = self._discriminator_step(real, output.wav.detach())
        losses |= self._generator_step(real, output)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, prog_bar=False)
        self.log("train/loss", losses["total"].detach(), prog_bar=True)
        # The judges' schedule counts their own updates, so a delayed start begins with its warm-up.
        for scheduler in self._schedulers() if "discriminator" in losses else self._schedulers()[:1]:
            scheduler.step()

    def _generator_step(self, real: Tensor, output: FlowVAEOutput) -> dict[str, Tensor]:
        objective = self.objective
        losses = {
            "mel": self.mel_loss(real, output.wav.float()),
            "kl": flow_kl(output.z_prior, output.posterior.log_std, objective.kl_reduction),
        }
        total = objective.mel_weight * losses["mel"] + objective.kl_weight * losses["kl"]
        if self.adversarial:
            assert self.discriminators is not None
            judged, truth = self.discriminators(output.wav), self.discriminators(real)
            losses["generator"] = generator_loss(judged.scores)
            losses["feature"] = feature_matching_loss(truth.features, judged.features)
            total = total + objective.adversarial_weight * losses["generator"] + objective.feature_weight * losses["feature"]
        optimizer = self._optimizers()[0]
        optimizer.zero_grad()
        self.manual_backward(total)
        losses["gradient_norm"] = nn.utils.clip_grad_norm_(self.flowvae.parameters(), self.clip.at(self.global_step))
        optimizer.step()
        return losses | {"total": total}

    def _discriminator_step(self, real: Tensor, fake: Tensor) -> Tensor:
        assert self.discriminators is not None
        loss = discriminator_loss(self.discriminators(real).scores, self.discriminators(fake).scores)
        # Lightning's wrapper would count this as a step of its own and halve every schedule.
        optimizer = self._optimizers()[1].optimizer
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(self.discriminators.parameters(), self.clip.at(self.global_step))
        optimizer.step()
        return loss

    def _optimizers(self) -> list[Any]:
        optimizers = self.optimizers()
        return list(optimizers) if isinstance(optimizers, list) else [optimizers]

    def _schedulers(self) -> list[Any]:
        schedulers = self.lr_schedulers()
        return list(schedulers) if isinstance(schedulers, list) else [schedulers]

    @torch.no_grad()
    def validation_step(self, batch: WaveBatch, batch_idx: int) -> None:
        """Whole utterances: log-mel L1 of the decoded mean, and the health of the latents."""
        posterior = self.flowvae.encode(batch.wav)
        z = posterior.sample(generator=step_generator(self.seed, batch_idx))
        wav = self.flowvae.decode(posterior.mean)
        samples = min(wav.shape[1], batch.wav.shape[1])
        distance = mel_l1(self.log_mel(batch.wav[:, :samples]), self.log_mel(wav[:, :samples]))
        metrics = {"mel_l1": distance} | latent_health(posterior, z, self.flowvae.to_prior(z))
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, batch_size=len(batch.wav), sync_dist=True)
