"""What Flow-VAE training needs of the command line: a strategy for two players, and metrics from evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def choose_strategy(config: DictConfig) -> None:
    """Have several processes share the gradients of both players: ``trainer.strategy`` auto and ddp mean that.

    A UserError for another strategy, which could not train two players in turn.
    """
    from kalle.cli.train_plan import process_count
    from kalle.training.players import PLAYERS_STRATEGY, register_players_strategy

    register_players_strategy()
    asked = config.trainer.strategy
    if asked not in ("auto", "ddp", PLAYERS_STRATEGY):
        raise UserError(f"trainer.strategy: got {asked}, expected auto: the Flow-VAE has two players to average; leave it out")
    config.trainer.strategy = PLAYERS_STRATEGY if asked != "auto" or process_count(config) > 1 else "auto"


def bind_reconstruction_metrics(callbacks: list[Any], sample_rate: int) -> None:
    """Give `ReconstructionMetrics` the metrics that its ``names`` mean; one that is not installed is named in a warning and left out."""
    from kalle.evaluation.metrics import PESQ, RATE_HZ, STOI, ScoreItem
    from kalle.training.reconstruction import ReconstructionMetrics

    makers: dict[str, Callable[[], Any]] = {"stoi": STOI, "pesq_wb": lambda: PESQ("wb"), "pesq_nb": lambda: PESQ("nb")}

    def scorer(name: str) -> Any:
        metric = makers[name]()
        return lambda recording, audio: float(metric(ScoreItem("", audio, "", recording=recording, aligned=True))[name])

    for callback in callbacks:
        if not isinstance(callback, ReconstructionMetrics):
            continue
        unknown = [name for name in callback.names if name not in makers]
        if unknown:
            raise UserError(f"callbacks.metrics.names: got {unknown[0]!r}, expected some of {', '.join(makers)}; correct it")
        if sample_rate != RATE_HZ:
            logger.warning("no %s in validation: they are defined at %d Hz, not %d", ", ".join(callback.names), RATE_HZ, sample_rate)
            continue
        for name in callback.names:
            try:
                callback.bind(name, scorer(name))
            except UserError as error:
                logger.warning("no %s in validation: %s", name, error)
