"""The LightningModule of the Flow-VAE: generator and discriminators in turn."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any, Literal

import lightning
import torch
from torch import Tensor, nn

from kalle.checkpoint import check_fields, check_range
from kalle.errors import UserError
from kalle.losses.latent import LatentHealth, flow_kl
from kalle.losses.pitch import track_pitch
from kalle.losses.waveform import (
    ENERGY_WINDOWS,
    LogMel,
    MelConfig,
    MelL1,
    OverParts,
    SpectralEnergyDistance,
    discriminator_loss,
    feature_matching_loss,
    generator_loss,
    mel_l1,
)
from kalle.models.discriminators import Discriminators
from kalle.models.flowvae import FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.istft import NOISE_FRAMES
from kalle.models.flowvae.model import FlowVAEOutput, FrameWindow
from kalle.models.lm_batch import WaveBatch
from kalle.seeds import derived_seed, standard_noise
from kalle.training.distributed import frozen, sum_over_ranks
from kalle.training.optimisation import OptimizerFactory, SchedulerFactory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FlowVAEObjective:
    """Weights and reductions of the terms. The defaults are the paper's weights with BigVGAN's own factors inside the terms."""

    kl_weight: float = 32.0
    """The paper's lambda_kl."""
    kl_reduction: Literal["mean", "sum_dim"] = "mean"
    """Over batch, time and dimension; or summed over dimensions first, which makes a weight latent_dim times as strong."""
    mel_weight: float = 45.0
    """The paper's lambda_recon (1) times the mel loss' own factor: BigVGAN's 45, or 15 for the multi-scale loss."""
    adversarial_weight: float = 1.0
    """The paper's lambda_disc."""
    adversarial_reduction: OverParts = "sum"
    """Over sub-discriminators, in the discriminators' loss and in the generator's."""
    feature_weight: float = 1.0
    """The paper's lambda_fm."""
    feature_factor: float = 2.0
    """BigVGAN's factor inside the feature matching term."""
    feature_reduction: OverParts = "sum"
    """Over feature maps, each of which is averaged."""
    discriminator_start_step: int = 0
    """First step at which the discriminators take part."""
    decoded_frames: int | None = None
    """Latent frames of each crop, from a random place, that are decoded and compared with the recording; null: all. The encoder, which sees
    seconds to both sides, has the whole crop (as in VITS, arXiv 2106.06103, section 2.2.3)."""
    judged_frames: int | None = None
    """Of what is decoded, the frames, from a random place, that the discriminators hear; null: all."""
    energy_weight: float = 0.0
    """Of the spectral energy distance (arXiv 2008.01160), for decoders with noise: each crop is decoded twice, with noise of its own."""

    pitch_weight: float = 1.0
    """Of the pitch that a decoder with harmonics predicts: mean difference from the recording's, in nepers, where it has one."""

    def __post_init__(self) -> None:
        check_fields(self, "objective")
        weights = [part.name for part in fields(self) if part.name.endswith("_weight")]
        check_range(self, "objective", *weights, "feature_factor", "discriminator_start_step")
        decoded, judged = self.decoded_frames, self.judged_frames
        for name, frames in (("decoded_frames", decoded), ("judged_frames", judged)):
            if frames is not None and frames < 1:
                raise UserError(f"objective.{name}: got {frames}, expected at least 1 frame, or null for all; correct it")
        if decoded is not None and judged is not None and judged > decoded:
            raise UserError(
                f"objective.judged_frames: got {judged}, more than objective.decoded_frames={decoded}, "
                "expected at most as many; correct one"
            )

    def check_fits(self, flowvae: FlowVAEConfig, frames: int) -> None:
        """UserError unless crops of ``frames`` latent frames are long enough for both windows, and the decoder has the noise it needs."""
        if self.energy_weight and not flowvae.has_noise:
            raise UserError(
                f"objective.energy_weight: got {self.energy_weight} for a decoder without noise, which decodes a crop the same way twice; "
                "set flowvae.decoder.noise=true (FlowVAE.with_sources gives it to trained weights), or the weight to 0"
            )
        compared = (self.decoded_frames or frames) * flowvae.hop_length
        if self.energy_weight and compared < max(ENERGY_WINDOWS):
            raise UserError(
                f"objective.energy_weight: got {compared} samples of a crop to compare, expected at least {max(ENERGY_WINDOWS)}, "
                "its longest window; raise objective.decoded_frames or data.segment_samples"
            )
        for name, wanted in (("decoded_frames", self.decoded_frames), ("judged_frames", self.judged_frames)):
            if wanted is not None and wanted > frames:
                raise UserError(
                    f"objective.{name}: got {wanted}, more than the {frames} frames of a crop, expected at most as many; correct it, or "
                    "take longer crops (data.segment_samples)"
                )


