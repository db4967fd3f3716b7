"""Training noise as a function of the seed and the step, so that a resumed run draws what an uninterrupted one would have."""

from __future__ import annotations

import random
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback


def step_generator(seed: int, *counters: int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``counters`` (step, rank, …) only."""
    return torch.Generator().manual_seed(_state(seed, *counters))


def _state(*counters: int) -> int:
    return int(np.random.SeedSequence(list(counters)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class StepSeeds(Callback):
    """Seeds the global generators (python, numpy, torch on CPU and CUDA) before every batch from (seed, step, batch, rank).

    Dropout and whatever else draws from them then continues after a resume as without an interruption, on every rank, with nothing to
    store; and what a validation or a logger draws in between cannot change the training.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin the batch's own stream; its last counter keeps it apart from those of `step_generator` in the modules."""
        state = _state(self.seed, trainer.global_step, batch_idx, trainer.global_rank, 1)
        random.seed(state)
        np.random.seed(state % 2**32)  # noqa: NPY002 - libraries draw from it
        torch.manual_seed(state)
