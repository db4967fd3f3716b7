"""Two players under distributed data parallelism: each with gradients, buckets and a reducer of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.overrides.distributed import prepare_for_backward
from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

PLAYERS_STRATEGY = "ddp_players"
"""The name of `PlayersDDP` in ``trainer.strategy``."""


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within the block no gradient is computed for the parameters of ``module``; gradients still flow through it to its input."""
    thawed = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in thawed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)


class PlayersDDP(DDPStrategy):
    """Averages gradients over ranks for a module with manual optimisation whose ``players`` are trained in turn.

    torch's `DistributedDataParallel` around a whole `LightningModule` expects every backward to reach every parameter. With a
    generator and discriminators none does: it would fail, or, told to look for unused parameters, send both players' gradients at
    every backward. Here every player (a name and a module of `players()`) has a wrapper of its own, whose reducer works in the backwards
    that reach it; a player that takes no part in a step, as discriminators before their start, sends nothing. Every parameter of a
    player must be used when the player is.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        # Buffers are constants here: windows and mel filters.
        super().__init__(*arguments, **{"broadcast_buffers": False, **options})
        self._wrappers: list[DistributedDataParallel] = []

    def configure_ddp(self) -> None:
        """Wrap the players, which gives every rank the first one's weights; the `LightningModule` itself stays unwrapped."""
        module = self.lightning_module
        players = getattr(module, "players", None)
        assert callable(players), f"{type(module).__name__} has no players()"
        assert module is not None
        assert not module.automatic_optimization, "a module with players optimises by hand"
        wrappers = [self._setup_model(player) for player in players()]
        assert all(isinstance(wrapper, DistributedDataParallel) for wrapper in wrappers)
        self._wrappers = wrappers

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Make ready the reducers that this backward may reach."""
        for wrapper in self._wrappers:
            if any(parameter.requires_grad for parameter in wrapper.module.parameters()):
                prepare_for_backward(wrapper, closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """Nothing: the reducers have averaged the gradients by now."""

    def teardown(self) -> None:
        """Leave the players without wrappers."""
        self._wrappers = []
        super().teardown()


def register_players_strategy() -> None:
    """Let Lightning's trainer know `PLAYERS_STRATEGY` by name."""
    if PLAYERS_STRATEGY not in StrategyRegistry:
        StrategyRegistry.register(PLAYERS_STRATEGY, PlayersDDP, description="DDP with one reducer per player of a manual optimisation")


def sum_over_ranks(value: Tensor, device: torch.device) -> Tensor:
    """The sum of ``value`` over all ranks, computed on ``device`` and returned where it was; ``value`` itself in a single process."""
    if not torch.distributed.is_initialized():
        return value
    total = value.to(device, copy=True)
    torch.distributed.all_reduce(total)
    return total.to(value.device)