@dataclass(frozen=True)
class ClipSchedule:
    """Largest gradient norm: ``early`` for the first ``early_steps``, ``norm`` after (BigVGAN: 100 then 1000)."""

    norm: float = 1000.0
    """Largest norm after the first steps."""
    early: float = 100.0
    """Largest norm in them."""
    early_steps: int = 20_000
    """How many they are."""

    def __post_init__(self) -> None:
        check_fields(self, "clip")
        check_range(self, "clip", "norm", "early", above=True)
        check_range(self, "clip", "early_steps")

    def at(self, step: int) -> float:
        """The limit at ``step``."""
        return self.early if step < self.early_steps else self.norm


class FlowVAETraining(lightning.LightningModule):
    """Discriminator step on detached audio first, then the generator on fresh scores, as BigVGAN does.

    Optimisation is manual. Only generator updates count as steps: the discriminators' optimizer is stepped without
    Lightning's counter. ``discriminators=None`` trains on reconstruction and KL alone. On several ranks the strategy must be
    `AdversarialDDP`. Under bf16 autocast the networks' bodies run in bf16; waveforms, spectrograms and every loss are fp32.
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
        self.energy = SpectralEnergyDistance(flowvae.config.sample_rate)
        self.gradient_norms: dict[int, Tensor] = {}
        """The norm before clipping, by the optimizer's index, for the guard that checks an update before it is made."""
        self._start_validation()

    def networks(self) -> list[nn.Module]:
        """The generator, and the discriminators when there are any: what is optimised in turn."""
        return [self.flowvae] if self.discriminators is None else [self.flowvae, self.discriminators]

    def compile_networks(self) -> None:
        """Compile the training passes in place: names of weights stay, and whole utterances, which differ in length, stay uncompiled."""
        for network in self.networks():
            network.compile(dynamic=False)

    def configure_optimizers(self) -> Any:
        """One optimizer and schedule for the generator, one more pair for the discriminators when there are any."""
        optimizers = [self.optimizer_factory(network.parameters()) for network in self.networks()]
        schedules = [{"scheduler": self.scheduler_factory(optimizer), "interval": "step"} for optimizer in optimizers]
        return [{"optimizer": one, "lr_scheduler": other} for one, other in zip(optimizers, schedules, strict=True)]

    @property
    def adversarial(self) -> bool:
        """Whether the discriminators take part at this step."""
        return self.discriminators is not None and self.global_step >= self.objective.discriminator_start_step

    def noise(self, batch: WaveBatch) -> Tensor:
        """Standard normal (B, T, D) on the CPU: a function of seed, epoch, cut and crop, whatever the rank and the batch."""
        shape = (self._frames(batch), self.flowvae.config.latent_dim)
        return torch.stack([standard_noise(shape, "posterior", *key) for key in self._keys(batch)])

    def _frames(self, batch: WaveBatch) -> int:
        return batch.wav.shape[1] // self.flowvae.config.hop_length

    def _keys(self, batch: WaveBatch) -> list[tuple[int | str, ...]]:
        """The random numbers of each row depend on these alone."""
        crops = batch.crops or range(len(batch.wav))
        return [(self.seed, self.current_epoch, cut, crop) for cut, crop in zip(batch.cut_ids, crops, strict=True)]

    def _window(self, purpose: str, batch: WaveBatch, of: int, frames: int | None) -> FrameWindow | None:
        """A random place of ``frames`` of the ``of`` frames of each row, the same whatever the rank and the batch; None for all of them."""
        if frames is None or frames == of:
            return None
        starts = [derived_seed(purpose, *key) % (of - frames + 1) for key in self._keys(batch)]
        return FrameWindow(torch.tensor(starts, device=self.device), frames)

    def _noise_starts(self, batch: WaveBatch, purpose: str = "decoder noise") -> Tensor:
        """A random place in the decoder's own noise for each row, or the discriminators would come to know it."""
        return torch.tensor([derived_seed(purpose, *key) % NOISE_FRAMES for key in self._keys(batch)], device=self.device)

    def training_step(self, batch: WaveBatch, batch_idx: int) -> None:
        """One update of each side. ``wav`` is a whole number of frames long."""
        unit = self.flowvae.config.hop_length
        decoded = self._window("decoded", batch, self._frames(batch), self.objective.decoded_frames)
        noise, start = self.noise(batch).to(self.device), self._noise_starts(batch)
        second = self._noise_starts(batch, "decoder noise again") if self.objective.energy_weight else None
        real = batch.wav[:, : self._frames(batch) * unit] if decoded is None else decoded.of(batch.wav, unit)
        pitch = self._pitch(real)
        output: FlowVAEOutput = self.flowvae(
            batch.wav, noise=noise, window=decoded, noise_start=start, second_noise_start=second, pitch=pitch
        )
        judged = self._window("judged", batch, output.wav.shape[1] // unit, self.objective.judged_frames)
        losses: dict[str, Tensor] = {}
        if self.adversarial:
            losses["discriminator"] = self._discriminator_step(*_cut(judged, unit, real, output.wav.detach()))
        losses |= self._generator_step(real, output, judged, pitch)
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, prog_bar=False)
        self.log("train/loss", losses["total"].detach(), prog_bar=True)
        # The discriminators' schedule counts their own updates, so a delayed start begins with its warm-up.
        for scheduler in self._schedulers() if "discriminator" in losses else self._schedulers()[:1]:
            scheduler.step()

    def _pitch(self, real: Tensor) -> Tensor | None:
        """Pitch of the recordings (B, STFT frames), in bins, NaN where unvoiced; None for a decoder without harmonics."""
        config = self.flowvae.config
        if not config.has_harmonics:
            return None
        assert isinstance(config.decoder, ISTFTConfig), config.decoder
        hertz = track_pitch(real, config.decoder.hop_length_stft, config.sample_rate)
        return hertz * (config.decoder.n_fft / config.sample_rate)

    def _generator_step(self, real: Tensor, output: FlowVAEOutput, judged: FrameWindow | None, pitch: Tensor | None) -> dict[str, Tensor]:
        # Gradients pass through the discriminators to the audio; their own would be computed, sent to every rank, and thrown away.
        with nullcontext() if self.discriminators is None else frozen(self.discriminators):
            losses = self._generator_losses(real, output, judged, pitch)
            optimizer = self._optimizers()[0]
            optimizer.zero_grad()
            self.manual_backward(losses["total"])
        self.gradient_norms[0] = nn.utils.clip_grad_norm_(self.flowvae.parameters(), self.clip.at(self.global_step))
        losses["gradient_norm"] = self.gradient_norms[0]
        optimizer.step()
        return losses

    def _generator_losses(self, real: Tensor, output: FlowVAEOutput, judged: FrameWindow | None, pitch: Tensor | None) -> dict[str, Tensor]:
        objective, fake = self.objective, output.wav.float()
        losses = {
            "mel": self.mel_loss(real, fake),
            "kl": flow_kl(output.z_prior, output.posterior.log_std, objective.kl_reduction),
        }
        total = objective.mel_weight * losses["mel"] + objective.kl_weight * losses["kl"]
        if output.second is not None:
            losses["energy"] = self.energy(real, fake, output.second.float())
            total = total + objective.energy_weight * losses["energy"]
        if pitch is not None and output.log_pitch is not None:
            voiced = ~pitch.isnan()
            missed = (output.log_pitch - pitch.where(voiced, 1.0).log()).abs() * voiced
            losses["pitch"] = missed.sum() / voiced.sum().clamp(min=1)
            total = total + objective.pitch_weight * losses["pitch"]
        if self.adversarial:
            assert self.discriminators is not None
            real, fake = _cut(judged, self.flowvae.config.hop_length, real, fake)
            with torch.no_grad():
                truth = self.discriminators(real)
            scored = self.discriminators(fake)
            losses["generator"] = generator_loss(scored.scores, objective.adversarial_reduction)
            losses["feature"] = feature_matching_loss(
                truth.features, scored.features, objective.feature_factor, objective.feature_reduction
            )
            total = total + objective.adversarial_weight * losses["generator"] + objective.feature_weight * losses["feature"]
        return losses | {"total": total}

    def _discriminator_step(self, real: Tensor, fake: Tensor) -> Tensor:
        assert self.discriminators is not None
        scored_real, scored_fake = self.discriminators(torch.cat([real, fake.float()])).split(len(real))
        loss = discriminator_loss(scored_real.scores, scored_fake.scores, self.objective.adversarial_reduction)
        # Lightning's wrapper would count this as a step of its own and halve every schedule.
        optimizer = self._optimizers()[1].optimizer
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.gradient_norms[1] = nn.utils.clip_grad_norm_(self.discriminators.parameters(), self.clip.at(self.global_step))
        optimizer.step()
        # Autocast keeps half-precision copies of the weights until the step ends; the generator must use the updated ones.
        torch.clear_autocast_cache()
        return loss

    def _optimizers(self) -> list[Any]:
        optimizers = self.optimizers()
        return list(optimizers) if isinstance(optimizers, list) else [optimizers]

    def _schedulers(self) -> list[Any]:
        schedulers = self.lr_schedulers()
        return list(schedulers) if isinstance(schedulers, list) else [schedulers]

    def _start_validation(self) -> None:
        self._health = LatentHealth(self.flowvae.config.latent_dim)
        self._distances = torch.zeros(2, dtype=torch.float64)  # sum of log-mel L1 over utterances, their number

    def on_validation_epoch_start(self) -> None:
        """Reset the sums."""
        self._start_validation()

    @torch.no_grad()
    def validation_step(self, batch: WaveBatch, batch_idx: int) -> dict[str, Tensor]:
        """Whole utterances in full precision: log-mel L1 of the decoded mean, and the health of the latents.

        Returns ``wav``, the reconstruction (B, S'), and ``std``, the posterior's (B, T, D), for callbacks.
        """
        with torch.autocast(self.device.type, enabled=False):
            posterior = self.flowvae.encode(batch.wav)
            noise = standard_noise(posterior.mean.shape, "validation", self.seed, *batch.cut_ids)
            z = posterior.sample(noise)
            wav = self.flowvae.decode(posterior.mean)
            samples = min(wav.shape[1], batch.wav.shape[1])
            distance = mel_l1(self.log_mel(batch.wav[:, :samples]), self.log_mel(wav[:, :samples]))
            self._health.add(posterior, z, self.flowvae.to_prior(z))
        self._distances += torch.tensor([float(distance) * len(batch.wav), len(batch.wav)], dtype=torch.float64)
        return {"wav": wav, "std": posterior.std}

    def on_validation_epoch_end(self) -> None:
        """Log the split's ``val/mel_l1`` (mean over utterances) and ``val/*`` of `LatentHealth` (over frames), over all ranks."""
        self._health.sums = sum_over_ranks(self._health.sums, self.device)
        distance, utterances = sum_over_ranks(self._distances, self.device).tolist()
        metrics = {"mel_l1": distance / utterances, **self._health.summary()}
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, sync_dist=True)


def _cut(window: FrameWindow | None, unit: int, *waveforms: Tensor) -> tuple[Tensor, ...]:
    """The window of each of ``waveforms`` (B, S), of ``unit`` samples a frame; all of them without one."""
    return waveforms if window is None else tuple(window.of(wav, unit) for wav in waveforms)
