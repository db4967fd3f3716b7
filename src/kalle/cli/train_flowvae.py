"""`kalle train flowvae`: from a corpus folder to Flow-VAE weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from kalle.cli.train_checks import check_frames, check_manual_optimisation, check_run
from kalle.cli.train_players import bind_reconstruction_metrics, choose_strategy
from kalle.cli.train_run import SPLITS, TrainingRun, build_callbacks, describe, fit, prepare_run

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.models.flowvae import FlowVAE

logger = logging.getLogger(__name__)


def train_flowvae(config: DictConfig) -> TrainingRun:
    """Train a Flow-VAE as ``configs/train_flowvae.yaml`` says; its weights end in ``out``/weights/flowvae."""
    from hydra.utils import instantiate

    from kalle.models.discriminators import Discriminators
    from kalle.training.flowvae import FlowVAETraining

    check_run(config)
    check_manual_optimisation(config)
    choose_strategy(config)
    prepare_run(config)
    data = instantiate(config.data, _convert_="all")
    for split in SPLITS:
        data.reader(split)
    flowvae = start_flowvae(config)
    check_frames(config, flowvae)
    judges = None if config.discriminators is None else Discriminators(instantiate(config.discriminators, _convert_="all"))
    module = FlowVAETraining(
        flowvae,
        optimizer=instantiate(config.optimizer),
        scheduler=instantiate(config.scheduler),
        objective=instantiate(config.objective),
        clip=instantiate(config.clip),
        discriminators=judges,
        mel_loss=instantiate(config.mel_loss, _convert_="all"),
        seed=config.seed,
    )
    if config.compile:
        module.compile_players()
    callbacks = build_callbacks(config)
    bind_reconstruction_metrics(callbacks, flowvae.config.sample_rate)
    result = fit(config, module, data, callbacks)
    if result.trainer.is_global_zero:
        flowvae.save_pretrained(result.weights)
        describe(result.weights, flowvae.config.sample_rate)
    return result


def start_flowvae(config: DictConfig) -> FlowVAE:
    """The Flow-VAE that ``config`` describes or starts from, with what ``freeze`` names taken out of training."""
    from hydra.utils import instantiate

    from kalle.models.flowvae import FlowVAE
    from kalle.training.trainable import freeze, parameter_counts

    flowvae = FlowVAE(instantiate(config.flowvae, _convert_="all")) if config.init is None else FlowVAE.from_pretrained(config.init).train()
    freeze(flowvae, list(config.freeze))
    trainable, total = parameter_counts(flowvae)
    if trainable < total:
        logger.info("the Flow-VAE has %.2f M parameters, %.2f M of them train", total / 1e6, trainable / 1e6)
    return flowvae
