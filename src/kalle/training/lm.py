"""Training of the language model: the LightningModule, and `train_lm` from latents to weights."""

from __future__ import annotations

import dataclasses
import logging
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kalle.checkpoint import CONFIG_NAME, check_fields, part_folder, read_json, resolve_device, weights_hash
from kalle.data.loading.datamodules import LMDataModule
from kalle.errors import UserError
from kalle.files import atomic_file
from kalle.losses.latent import Direction, TextAttention, alignment_loss, next_distribution_loss, speaker_kl, stop_bce, stop_rows
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import PART, KalleLM, KalleLMConfig, compile_layers, recompute_activations, set_attention
from kalle.models.lm_batch import LMBatch, Packing, RowLayout
from kalle.models.lora import LoRAConfig, add_lora, also_trained, lora_factors
from kalle.models.text_weights import compact_vocabulary, expand_vocabulary, load_text_weights, with_text_backbone
from kalle.seeds import derived_seed
from kalle.synthesis.adapter import ADAPTER_FILE, SPEAKER_PARTS, Adapter, base_hash
from kalle.text.tokenizer import Tokenizer, without_text
from kalle.training.callbacks import SpeechMedia, speech_sampler
from kalle.training.checkpointing import resume_path
from kalle.training.config import LMTrainingConfig, TokenizerConfig
from kalle.training.distributed import (
    FSDP,
    Reduction,
    check_sharding,
    global_weight,
    is_sharded,
    shard_language_model,
    started_ranks,
    whole_model,
)
from kalle.training.optimisation import (
    OptimizerFactory,
    SchedulerFactory,
    draws_dropout,
    finish_training,
    freeze,
    parameter_counts,
    parameter_groups,
)
from kalle.training.plan import Plan, largest_rows, lm_footprint, make_plan, without_storage
from kalle.training.session import (
    CHECKPOINTS_FOLDER,
    INPUT_SPLITS,
    TrainingResult,
    begin,
    check_optimisation,
    check_weights_finite,
    describe,
    fit,
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
        object.__setattr__(self, "alignment_layers", tuple(self.alignment_layers))
        check_fields(self, "objective")
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


ADAPTER_FOLDER = "adapter"
_LARGE_VOCABULARY = 4096
"""Tokens from which ``compact_vocabulary=auto`` looks whether a corpus leaves most of them unused."""


def train_lm(config: LMTrainingConfig, *, callbacks: Sequence[Callback] = (), loggers: Sequence[Logger] | None = None) -> TrainingResult:
    """Train a language model as ``config`` says and write its weights to ``config.out``/weights, which can speak when a Flow-VAE is given.

    ``callbacks`` join those of ``config``; ``loggers`` take the place of those of ``config``. UserError for what cannot be trained.
    """
    begin(config)
    built = _build(config)
    config, lm, more = built.config, built.module.lm, list(callbacks)
    if config.compile:
        compile_layers(lm)
    source = config.flowvae.folder
    if source is not None:
        flowvae = FlowVAE.from_pretrained(source)
        check_encoder(flowvae, source, built.info, built.data.latents)
        if config.callbacks.media is not None:
            sampler = speech_sampler(flowvae, built.data.tokenizer, seed=config.seed)
            more.append(SpeechMedia(config.callbacks.media.texts, sampler, flowvae.config.sample_rate))
    strategy = config.trainer.strategy
    if built.module.leaves_parameters_unused and strategy in ("auto", "ddp") and started_ranks() is not None:
        strategy = "ddp_find_unused_parameters_true"
    result = fit(config, built.module, built.data, more, loggers, strategy)
    lm = whole_model(lm)
    if result.trainer.is_global_zero:
        check_weights_finite(lm)
        export_language_model(lm, built.adapters, result.weights, result.trainer.global_step)
        built.data.tokenizer.save(result.weights / "tokenizer")
        if source is not None:
            copy_flowvae(source, result.weights)
        describe(result.weights, built.info["sample_rate_hz"])
    return result


def plan_lm(config: LMTrainingConfig) -> Plan:
    """The plan of `train_lm` in numbers; UserError for what cannot be trained, but for damage of the weights to start from.

    Writes nothing.
    """
    storageless = without_storage()
    built = _build(replace(config, data=replace(config.data, cache=False, num_workers=0)), storageless)
    config, lm, data = built.config, built.module.lm, built.data
    if config.flowvae.folder is not None:
        check_encoder(FlowVAE.from_pretrained(config.flowvae.folder), config.flowvae.folder, built.info, data.latents)
    rows, text, frames = largest_rows(data, config.rows)
    with storageless:
        footprint = lm_footprint(lm, rows, text, frames, "utterances" if config.rows is None else "packed rows")
    trained, every = parameter_counts(lm)
    tokens = tokens_to_train(config.compact_vocabulary, lm, data)
    shrinks = tokens is not None and lm.backbone.embed_tokens.weight.requires_grad
    unused = (lm.vocab_size - len(tokens)) * lm.hidden_size if tokens is not None and shrinks else 0
    checkpoint = resume_path(config.resume, Path(config.out) / CHECKPOINTS_FOLDER)
    return make_plan(config, (every - unused, trained - unused), data, checkpoint, footprint)


@dataclass(frozen=True)
class Adapters:
    """The adapters of a run and the hash of the weights below them."""

    config: LoRAConfig
    base_hash: str


@dataclass(frozen=True)
class _Built:
    config: LMTrainingConfig
    data: LMDataModule
    info: dict[str, Any]
    module: KalleLMTraining
    adapters: Adapters | None


def _build(config: LMTrainingConfig, storageless: FakeTensorMode | None = None) -> _Built:
    """Data and module, checked against each other; with ``storageless`` the model has shapes alone, and no weights are read."""
    dry = storageless is not None
    check_optimisation(config)
    tokenizer = config.tokenizer.load() if isinstance(config.tokenizer, TokenizerConfig) else config.tokenizer
    config = replace(config, lm=_model_config(config, tokenizer))
    config = _with_speaker_width(config)
    data = config.data.module(tokenizer, config.seed, config.packing)
    for split in INPUT_SPLITS:
        data.dataset(split)
    info = data.info()
    with storageless or nullcontext():
        lm = start_language_model(config, info, tokenizer, dry)
        check_speaker(lm, data.speaker)
        adapters = prepare_language_model(config, lm, None if dry else tokens_to_train(config.compact_vocabulary, lm, data), dry)
    sharded = config.trainer.strategy == FSDP
    if sharded:
        check_sharding(lm, averages_weights=config.callbacks.ema is not None)
    module = (ShardedLMTraining if sharded else KalleLMTraining)(
        lm,
        optimizer=config.optimizer,
        scheduler=config.schedule,
        objective=config.objective,
        seed=config.seed,
        packing=config.rows,
        decay_all=config.decay_all,
    )
    trainable, total = parameter_counts(lm)
    logger.info("the language model has %.2f M parameters, %.2f M of them train", total / 1e6, trainable / 1e6)
    return _Built(config, data, info, module, adapters)


def _model_config(config: LMTrainingConfig, tokenizer: Tokenizer) -> KalleLMConfig:
    """The model that trains: that of ``init``, or ``config.lm``, with the backbone of ``init_text`` if given.

    A stop head in ``config.lm`` is kept.
    """
    if config.init is not None:
        path = part_folder(config.init, PART) / CONFIG_NAME
        found = KalleLMConfig.from_dict(read_json(path), str(path))
        wanted = config.lm is not None and config.lm.stop_head
        if wanted and not found.stop_head and config.lora is not None:
            raise UserError(
                f"lm.stop_head: got lora and init='{config.init}' without a stop head, expected weights that have one, for an adapter "
                "belongs to the weights it was made for; train the head first (lora=null), or leave lm.stop_head out"
            )
        return replace(found, stop_head=found.stop_head or wanted)
    assert config.lm is not None
    if config.init_text is not None:
        return with_text_backbone(config.lm, config.init_text, tokenizer.vocab_size)
    check_vocabulary(int(config.lm.backbone.get("vocab_size", tokenizer.vocab_size)), tokenizer)
    return config.lm


def _with_speaker_width(config: LMTrainingConfig) -> LMTrainingConfig:
    """The noise of a voice is as wide as the model that ``init`` brings, not as the one that the configuration described."""
    speaker, lm = config.data.speaker, config.lm
    assert lm is not None
    if config.init is None or speaker is None or speaker.latent_dim is None:
        return config
    return replace(config, data=replace(config.data, speaker=replace(speaker, latent_dim=int(lm.backbone["hidden_size"]))))


def start_language_model(config: LMTrainingConfig, info: dict[str, Any], tokenizer: Tokenizer, dry: bool = False) -> KalleLM:
    """The model that ``config`` describes or starts from, checked against the latents of ``info``; ``dry``: its shapes alone."""
    wanted, generator = config.lm, torch.Generator().manual_seed(config.seed)
    assert wanted is not None
    if config.init is not None and not dry:
        lm = KalleLM.from_pretrained(config.init).train()
        if wanted.stop_head and not lm.config.stop_head:
            lm.add_stop_head(generator)
            logger.info("the language model of '%s' has no stop head: it gets an untrained one", config.init)
    else:
        lm = KalleLM(wanted)
        if config.init_text is not None and not dry:
            load_text_weights(lm, config.init_text, generator)
    check_vocabulary(lm.vocab_size, tokenizer)
    check_latents(lm, info, config.init)
    if config.init is None and lm.config.normalise_latents:
        lm.set_latent_statistics(torch.tensor(info["mean"]), torch.tensor(info["std"]))
    return lm


def prepare_language_model(config: LMTrainingConfig, lm: KalleLM, tokens: Tensor | None, dry: bool = False) -> Adapters | None:
    """Freeze, adapt, shrink the vocabulary to ``tokens`` and choose how ``lm`` is computed, all in place; returns the adapters if any."""
    adapters = None
    if config.lora is not None:
        adapters = Adapters(config.lora, "" if dry else base_hash(lm.state_dict()))
        add_lora(lm, config.lora, torch.Generator().manual_seed(config.seed))
    freeze(lm, config.freeze)
    if tokens is not None:
        logger.info("training %d of %d text tokens, those of the training texts; the others stay as they are", len(tokens), lm.vocab_size)
        compact_vocabulary(lm, tokens)
    set_attention(lm, config.attention, resolve_device(config.device))
    if config.activation_checkpointing:
        recompute_activations(lm)
    return adapters


def tokens_to_train(wanted: bool | str, lm: KalleLM, data: LMDataModule) -> Tensor | None:
    """The ids (N,) int64 of the training split of ``data`` that alone are to train; None for all."""
    if wanted is False or (wanted == "auto" and lm.vocab_size < _LARGE_VOCABULARY):
        return None
    used = torch.zeros(lm.vocab_size, dtype=torch.bool)
    for ids in data.dataset("train").text_ids:
        used[ids.long()] = True
    tokens = used.nonzero().flatten()
    return None if wanted == "auto" and 2 * len(tokens) > lm.vocab_size else tokens


def check_vocabulary(embedded: int, tokenizer: Tokenizer) -> None:
    """Every token needs one of the ``embedded`` rows."""
    if tokenizer.vocab_size > embedded:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model embeds {embedded}; "
            f"set lm.backbone.vocab_size={tokenizer.vocab_size}"
        )


