"""`kalle train flowvae|lm`: compose a run from the configuration, train, and leave a weight folder."""

from __future__ import annotations

import logging
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.cli.train_checks import (
    check_encoder,
    check_frames,
    check_latents,
    check_manual_optimisation,
    check_run,
    check_speaker,
    check_vocabulary,
)
from kalle.disk import whole_file
from kalle.errors import UserError

if TYPE_CHECKING:
    import lightning
    from omegaconf import DictConfig

    from kalle.models.flowvae import FlowVAE
    from kalle.models.lm import KalleLM
    from kalle.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STAGES = ("flowvae", "lm")
SPLITS = ("train", "valid")
"""What a run reads: opened before anything is built or written."""
WEIGHTS_FOLDER = "weights"
USAGE = """usage: kalle train flowvae data.corpus=DIR out=DIR [KEY=VALUE ...]
       kalle train lm data.latents=DIR out=DIR [flowvae=DIR] [KEY=VALUE ...]

`kalle train flowvae --help` and `kalle train lm --help` list every key; --cfg job prints the configuration of a run.
"""


@dataclass(frozen=True)
class TrainingRun:
    """What a finished run leaves for its caller."""

    module: lightning.LightningModule
    trainer: lightning.Trainer
    weights: Path
    metrics: dict[str, float]


def run(overrides: list[str]) -> int:
    """The first word names the stage; the rest are Hydra overrides. Returns the exit status."""
    from kalle.cli.hydra_entry import folder_override, run_hydra

    if overrides and overrides[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if not overrides or overrides[0] not in STAGES:
        got = repr(overrides[0]) if overrides else "nothing"
        raise UserError(
            f"kalle train: got {got}, expected one of {', '.join(STAGES)} and then Hydra overrides such as trainer.max_steps=1000"
        )
    if overrides[0] == "flowvae":
        return run_hydra(train_flowvae, "train_flowvae", overrides[1:])
    return run_hydra(train_lm, "train_lm", folder_override(overrides[1:], "flowvae"))


def train_flowvae(config: DictConfig) -> TrainingRun:
    """Train a Flow-VAE as ``configs/train_flowvae.yaml`` says; its weights end in ``out``/weights/flowvae."""
    from hydra.utils import instantiate

    from kalle.models.discriminators import Discriminators
    from kalle.models.flowvae import FlowVAE
    from kalle.training.flowvae import FlowVAETraining

    check_run(config)
    check_manual_optimisation(config)
    _prepare(config)
    data = instantiate(config.data, _convert_="all")
    for split in SPLITS:
        data.reader(split)
    flowvae = FlowVAE(instantiate(config.flowvae, _convert_="all"))
    check_frames(config, flowvae)
    judges = None if config.discriminators is None else Discriminators(instantiate(config.discriminators, _convert_="all"))
    module = FlowVAETraining(
        flowvae,
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler),
        objective=instantiate(config.objective),
        clip=instantiate(config.clip),
        discriminators=judges,
        mel_loss=None if config.mel_loss is None else instantiate(config.mel_loss, _convert_="all"),
        seed=config.seed,
    )
    result = _fit(config, module, data, _callbacks(config))
    flowvae.save_pretrained(result.weights)
    _describe(result.weights, flowvae.config.sample_rate)
    return result


def train_lm(config: DictConfig) -> TrainingRun:
    """Train a language model as ``configs/train_lm.yaml`` says; ``out``/weights then speaks when ``flowvae`` was given."""
    from hydra.utils import instantiate

    from kalle.data.shards import read_info
    from kalle.models.flowvae import FlowVAE
    from kalle.training.lm import KalleLMTraining

    check_run(config)
    _prepare(config)
    data = instantiate(config.data, _convert_="all")
    for split in SPLITS:
        data.dataset(split)
    info = read_info(data.latents)
    lm = _language_model(config, info, data.tokenizer)
    check_speaker(lm, data.speaker)
    module = KalleLMTraining(
        lm,
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler),
        objective=instantiate(config.objective),
        seed=config.seed,
    )
    callbacks = _callbacks(config)
    if config.flowvae.folder is not None:
        flowvae = FlowVAE.from_pretrained(config.flowvae.folder)
        check_encoder(flowvae, config.flowvae.folder, info, data.latents)
        _bind_sampler(callbacks, flowvae, data.tokenizer, config.seed)
    result = _fit(config, module, data, callbacks)
    lm.save_pretrained(result.weights)
    data.tokenizer.save(result.weights / "tokenizer")
    if config.flowvae.folder is not None:
        _copy_flowvae(config.flowvae.folder, result.weights)
    _describe(result.weights, info["sample_rate_hz"])
    return result


