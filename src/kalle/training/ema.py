"""Exponential moving average of the weights, for evaluation and export."""

from __future__ import annotations

from itertools import chain
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


@torch.no_grad()
def update_average(average: AveragedModel, model: nn.Module, decay: float) -> None:
    """One update with decay ``min(decay, (1 + n) / (10 + n))`` after n updates, so that a young average forgets its start.

    The first copies the weights; counters are always copied. All tensors at once, and n read once: asked of a GPU for each tensor, it is a
    wait for everything before it, hundreds of times a step. ``AveragedModel``'s own ways are one tensor at a time, or tensors of one dtype
    and device in both models; here an fp32 average of a model in half precision stays in fp32.
    """
    mine, theirs = (list(chain(each.parameters(), each.buffers())) for each in (average.module, model))
    n = int(average.n_averaged)
    floats = [(old, new.to(old)) for old, new in zip(mine, theirs, strict=True) if n and old.is_floating_point()]
    if floats:
        olds, news = map(list, zip(*floats, strict=True))
        torch._foreach_lerp_(olds, news, 1 - min(decay, (1 + n) / (10 + n)))
    for old, new in zip(mine, theirs, strict=True):
        if not n or not old.is_floating_point():
            old.copy_(new)
    average.n_averaged += 1


class EMA(WeightAveraging):
    """Averages after every optimizer step; validation, the final weights and exported folders use the average."""

    def __init__(self, decay: float = 0.9999) -> None:
        super().__init__()
        self.decay = decay
        self._in_place = False

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average where the model is; Lightning makes it before the model is moved there."""
        if self._average_model is not None:
            self._average_model.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Average where the batch ended with an update."""
        if trainer.global_step > self._latest_update_step:
            assert self._average_model is not None
            update_average(self._average_model, pl_module, self.decay)
            self._latest_update_step = trainer.global_step

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Put the average into the module."""
        super().on_train_end(trainer, pl_module)
        self._in_place = True

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """The same for a run that was complete when it was resumed, which Lightning ends without `on_train_end`."""
        if stage == "fit" and not self._in_place and self._average_model is not None:
            self._copy_average_to_current(pl_module)
            self._in_place = True
