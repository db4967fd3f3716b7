"""Exponential moving average of the weights, for evaluation and export."""

from __future__ import annotations

from functools import partial

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def warmed_averages(averages: list[Tensor], current: list[Tensor], updates: Tensor | int, decay: float) -> None:
    """One update in place with decay ``min(decay, (1 + n) / (10 + n))`` after n updates, so that a young average forgets its start.

    All tensors of a dtype at once: asked of a GPU for each tensor on its own, the number of updates is a wait for everything before it,
    hundreds of times a step. Counters are copied.
    """
    if not averages[0].is_floating_point():
        torch._foreach_copy_(averages, current)
        return
    n = float(updates)
    same_type = [value.to(average.dtype) for average, value in zip(averages, current, strict=True)]
    torch._foreach_lerp_(averages, same_type, 1 - min(decay, (1 + n) / (10 + n)))


class EMA(WeightAveraging):
    """Averages after every optimizer step; validation, the final weights and exported folders use the average."""

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__(multi_avg_fn=partial(warmed_averages, decay=decay))
        self._in_place = False

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average into the module."""
        super().on_train_end(trainer, pl_module)
        self._in_place = True

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """The same for a run that was complete when it was resumed, which Lightning ends without `on_train_end`."""
        if stage == "fit" and not self._in_place and self._average_model is not None:
            self._copy_average_to_current(pl_module)
            self._in_place = True
