"""`kalle train flowvae|lm`: compose a run from the configuration, train, and leave a weight folder."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    import lightning
    from omegaconf import DictConfig

    from kalle.models.flowvae import FlowVAE
    from kalle.models.lm import KalleLM
    from kalle.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

STAGES = ("flowvae", "lm")
WEIGHTS_FOLDER = "weights"


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

    _prepare(config)
    data = instantiate(config.data, _convert_="all")
    flowvae = FlowVAE(instantiate(config.flowvae, _convert_="all"))
    _check_frames(config, flowvae)
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
    result = _fit(config, module, data)
    flowvae.save_pretrained(result.weights)
    _describe(result.weights, flowvae.config.sample_rate)
    return result


def train_lm(config: DictConfig) -> TrainingRun:
    """Train a language model as ``configs/train_lm.yaml`` says; ``out``/weights then speaks when ``flowvae`` was given."""
    from hydra.utils import instantiate

    from kalle.data.shards import read_info
    from kalle.training.lm import KalleLMTraining
    from kalle.training.media import SpeechMedia

    _prepare(config)
    data = instantiate(config.data, _convert_="all")
    lm = _language_model(config, data.latents)
    _check_vocabulary(lm, data.tokenizer)
    module = KalleLMTraining(
        lm,
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler),
        objective=instantiate(config.objective),
        seed=config.seed,
    )
    callbacks = _callbacks(config)
    for callback in callbacks:
        if isinstance(callback, SpeechMedia) and config.flowvae.folder is not None:
            _bind_sampler(callback, config, data.tokenizer)
    result = _fit(config, module, data, callbacks)
    lm.save_pretrained(result.weights)
    data.tokenizer.save(result.weights / "tokenizer")
    if config.flowvae.folder is not None:
        _copy_flowvae(config.flowvae.folder, result.weights)
    _describe(result.weights, read_info(data.latents)["sample_rate_hz"])
    return result


def _language_model(config: DictConfig, latents: Path) -> KalleLM:
    from hydra.utils import instantiate

    from kalle.data.shards import read_info
    from kalle.models.lm import KalleLM

    if config.init is not None:
        return KalleLM.from_pretrained(config.init).train()
    lm = KalleLM(instantiate(config.lm, _convert_="all"))
    info = read_info(latents)
    if info["latent_dim"] != lm.config.latent_dim:
        raise UserError(
            f"the latents have {info['latent_dim']} dimensions but lm.latent_dim is {lm.config.latent_dim}; "
            f"set lm.latent_dim={info['latent_dim']}"
        )
    if lm.config.normalise_latents:
        import torch

        lm.set_latent_statistics(torch.tensor(info["mean"]), torch.tensor(info["std"]))
    return lm


def _check_frames(config: DictConfig, flowvae: FlowVAE) -> None:
    for ours, theirs, unit in (("hop_length", "hop_length", "samples a frame"), ("sample_rate_hz", "sample_rate", "samples a second")):
        wanted = getattr(flowvae.config, theirs)
        if config.data[ours] != wanted:
            raise UserError(f"data.{ours} is {config.data[ours]} but the Flow-VAE has {wanted} {unit}; set data.{ours}={wanted}")


def _check_vocabulary(lm: KalleLM, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > lm.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens but the model embeds {lm.vocab_size}; "
            f"set lm.backbone.vocab_size={tokenizer.vocab_size}"
        )


def _prepare(config: DictConfig) -> None:
    """Check that nothing required is missing, then seed everything."""
    import warnings

    import lightning
    import torch
    from omegaconf import OmegaConf

    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}: expected a folder; add {missing[0]}=DIR to the command")
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


def _fit(config: DictConfig, module: lightning.LightningModule, data: Any, callbacks: list[Any] | None = None) -> TrainingRun:
    from hydra.utils import instantiate

    from kalle.checkpoint import resolve_device
    from kalle.training.checkpointing import resume_path

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
        callbacks=_callbacks(config) if callbacks is None else callbacks,
        default_root_dir=str(out),
        _convert_="all",
    )
    checkpoint = resume_path(config.resume, out / "checkpoints")
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    logger.info(
        "training %.1f M parameters on %s (%s) to step %d, %s; results in '%s'",
        parameters / 1e6, device, precision, trainer.max_steps, f"continuing from '{checkpoint}'" if checkpoint else "from the start", out,
    )  # fmt: skip
    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except (RuntimeError, SystemExit):
        # Lightning answers Ctrl-C with exit code 1, and data workers that got it too die under the trainer.
        if not trainer.interrupted or not any(getattr(callback, "stop_asked", False) for callback in trainer.callbacks):
            raise
        raise KeyboardInterrupt from None
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return TrainingRun(module, trainer, out / WEIGHTS_FOLDER, metrics)


def _bind_sampler(callback: Any, config: DictConfig, tokenizer: Tokenizer) -> None:
    from kalle.models.flowvae import FlowVAE
    from kalle.training.sampling import speech_sampler

    flowvae = FlowVAE.from_pretrained(config.flowvae.folder)
    callback.bind(speech_sampler(flowvae, tokenizer, seed=config.seed), flowvae.config.sample_rate)


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
        shutil.copytree(part, weights / "flowvae", dirs_exist_ok=True)
