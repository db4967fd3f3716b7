"""`kalle train lm`: from a latent folder to language-model weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.cli.train_checks import check_encoder, check_run, check_speaker
from kalle.cli.train_lm_model import export_language_model, packing_of, prepare_language_model, start_language_model, take_model_of_init
from kalle.cli.train_run import SPLITS, TrainingRun, build_callbacks, describe, fit, prepare_run
from kalle.files import atomic_file

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.models.flowvae import FlowVAE
    from kalle.text.tokenizer import Tokenizer


def train_lm(config: DictConfig) -> TrainingRun:
    """Train a language model as ``configs/train_lm.yaml`` says; ``out``/weights then speaks when ``flowvae`` was given."""
    from hydra.utils import instantiate

    from kalle.models.flowvae import FlowVAE
    from kalle.training.lm import KalleLMTraining
    from kalle.training.sharding import ShardedLMTraining, check_sharding, whole_model

    check_run(config)
    prepare_run(config)
    take_model_of_init(config)
    data = instantiate(config.data, _convert_="all")
    for split in SPLITS:
        data.dataset(split)
    info = data.info()
    lm = start_language_model(config, info, data.tokenizer)
    check_speaker(lm, data.speaker)
    adapters = prepare_language_model(config, lm, data)
    sharded = "Sharded" in str(config.trainer.strategy)
    if sharded:
        check_sharding(lm, averages_weights=config.callbacks.get("ema") is not None)
    module = (ShardedLMTraining if sharded else KalleLMTraining)(
        lm,
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler),
        objective=instantiate(config.objective),
        seed=config.seed,
        packing=packing_of(config),
        decay_all=config.decay_all,
    )
    callbacks = build_callbacks(config)
    if config.flowvae.folder is not None:
        flowvae = FlowVAE.from_pretrained(config.flowvae.folder)
        check_encoder(flowvae, config.flowvae.folder, info, data.latents)
        _bind_sampler(callbacks, flowvae, data.tokenizer, config.seed)
    result = fit(config, module, data, callbacks)
    lm = whole_model(lm)
    if not result.trainer.is_global_zero:
        return result
    export_language_model(lm, adapters, result.weights, result.trainer.global_step)
    data.tokenizer.save(result.weights / "tokenizer")
    if config.flowvae.folder is not None:
        _copy_flowvae(config.flowvae.folder, result.weights)
    describe(result.weights, info["sample_rate_hz"])
    return result


def _bind_sampler(callbacks: list[Any], flowvae: FlowVAE, tokenizer: Tokenizer, seed: int) -> None:
    from kalle.training.media import SpeechMedia
    from kalle.training.sampling import speech_sampler

    for callback in callbacks:
        if isinstance(callback, SpeechMedia):
            callback.bind(speech_sampler(flowvae, tokenizer, seed=seed), flowvae.config.sample_rate)


def _copy_flowvae(source: str, weights: Path) -> None:
    from kalle.checkpoint import part_folder

    part, target = part_folder(source, "flowvae"), weights / "flowvae"
    if part.resolve() != target.resolve():
        shutil.copytree(part, target, copy_function=_copy_whole, dirs_exist_ok=True)
        # One file and shards beside each other would be two models; what an earlier run copied goes.
        for stale in target.glob("model*.safetensors*"):
            if not (part / stale.name).exists():
                stale.unlink()


def _copy_whole(source: str, target: str) -> None:
    """Replace ``target`` by a rename: a loaded model may have the old file mapped."""
    with atomic_file(Path(target)) as temporary:
        shutil.copy2(source, temporary)
