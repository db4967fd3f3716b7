"""`train_flowvae`: from a corpus folder to Flow-VAE weights, called from a notebook, a test or `kalle train flowvae`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch._subclasses.fake_tensor import FakeTensorMode

from kalle.checkpoint import CONFIG_NAME, part_folder, read_json, resolve_device
from kalle.data.loading.datamodules import FlowVAEDataModule
from kalle.errors import UserError
from kalle.models.discriminators import Discriminators
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.training.callbacks import PairMetric, ReconstructionMedia, ReconstructionMetrics
from kalle.training.checkpoint_files import resume_path
from kalle.training.config import FlowVAETrainingConfig
from kalle.training.distributed import AdversarialDDP, process_count
from kalle.training.flowvae import FlowVAETraining
from kalle.training.optimisation import freeze, parameter_counts
from kalle.training.plan import Plan, flowvae_footprint, make_plan, without_storage
from kalle.training.run import CHECKPOINTS_FOLDER, SPLITS, TrainingResult, begin, check_finite, check_optimisation, describe, fit

logger = logging.getLogger(__name__)


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
    built = _build(config)
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
        check_finite(flowvae)
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
    built = _build(config, storageless)
    module, data = built.module, built.data
    with storageless:
        footprint = flowvae_footprint(module.flowvae, module.discriminators, data.batch_size, data.segment_samples)
    trained, every = _counts(module)
    return make_plan(config, (every, trained), data, resume_path(config.resume, Path(config.out) / CHECKPOINTS_FOLDER), footprint)


@dataclass(frozen=True)
class _Built:
    config: FlowVAETrainingConfig
    data: FlowVAEDataModule
    module: FlowVAETraining


def _build(config: FlowVAETrainingConfig, storageless: FakeTensorMode | None = None) -> _Built:
    """Data and module, checked against each other; with ``storageless`` the networks have shapes alone, and no weights are read."""
    check_optimisation(config)
    described = _flowvae_config(config)
    config = replace(config, flowvae=described)
    data = config.data.module(described, config.seed)
    for split in SPLITS:
        data.reader(split)
    with storageless or nullcontext():
        fresh = config.init is None or storageless is not None
        flowvae = FlowVAE(described) if fresh else FlowVAE.from_pretrained(str(config.init)).train()
        freeze(flowvae, config.freeze)
        discriminators = None if config.discriminators is None else Discriminators(config.discriminators)
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
    return _Built(config, data, module)


def _flowvae_config(config: FlowVAETrainingConfig) -> FlowVAEConfig:
    if config.init is None:
        return config.flowvae
    path = part_folder(config.init, "flowvae") / CONFIG_NAME
    return FlowVAEConfig.from_dict(read_json(path), str(path))


def _counts(module: FlowVAETraining) -> tuple[int, int]:
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