def check_latents(lm: KalleLM, info: dict[str, Any], init: str | None) -> None:
    """The model must predict as many dimensions as the latents of ``info`` have."""
    got, wanted = info["latent_dim"], lm.config.latent_dim
    if got != wanted:
        where = "lm.latent_dim" if init is None else f"that of init='{init}'"
        remedy = f"set lm.latent_dim={got}" if init is None else "encode with the Flow-VAE it was trained for, or leave init out"
        raise UserError(f"the latents have {got} dimensions but {where} is {wanted}; {remedy}")


def check_encoder(flowvae: FlowVAE, folder: str, info: dict[str, Any], latents: str | Path) -> None:
    """The Flow-VAE in ``folder`` must be the one that made ``latents``: the result is told to speak through it."""
    ours, theirs = weights_hash(flowvae.encoder), info["encoder_hash"]
    if ours != theirs:
        raise UserError(
            f"the latents in '{latents}' come from another Flow-VAE: their encoder is {theirs[:12]}, that of flowvae='{folder}' is "
            f"{ours[:12]}; give the Flow-VAE they were encoded with, or encode the corpus again with this one"
        )


def check_speaker(lm: KalleLM, speaker: Any) -> None:
    """A speaker encoder and the data it reads (``speaker``, data.speaker) come together or not at all."""
    if (lm.config.speaker is None) != (speaker is None):
        got = "a speaker encoder but data.speaker=null" if speaker is None else "data.speaker but no speaker encoder"
        remedy = "add data=lm_speaker" if speaker is None else "choose lm=nano_speaker or data=lm"
        raise UserError(f"speaker: got {got}, expected both or neither; {remedy}")
    if speaker is not None and speaker.latent_dim not in (None, lm.hidden_size):
        raise UserError(
            f"data.speaker.latent_dim is {speaker.latent_dim} but the model is {lm.hidden_size} wide; "
            f"set data.speaker.latent_dim={lm.hidden_size}"
        )


