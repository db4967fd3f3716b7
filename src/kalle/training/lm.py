"""The LightningModule of the language model: losses, drops, input noise."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from torch import Tensor

from kalle.checkpoint import as_tuple, check_fields, check_range
from kalle.errors import UserError
from kalle.losses.latent import Direction, TextAttention, alignment_loss, next_distribution_loss, speaker_kl, stop_bce, stop_rows
from kalle.models.lm import KalleLM
from kalle.models.lm_batch import LMBatch, Packing, RowLayout
from kalle.seeds import derived_seed
from kalle.text.tokenizer import without_text
from kalle.training.distributed import (
    Reduction,
    global_weight,
    is_sharded,
    shard_language_model,
)
from kalle.training.optimisation import (
    OptimizerFactory,
    SchedulerFactory,
    draws_dropout,
    parameter_groups,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LMObjective:
    """Terms of the loss. The defaults are the paper's weights and the authors' scripts' direction."""

    direction: Direction = "prediction_posterior"
    """Of the KL divergence; posterior_prediction is the paper's equation 10."""
    end_weight: float = 0.02
    """Weight of the KL at the end of an utterance."""
    speaker_weight: float = 0.1
    """Weight of the KL of the speaker latent, where the model has a speaker encoder."""
    speaker_drop: float = 0.0
    """Probability that an utterance is trained without its speaker position."""
    text_drop: float = 0.0
    """Probability that an utterance is trained without its text, which makes guidance at synthesis possible (arXiv 2207.12598)."""
    input_noise: float = 0.0
    """Largest share k of noise mixed into the input latents, sqrt(k) eps + sqrt(1 - k) z with k ~ U(0, input_noise) per frame
    (CALM, arXiv 2509.06926); in units of the latents' own standard deviation. Training only."""

    stop_weight: float = 1.0
    """Weight of the stop head's cross-entropy, where the model has a stop head."""
    stop_positive_weight: float = 100.0
    """How often an end counts in it (MELLE, arXiv 2407.08551)."""

    alignment_weight: float = 0.0
    """Weight of `alignment_loss` on one attention head of each of ``alignment_layers``. Helps where utterances are few and texts are read
    in order, which a model finds out by itself only after very many; not in the paper."""
    alignment_layers: tuple[int, ...] = (2, 3)
    """Layers, from 0, whose head 0 is trained to follow the text."""

    reduction: Reduction = "global"
    """The loss of several processes: the means over the frames and utterances of all ranks together, so that the update is one
    process's on all their batches; or "rank", the average of each rank's own means, which saves one small exchange a step."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "alignment_layers", as_tuple(self.alignment_layers))
        check_fields(self, "objective")
        check_range(self, "objective", "end_weight", "speaker_weight", "stop_weight", "stop_positive_weight", "alignment_layers")
        check_range(self, "objective", "speaker_drop", "input_noise", most=1)
        if self.alignment_weight < 0 or (self.alignment_weight > 0 and not self.alignment_layers):
            got = f"alignment_weight={self.alignment_weight}, alignment_layers={list(self.alignment_layers)}"
            raise UserError(f"objective: got {got}, expected a weight of 0 or more, and layers for it; correct it")
        if not 0 <= self.text_drop <= 1:
            raise UserError(f"objective.text_drop: got {self.text_drop}, expected a probability from 0 to 1; correct it")


class KalleLMTraining(lightning.LightningModule):
    """Teacher-forced training of a KalleLM; the loss is fp32 whatever the backbone runs in."""

    def __init__(
        self,
        lm: KalleLM,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory,
        objective: LMObjective,
        seed: int = 0,
        *,
        packing: Packing | None = None,
        decay_all: bool = True,
    ) -> None:
        """``optimizer`` and ``scheduler`` are partials; ``packing`` puts several utterances into the rows of a batch; for
        ``decay_all`` see `parameter_groups`."""
        super().__init__()
        if objective.alignment_weight:
            TextAttention(lm, objective.alignment_layers)  # refuses layers that are not there
        self.lm, self.objective, self.seed = lm, objective, seed
        self.optimizer_factory, self.scheduler_factory = optimizer, scheduler
        self.packing, self.decay_all = packing, decay_all

    def configure_optimizers(self) -> Any:
        """AdamW (or whatever the partial makes) over the weights that train, and a schedule stepped at every update."""
        optimizer = self.optimizer_factory(parameter_groups(self.lm, self.decay_all))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler_factory(optimizer), "interval": "step"}}

    def training_step(self, batch: LMBatch, batch_idx: int) -> Tensor:
        """The loss of one batch, in nats per dimension."""
        step = (self.global_step, batch_idx, self.global_rank)
        augmented = self.augmented(batch, step)
        layout = self.lm.layout(augmented, self.packing)
        with self._seeded_dropout(step):
            losses = self.losses(augmented, layout) if not self.objective.alignment_weight else self.aligned_losses(augmented, layout)
        logged = {**losses, "padding_share": layout.padding_share}
        self.log_dict({f"train/{name}": value.detach() for name, value in logged.items()}, batch_size=len(batch.text_ids))
        self.log("train/loss", losses["total"].detach(), prog_bar=True, logger=False, batch_size=len(batch.text_ids))
        return losses["total"] if self.objective.reduction == "rank" else self._over_ranks(losses, augmented)

    def _over_ranks(self, losses: dict[str, Tensor], batch: LMBatch) -> Tensor:
        """``total`` with each mean weighted by what it covers, see `global_weight`."""
        frames, utterances = global_weight(batch.latent_lengths.sum()), global_weight(torch.tensor(len(batch.text_ids), device=self.device))
        total = frames * losses["frame_kl"] + utterances * self.objective.end_weight * losses["end_kl"]
        if "speaker_kl" in losses:
            total = total + utterances * self.objective.speaker_weight * losses["speaker_kl"]
        if "alignment" in losses:
            total = total + frames * self.objective.alignment_weight * losses["alignment"]
        if "stop_bce" in losses:
            total = total + global_weight(stop_rows(batch.latent_lengths)) * self.objective.stop_weight * losses["stop_bce"]
        return total

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether a step may train without the speaker encoder, which DDP has to be told."""
        return self.lm.speaker_encoder is not None and self.objective.speaker_drop > 0

    def losses(self, batch: LMBatch, layout: RowLayout | None = None) -> dict[str, Tensor]:
        """``total`` and its parts for ``batch``, computed in the rows of ``layout``."""
        layout = layout or self.lm.layout(batch, self.packing)
        # Encoded once: its batch statistics are to count a batch once, and it costs time.
        speaker = self.lm.speaker_latent(batch)
        prediction = self.lm(batch, layout, None if speaker is None else speaker[0])
        loss = next_distribution_loss(prediction, batch, self.objective.direction, self.objective.end_weight)
        losses = {"total": loss.total, "frame_kl": loss.frame_kl, "end_kl": loss.end_kl}
        if speaker is not None:
            losses["speaker_kl"] = speaker_kl(speaker[1])
            losses["total"] = losses["total"] + self.objective.speaker_weight * losses["speaker_kl"]
        if prediction.stop_logit is not None:
            losses["stop_bce"] = stop_bce(prediction.stop_logit, batch.latent_lengths, self.objective.stop_positive_weight)
            losses["total"] = losses["total"] + self.objective.stop_weight * losses["stop_bce"]
        return losses

    def aligned_losses(self, batch: LMBatch, layout: RowLayout) -> dict[str, Tensor]:
        """`losses` with the alignment of the attention to the text, averaged over the layers that are trained to follow it."""
        text_start = layout.lengths - batch.text_lengths - batch.latent_lengths
        with TextAttention(self.lm, self.objective.alignment_layers) as attention:
            losses = self.losses(batch, layout)
            each = [
                alignment_loss(attention.weights(layer, batch, layout, text_start), batch.text_lengths, batch.latent_lengths)
                for layer in self.objective.alignment_layers
            ]
        losses["alignment"] = torch.stack(each).mean()
        losses["total"] = losses["total"] + self.objective.alignment_weight * losses["alignment"]
        return losses

    def augmented(self, batch: LMBatch, step: Sequence[int] = (0,)) -> LMBatch:
        """``batch`` with speakers and texts dropped and input noise; ``step`` is used where it does not say which samples it holds."""
        idle = self.objective.input_noise == self.objective.text_drop == 0
        if idle and (self.objective.speaker_drop == 0 or batch.speaker_mels is None):
            return batch
        generators = item_generators(batch, self.seed, step)
        batch = drop_speakers(batch, self.objective.speaker_drop, generators)
        mean, std = (self.lm.latent_mean, self.lm.latent_std) if self.lm.config.normalise_latents else (0.0, 1.0)
        batch = add_input_noise(batch, self.objective.input_noise, mean, std, generators)
        # The last to draw, so that the noise of a sample is the same with and without.
        return drop_texts(batch, self.objective.text_drop, generators)

    @contextmanager
    def _seeded_dropout(self, step: Sequence[int]) -> Iterator[None]:
        """Have dropout draw what follows from the seed and ``step``, so that a resumed run draws it too."""
        if not draws_dropout(self.lm):
            yield
            return
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(derived_seed("dropout", self.seed, *step))
            yield

    @torch.no_grad()
    def validation_step(self, batch: LMBatch, batch_idx: int) -> None:
        """Losses on held-out utterances, and the same with every text swapped for another's.

        The KL is averaged over the frames of the whole split, the stop head's loss over those and the ends, everything else over its
        utterances.
        """
        metrics = {f"val/{name}": value for name, value in self.losses(batch).items()}
        frames, utterances = int(batch.latent_lengths.sum()), len(batch.text_ids)
        counts = {"val/frame_kl": frames, "val/stop_bce": frames + utterances}
        swapped = dataclasses.replace(batch, text_ids=batch.text_ids.roll(1, 0), text_lengths=batch.text_lengths.roll(1, 0))
        metrics["val/frame_kl_swapped_text"] = self.losses(swapped)["frame_kl"]
        # An utterance alone has no other's text. It counts for nothing but is logged: ranks that log different names wait for ever.
        counts["val/frame_kl_swapped_text"] = frames if utterances > 1 else 0
        for name, value in metrics.items():
            self.log(name, value, batch_size=counts.get(name, utterances), sync_dist=True)