def _language_model(config: DictConfig, info: dict[str, Any], tokenizer: Tokenizer) -> KalleLM:
    """The model that ``config`` describes or starts from, checked against the latents of ``info``."""
    import torch
    from hydra.utils import instantiate

    from kalle.models.lm import KalleLM

    if config.init is not None:
        lm = KalleLM.from_pretrained(config.init).train()
    else:
        # Before the model is built, because transformers has something to say about token ids beyond the vocabulary.
        check_vocabulary(config.lm.backbone.get("vocab_size", tokenizer.vocab_size), tokenizer)
        lm = KalleLM(instantiate(config.lm, _convert_="all"))
    check_vocabulary(lm.vocab_size, tokenizer)
    check_latents(lm, info, config.init)
    if config.init is None and lm.config.normalise_latents:
        lm.set_latent_statistics(torch.tensor(info["mean"]), torch.tensor(info["std"]))
    return lm


def _prepare(config: DictConfig) -> None:
    """Threads, seeds and what the libraries say."""
    import warnings

    import lightning
    import torch

    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Its own handler would repeat every line of ours, and what it says about devices and steps we say ourselves.
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    lightning.seed_everything(config.seed, workers=True, verbose=False)


def _callbacks(config: DictConfig) -> list[Any]:
    from hydra.utils import instantiate

    wanted = [node for node in config.callbacks.values() if node is not None]
    if not config.logger:
        wanted = [node for node in wanted if not node["_target_"].endswith("LearningRateMonitor")]
    return [instantiate(node, _convert_="all") for node in wanted]


def _fit(config: DictConfig, module: lightning.LightningModule, data: Any, callbacks: list[Any]) -> TrainingRun:
    from hydra.utils import instantiate

    from kalle.checkpoint import resolve_device
    from kalle.training.checkpointing import check_checkpoint, resume_path

    out = Path(config.out)
    device = resolve_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    trainer = instantiate(
        config.trainer,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=[device.index] if device.index is not None else config.trainer.devices,
        precision=precision,
        logger=[instantiate(node) for node in config.logger] if config.logger else False,
        callbacks=callbacks,
        default_root_dir=str(out),
        _convert_="all",
    )
    checkpoint = resume_path(config.resume, out / "checkpoints")
    if checkpoint is not None:
        check_checkpoint(checkpoint, module)
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    end = f"step {trainer.max_steps}" if trainer.max_steps > 0 else f"the end of epoch {trainer.max_epochs}"
    logger.info(
        "training %.1f M parameters on %s (%s) to %s, %s; results in '%s'",
        parameters / 1e6, device, precision, end, f"continuing from '{checkpoint}'" if checkpoint else "from the start", out,
    )  # fmt: skip
    if trainer.is_global_zero:
        _save_config(config, out / "config.yaml")
    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except (RuntimeError, SystemExit) as error:
        # Lightning answers Ctrl-C with exit code 1, and data workers that got it too die under the trainer.
        asked = any(getattr(callback, "stop_asked", False) for callback in trainer.callbacks)
        if not isinstance(error.__context__, KeyboardInterrupt) and not (trainer.interrupted and asked):
            raise
        raise KeyboardInterrupt from None
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return TrainingRun(module, trainer, out / WEIGHTS_FOLDER, metrics)


def _save_config(config: DictConfig, path: Path) -> None:
    """The configuration with every reference resolved, as a record of the run."""
    from omegaconf import OmegaConf

    from kalle.disk import write_whole

    write_whole(path, OmegaConf.to_yaml(config, resolve=True))


def _bind_sampler(callbacks: list[Any], flowvae: FlowVAE, tokenizer: Tokenizer, seed: int) -> None:
    from kalle.training.media import SpeechMedia
    from kalle.training.sampling import speech_sampler

    for callback in callbacks:
        if isinstance(callback, SpeechMedia):
            callback.bind(speech_sampler(flowvae, tokenizer, seed=seed), flowvae.config.sample_rate)


def _describe(weights: Path, sample_rate: int | None) -> None:
    """Write the weight folder's own config.json."""
    from kalle.checkpoint import CONFIG_NAME, FORMAT_VERSION, write_json

    parts = [part for part in ("flowvae", "lm", "tokenizer") if (weights / part).is_dir()]
    values = {"format_version": FORMAT_VERSION, "parts": parts}
    write_json(weights / CONFIG_NAME, values if sample_rate is None else {**values, "sample_rate": sample_rate})


def _copy_flowvae(source: str, weights: Path) -> None:
    from kalle.checkpoint import part_folder

    part = part_folder(source, "flowvae")
    if part.resolve() != (weights / "flowvae").resolve():
        shutil.copytree(part, weights / "flowvae", copy_function=_copy_whole, dirs_exist_ok=True)


def _copy_whole(source: str, target: str) -> None:
    """Replace ``target`` by a rename: a loaded model may have the old file mapped."""
    with whole_file(Path(target)) as temporary:
        shutil.copy2(source, temporary)
