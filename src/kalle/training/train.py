"""`train_flowvae` and `train_lm`: from a corpus or latents to weights, called from a notebook, a test or `kalle train`."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from kalle.checkpoint import CONFIG_NAME, part_folder, read_json, resolve_device, weights_hash
from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule
from kalle.errors import UserError
from kalle.files import atomic_file
from kalle.models.discriminators import Discriminators
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.flowvae.bigvgan import set_way
from kalle.models.lm import PART, KalleLM, KalleLMConfig, compile_layers, recompute_activations, set_attention
from kalle.models.lora import LoRAConfig, add_lora, also_trained, lora_factors
from kalle.models.text_weights import compact_vocabulary, expand_vocabulary, load_text_weights, with_text_backbone
from kalle.synthesis.adapter import ADAPTER_FILE, SPEAKER_PARTS, Adapter, base_hash
from kalle.text.tokenizer import Tokenizer
from kalle.training.callbacks import PairMetric, ReconstructionMedia, ReconstructionMetrics, SpeechMedia, speech_sampler
from kalle.training.checkpointing import resume_path
from kalle.training.config import FlowVAETrainingConfig, LMTrainingConfig, TokenizerConfig
from kalle.training.distributed import (
    FSDP,
    AdversarialDDP,
    check_sharding,
    process_count,
    started_ranks,
    whole_model,
)
from kalle.training.flowvae import FlowVAETraining
from kalle.training.lm import KalleLMTraining, ShardedLMTraining
from kalle.training.optimisation import (
    finish_training,
    freeze,
    parameter_counts,
)
from kalle.training.plan import Plan, flowvae_footprint, largest_rows, lm_footprint, make_plan, without_storage
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
ADAPTER_FOLDER = "adapter"
_LARGE_VOCABULARY = 4096
"""Tokens from which ``compact_vocabulary=auto`` looks whether a corpus leaves most of them unused."""


def train_flowvae(
    config: FlowVAETrainingConfig,
    *,
    callbacks: Sequence[Callback] = (),
    loggers: Sequence[Logger] | None = None,
    metrics: Mapping[str, PairMetric] | None = None,
) -> TrainingResult:
    """Train a Flow-VAE as ``config`` says; its weights are written to ``config.out``/weights/flowvae.

    ``callbacks`` join those of ``config``; ``loggers`` take the place of those of ``config``. ``metrics`` compare reconstructions with
    recordings at every validation, over the utterances that ``config.callbacks.metrics`` counts. UserError for what cannot be trained.
    """
    _check_strategy(config)
    begin(config)
    built = _build_flowvae(config)
    if config.compile:
        built.module.compile_networks()
    flowvae, shown = built.module.flowvae, config.callbacks
    more: list[Callback] = list(callbacks)
    if shown.media is not None:
        more.append(ReconstructionMedia(shown.media.utterances))
    if shown.metrics is not None and metrics:
        more.append(ReconstructionMetrics(metrics, shown.metrics.utterances))
    result = fit(built.config, built.module, built.data, more, loggers, _strategy(config))
    if result.trainer.is_global_zero:
        check_weights_finite(flowvae)
        flowvae.save_pretrained(result.weights)
        describe(result.weights, flowvae.config.sample_rate)
    return result


def plan_flowvae(config: FlowVAETrainingConfig) -> Plan:
    """The plan of `train_flowvae` in numbers; UserError for what cannot be trained, but for damage of the weights to start from.

    Writes nothing.
    """
    _check_strategy(config)
    config = replace(config, data=replace(config.data, cache=False, num_workers=0))
    storageless = without_storage()
    built = _build_flowvae(config, storageless)
    module, data = built.module, built.data
    with storageless:
        footprint = flowvae_footprint(module.flowvae, module.discriminators, data.batch_size, data.segment_samples)
    trained, every = _flowvae_counts(module)
    return make_plan(config, (every, trained), data, resume_path(config.resume, Path(config.out) / CHECKPOINTS_FOLDER), footprint)


@dataclass(frozen=True)
class _FlowVAERun:
    config: FlowVAETrainingConfig
    data: FlowVAEDataModule
    module: FlowVAETraining


def _build_flowvae(config: FlowVAETrainingConfig, storageless: FakeTensorMode | None = None) -> _FlowVAERun:
    """Data and module, checked against each other; with ``storageless`` the networks have shapes alone, and no weights are read."""
    check_optimisation(config)
    described = _flowvae_config(config)
    config = replace(config, flowvae=described)
    data = config.data.module(described, config.seed)
    config.objective.check_fits(described, data.segment_samples // described.hop_length)
    for split in INPUT_SPLITS:
        data.reader(split)
    with storageless or nullcontext():
        fresh = config.init is None or storageless is not None
        flowvae = FlowVAE(described) if fresh else FlowVAE.from_pretrained(str(config.init)).train()
        freeze(flowvae, config.freeze)
        discriminators = None if config.discriminators is None else Discriminators(config.discriminators)
    set_way(flowvae, config.fused_activation, resolve_device(config.device))
    module = FlowVAETraining(
        flowvae,
        optimizer=config.optimizer,
        scheduler=config.schedule,
        objective=config.objective,
        clip=config.clip,
        discriminators=discriminators,
        mel_loss=config.mel_loss,
        seed=config.seed,
    )
    trainable, total = parameter_counts(flowvae)
    if trainable < total:
        logger.info("the Flow-VAE has %.2f M parameters, %.2f M of them train", total / 1e6, trainable / 1e6)
    return _FlowVAERun(config, data, module)


def _flowvae_config(config: FlowVAETrainingConfig) -> FlowVAEConfig:
    if config.init is None:
        return config.flowvae
    path = part_folder(config.init, "flowvae") / CONFIG_NAME
    return FlowVAEConfig.from_dict(read_json(path), str(path))


def _flowvae_counts(module: FlowVAETraining) -> tuple[int, int]:
    counts = [parameter_counts(network) for network in module.networks()]
    return sum(trained for trained, _ in counts), sum(every for _, every in counts)


def _check_strategy(config: FlowVAETrainingConfig) -> None:
    strategy = config.trainer.strategy
    if strategy not in ("auto", "ddp"):
        raise UserError(
            f"trainer.strategy: got {strategy}, expected auto: the Flow-VAE averages the gradients of generator and discriminators apart; "
            "leave it out"
        )


def _strategy(config: FlowVAETrainingConfig) -> str | Strategy:
    """Several processes share the gradients of both networks: ``trainer.strategy`` auto and ddp mean that."""
    device = resolve_device(config.device)
    several = process_count(config.trainer.devices, config.trainer.num_nodes, device) > 1
    return AdversarialDDP() if several or config.trainer.strategy == "ddp" else "auto"


def train_lm(config: LMTrainingConfig, *, callbacks: Sequence[Callback] = (), loggers: Sequence[Logger] | None = None) -> TrainingResult:
    """Train a language model as ``config`` says and write its weights to ``config.out``/weights, which can speak when a Flow-VAE is given.

    ``callbacks`` join those of ``config``; ``loggers`` take the place of those of ``config``. UserError for what cannot be trained.
    """
    begin(config)
    built = _build_lm(config)
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
    built = _build_lm(replace(config, data=replace(config.data, cache=False, num_workers=0)), storageless)
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
class _LMRun:
    config: LMTrainingConfig
    data: LMDataModule
    info: dict[str, Any]
    module: KalleLMTraining
    adapters: Adapters | None


def _build_lm(config: LMTrainingConfig, storageless: FakeTensorMode | None = None) -> _LMRun:
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
    return _LMRun(config, data, info, module, adapters)


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