class ShardedLMTraining(KalleLMTraining):
    """KalleLMTraining whose model is sharded (torch's fully_shard) once the processes have met."""

    def configure_model(self) -> None:
        """Shard the model, unless that is done."""
        if not is_sharded(self.lm):
            assert self.device_mesh is not None
            shard_language_model(self.lm, self.device_mesh["data_parallel"], str(self.trainer.precision))


def item_generators(batch: LMBatch, seed: int, step: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator for every utterance of ``batch``.

    It follows from ``seed``, the epoch and the cut id; for a batch that does not say which samples it holds, from ``seed``, ``step`` (the
    step, the rank, …) and the place in the batch.
    """
    if batch.epochs:
        keys: list[tuple[int | str, ...]] = list(zip(batch.epochs, batch.cut_ids, strict=True))
    else:
        keys = [("step", *step, index) for index in range(len(batch.text_ids))]
    return [torch.Generator().manual_seed(derived_seed("augmentation", seed, *key)) for key in keys]


def drop_speakers(batch: LMBatch, probability: float, generators: Sequence[torch.Generator]) -> LMBatch:
    """Have each utterance read without its speaker with ``probability``; one number is drawn from each generator whatever that is."""
    kept = torch.tensor([float(torch.rand((), generator=generator)) >= probability for generator in generators])
    if batch.speaker_mels is None or bool(kept.all()):
        return batch
    return dataclasses.replace(batch, speaker_kept=kept.to(batch.text_lengths.device))


def drop_texts(batch: LMBatch, probability: float, generators: Sequence[torch.Generator]) -> LMBatch:
    """Have each utterance read without its text (`without_text`) with ``probability``, for classifier-free guidance.

    Such a row is as much shorter as its text was long. One number is drawn from each generator where ``probability`` is not 0.
    """
    if probability == 0:
        return batch
    dropped = [row for row, generator in enumerate(generators) if float(torch.rand((), generator=generator)) < probability]
    ids, lengths = batch.text_ids.clone(), batch.text_lengths.clone()
    for row in dropped:
        kept = without_text(batch.text_ids[row, : int(batch.text_lengths[row])])
        ids[row] = 0
        ids[row, : len(kept)], lengths[row] = kept, len(kept)
    return dataclasses.replace(batch, text_ids=ids, text_lengths=lengths)


def add_input_noise(
    batch: LMBatch, largest: float, mean: Tensor | float, std: Tensor | float, generators: Sequence[torch.Generator]
) -> LMBatch:
    """Mix noise into the input latents, sqrt(k) eps + sqrt(1 - k) z with k ~ U(0, ``largest``) per frame (CALM, arXiv 2509.06926).

    In units of the latents' ``mean`` and ``std`` ((D,) or numbers), so that both are preserved. Padding stays as it is.
    """
    if largest == 0:
        return batch
    share = torch.zeros(*batch.latents.shape[:2], 1)
    noise = torch.zeros(batch.latents.shape)
    for index, (generator, frames) in enumerate(zip(generators, batch.latent_lengths.tolist(), strict=True)):
        share[index, :frames] = largest * torch.rand((frames, 1), generator=generator)
        noise[index, :frames] = torch.randn((frames, batch.latents.shape[2]), generator=generator)
    share, noise = share.to(batch.latents.device), noise.to(batch.latents.device)
    latents = mean + share.sqrt() * noise * std + (1 - share).sqrt() * (batch.latents - mean)
    return dataclasses.replace(batch, latents=latents)
