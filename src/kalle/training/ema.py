"""Exponential moving average of the weights, for evaluation and export."""

from __future__ import annotations

from functools import partial

import lightning
from lightning.pytorch.callbacks import WeightAveraging
from torch import Tensor


def warmed_average(average: Tensor, current: Tensor, updates: Tensor | int, decay: float) -> Tensor:
    """One update with decay ``min(decay, (1 + n) / (10 + n))`` after n updates, so that a young average forgets its start."""
    n = float(updates)
    return average.lerp(current.to(average.dtype), 1 - min(decay, (1 + n) / (10 + n))) if average.is_floating_point() else current


class EMA(WeightAveraging):
    """Averages after every optimizer step; validation, the final weights and exported folders use the average."""

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__(avg_fn=partial(warmed_average, decay=decay))
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
