"""What both trainings share: threads and seeds, callbacks, the trainer, and what a run leaves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.cli.run_record import write_record
from kalle.cli.train_plan import make_plan

if TYPE_CHECKING:
    import lightning
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

SPLITS = ("train", "valid")
"""What a run reads: opened before anything is built or written."""
WEIGHTS_FOLDER = "weights"


@dataclass(frozen=True)
class TrainingRun:
    """What a finished run leaves for its caller."""

    module: lightning.LightningModule
    trainer: lightning.Trainer
    weights: Path
    metrics: dict[str, float]


def prepare_run(config: DictConfig) -> None:
    """Threads, seeds and what the libraries say."""
    import warnings

    import lightning
    import torch

    from kalle.cli.launch import start_ranks

    start_ranks(config)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # Its own handler would repeat every line of ours, and what it says about devices and steps we say ourselves.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    lightning.seed_everything(config.seed, workers=True, verbose=False)


def build_callbacks(config: DictConfig) -> list[Any]:
    """The callbacks that ``config`` names."""
    from hydra.utils import instantiate

    wanted = [node for node in config.callbacks.values() if node is not None]
    if not config.logger:
        wanted = [node for node in wanted if not node["_target_"].endswith("LearningRateMonitor")]
    return [instantiate(node, _convert_="all") for node in wanted]


def fit(config: DictConfig, module: lightning.LightningModule, data: Any, callbacks: list[Any]) -> TrainingRun:
    """Train ``module`` on ``data``, from the checkpoint that ``config.resume`` means."""
    from hydra.utils import instantiate

    from kalle.checkpoint import resolve_device
    from kalle.cli.launch import placement
    from kalle.training.checkpointing import check_checkpoint, resume_path
    from kalle.training.seeding import StepSeeds

    out = Path(config.out)
    device = resolve_device(config.device)
    precision = config.precision
    if precision == "auto":
        precision = "bf16-mixed" if device.type == "cuda" else "32-true"
    checkpoint = resume_path(config.resume, out / "checkpoints")
    if checkpoint is not None:
        check_checkpoint(checkpoint, module)
    trainer = instantiate(
        config.trainer,
        accelerator="gpu" if device.type == "cuda" else "cpu",
        **placement(config, device.index, getattr(module, "leaves_parameters_unused", False)),
        precision=precision,
        logger=build_loggers(config, checkpoint) or False,
        callbacks=[StepSeeds(config.seed), *callbacks],
        default_root_dir=str(out),
        _convert_="all",
    )
    parameters = sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)
    end = f"step {trainer.max_steps}" if trainer.max_steps > 0 else f"the end of epoch {trainer.max_epochs}"
    logger.info(
        "training %.1f M parameters on %s (%s) to %s, %s; results in '%s'",
        parameters / 1e6, device, precision, end, f"continuing from '{checkpoint}'" if checkpoint else "from the start", out,
    )  # fmt: skip
    if trainer.is_global_zero:
        trained = parameters
        every = sum(parameter.numel() for parameter in module.parameters())
        plan = make_plan(config, "lm" if "lm" in config else "flowvae", (every, trained), data, checkpoint)
        logger.info("%s", "\n".join(plan.lines()[:-1]))
        _save_config(config, out / "config.yaml")
        write_record(out, config, trainer, checkpoint)
    _run(trainer, module, data, checkpoint)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return TrainingRun(module, trainer, out / WEIGHTS_FOLDER, metrics)


def build_loggers(config: DictConfig, checkpoint: Path | None) -> list[Any]:
    """The loggers that ``config`` names, told where the run continues so that no step appears twice."""
    from hydra.utils import instantiate

    from kalle.training.checkpointing import saved_log_step
    from kalle.training.log_tail import LogTail

    # A run killed before its first checkpoint continues too, from nothing.
    anew = 0 if config.resume == "auto" else None
    step = anew if checkpoint is None else saved_log_step(checkpoint)
    keys = {"TensorBoardLogger": "purge_step", "MetricsCSV": "resume_step"}
    loggers: list[Any] = []
    for node in config.logger or []:
        key = keys.get(node["_target_"].rpartition(".")[2])
        loggers.append(instantiate(node, **({} if key is None or step is None else {key: step})))
    return [*loggers, LogTail()] if loggers else []


def _run(trainer: lightning.Trainer, module: lightning.LightningModule, data: Any, checkpoint: Path | None) -> None:
    from kalle.cli.launch import lost_peer
    from kalle.errors import UserError
    from kalle.training.stopping import Preempted

    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except Preempted as preempted:
        logger.info("%s; saved, run the same command again to continue", preempted)
        raise SystemExit(preempted.exit_code) from None
    except (RuntimeError, SystemExit) as error:
        # Lightning answers Ctrl-C with exit code 1, and data workers that got it too die under the trainer.
        asked = any(getattr(callback, "stop_asked", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if not isinstance(error.__context__, KeyboardInterrupt) and not (trainer.interrupted and asked):
            if lost_peer(error):
                raise UserError("another rank has ended: expected all to go on; see its message, then run the same command again") from None
            raise
        raise KeyboardInterrupt from None


def _save_config(config: DictConfig, path: Path) -> None:
    """The configuration with every reference resolved, as a record of the run."""
    from omegaconf import OmegaConf

    from kalle.files import write_atomic

    write_atomic(path, OmegaConf.to_yaml(config, resolve=True))


def describe(weights: Path, sample_rate: int | None) -> None:
    """Write the weight folder's own config.json."""
    from kalle.checkpoint import CONFIG_NAME, FORMAT_VERSION, write_json

    parts = [part for part in ("flowvae", "lm", "tokenizer") if (weights / part).is_dir()]
    values = {"format_version": FORMAT_VERSION, "parts": parts}
    write_json(weights / CONFIG_NAME, values if sample_rate is None else {**values, "sample_rate": sample_rate})
