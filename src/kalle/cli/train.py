"""`kalle train flowvae|lm`: composes a configuration and calls `kalle.training`."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.training import FlowVAETrainingConfig, LMTrainingConfig, Plan, TrainingResult

logger = logging.getLogger(__name__)

STAGES = ("flowvae", "lm")
DRY_RUN = "--dry-run"
USAGE = """usage: kalle train flowvae data.corpus=DIR out=DIR [KEY=VALUE ...] [--dry-run]
       kalle train lm data.latents=DIR out=DIR [flowvae=DIR] [KEY=VALUE ...] [--dry-run]

--dry-run checks configuration, data and shapes, estimates memory, steps and disk, and writes nothing.

`kalle train flowvae --help` and `kalle train lm --help` list the keys, --help-all explains every one; --cfg job prints the
configuration of a run.
"""


def run(overrides: list[str]) -> int:
    """The first word names the stage; the rest are Hydra overrides. Returns the exit status."""
    from kalle.cli.hydra_entry import folder_override, run_hydra
    from kalle.cli.train_help import ALL as HELP_ALL
    from kalle.cli.train_help import FLAG as HELP
    from kalle.cli.train_help import help_text

    if overrides and overrides[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if not overrides or overrides[0] not in STAGES:
        got = repr(overrides[0]) if overrides else "nothing"
        raise UserError(
            f"kalle train: got {got}, expected one of {', '.join(STAGES)} and then Hydra overrides such as trainer.max_steps=1000"
        )
    if any(word in ("-h", HELP, HELP_ALL) for word in overrides):
        sys.stdout.write(help_text(overrides[0], HELP_ALL in overrides))
        return 0
    stage, words = overrides[0], [word for word in overrides[1:] if word != DRY_RUN]
    if stage == "lm":
        words = folder_override(words, "flowvae")
    return run_hydra(dry_run if DRY_RUN in overrides else train, f"train_{stage}", words)


def train(config: DictConfig) -> TrainingResult:
    """Train as ``config`` (configs/train_flowvae.yaml or train_lm.yaml) says, in as many processes as ``trainer.devices`` requests."""
    from kalle.cli.launch import lost_peer, start_ranks
    from kalle.training import FlowVAETrainingConfig, train_flowvae, train_lm
    from kalle.training.checkpointing import Preempted

    built = training_config(config)
    start_ranks(built.device, built.trainer.devices)
    try:
        if isinstance(built, FlowVAETrainingConfig):
            return train_flowvae(built, metrics=reconstruction_metrics(built))
        return train_lm(built)
    except Preempted as preempted:
        logger.info("%s; saved, run the same command again to continue", preempted)
        raise SystemExit(preempted.exit_code) from None
    except RuntimeError as error:
        if lost_peer(error):
            raise UserError("another rank has ended: expected all to continue; see its message, then run the same command again") from None
        raise


def dry_run(config: DictConfig) -> Plan:
    """Print what `train` would do, and write nothing."""
    from kalle.training import FlowVAETrainingConfig, plan_flowvae, plan_lm

    built = training_config(config)
    plan = plan_flowvae(built) if isinstance(built, FlowVAETrainingConfig) else plan_lm(built)
    counts = f"{plan.parameters / 1e6:.1f} M parameters, {plan.trained / 1e6:.1f} M trained, {plan.precision}"
    sys.stdout.write(f"kalle train {plan.stage}: {counts}\n" + "\n".join(plan.lines()) + "\ndry run: nothing was trained or written\n")
    return plan


def training_config(config: DictConfig) -> FlowVAETrainingConfig | LMTrainingConfig:
    """The dataclass that a composed ``config`` describes; a UserError for a missing value or one of the wrong type."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf

    from kalle.cli.hydra_entry import readable

    missing = sorted(OmegaConf.missing_keys(config), key=lambda name: (name.count("."), name))
    if missing:
        raise UserError(f"no value for {', '.join(missing)}: expected a folder; add {missing[0]}=DIR to the command")
    try:
        built: FlowVAETrainingConfig | LMTrainingConfig = instantiate(config, _convert_="all")
    except InstantiationException as error:
        stage = "lm" if "lm" in config else "flowvae"
        raise readable(error, f"train_{stage}", []) from None
    return built


def reconstruction_metrics(config: FlowVAETrainingConfig) -> Mapping[str, Any]:
    """The metrics of evaluation that ``callbacks.metrics.names`` means; one that is not installed is named in a warning and left out."""
    from kalle.evaluation.metrics import PESQ, RATE_HZ, STOI, ScoreItem

    makers: dict[str, Callable[[], Any]] = {"stoi": STOI, "pesq_wb": lambda: PESQ("wb"), "pesq_nb": lambda: PESQ("nb")}
    wanted = () if config.callbacks.metrics is None else config.callbacks.metrics.names
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        raise UserError(f"callbacks.metrics.names: got {unknown[0]!r}, expected some of {', '.join(makers)}; correct it")
    if wanted and config.flowvae.sample_rate != RATE_HZ:
        logger.warning("no %s in validation: they are defined at %d Hz, not %d", ", ".join(wanted), RATE_HZ, config.flowvae.sample_rate)
        return {}

    def scorer(name: str) -> Any:
        metric = makers[name]()
        return lambda recording, audio: float(metric(ScoreItem("", audio, "", recording=recording, aligned=True))[name])

    found = {}
    for name in wanted:
        try:
            found[name] = scorer(name)
        except UserError as error:
            logger.warning("no %s in validation: %s", name, error)
    return found