def export_language_model(lm: KalleLM, adapters: Adapters | None, weights: Path, steps: int) -> None:
    """Write ``weights``/lm, with adapters merged into it, and the adapters alone to ``weights``/adapter. Changes ``lm``."""
    expand_vocabulary(lm)
    if adapters is not None:
        _export_adapters(lm, adapters, weights / ADAPTER_FOLDER, steps)
    finish_training(lm)
    lm.save_pretrained(weights)


def _export_adapters(lm: KalleLM, adapters: Adapters, folder: Path, steps: int) -> None:
    config = adapters.config
    factors, whole = lora_factors(lm), also_trained(lm, config)
    if any(name.startswith(SPEAKER_PARTS) for name in [*factors, *whole]):
        logger.warning("no %s/: these adapters change the speaker encoder, which voices depend on; use the merged lm/", folder)
        return
    notes = {"steps_made": steps, "lora": config.to_dict()}
    folder.mkdir(parents=True, exist_ok=True)
    Adapter.of_factors(adapters.base_hash, factors, config.scale, notes, whole).save(folder / ADAPTER_FILE)


def copy_flowvae(source: str | Path, weights: Path) -> None:
    """Copy the Flow-VAE of ``source`` into the folder ``weights``, over an older one that a loaded model may have mapped."""
    part, target = part_folder(source, "flowvae"), weights / "flowvae"
    if part.resolve() != target.resolve():
        shutil.copytree(part, target, copy_function=_copy_whole, dirs_exist_ok=True)
        # One file and shards beside each other would be two models; what an earlier run copied goes.
        for stale in target.glob("model*.safetensors*"):
            if not (part / stale.name).exists():
                stale.unlink()


def _copy_whole(source: str, target: str) -> None:
    with atomic_file(Path(target)) as temporary:
        shutil.copy2(source, temporary)
