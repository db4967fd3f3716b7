"""How good reconstructions are, by metrics that the caller brings, and how that develops, in one picture."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from kalle.models.batch import WaveBatch
from kalle.training.players import sum_over_ranks

logger = logging.getLogger(__name__)

PairMetric = Callable[[NDArray[np.float32], NDArray[np.float32]], float]
"""(recording, reconstruction), both (S,) -> a number; ValueError when this pair cannot be scored."""


class ReconstructionMetrics(Callback):
    """Logs ``val/NAME``, the mean over the first ``utterances`` of the validation split, over all ranks, of every bound metric.

    A pair that a metric cannot score (silence, say) is left out, counted and named in a warning. Nothing is logged for a metric
    that scored no pair.
    """

    def __init__(self, names: Sequence[str], utterances: int) -> None:
        self.names, self.utterances = tuple(names), utterances
        self._metrics: dict[str, PairMetric] = {}
        self._sums = torch.zeros(0)

    def bind(self, name: str, metric: PairMetric) -> None:
        """Have ``metric`` measure what is logged as ``val/name``; every rank must bind the same."""
        self._metrics[name] = metric

    def on_validation_epoch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Forget the last validation."""
        self._sums = torch.zeros(len(self._metrics), 3, dtype=torch.float64)  # sum, scored, failed

    def on_validation_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: WaveBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Score the batch's utterance when it is one of the first; batches are dealt out to the ranks in turn."""
        if batch_idx * trainer.world_size + trainer.global_rank >= self.utterances or trainer.sanity_checking:
            return
        samples = min(outputs["wav"].shape[1], batch.wav.shape[1])
        recording, audio = (side[0, :samples].float().cpu().numpy() for side in (batch.wav, outputs["wav"]))
        for index, (name, metric) in enumerate(self._metrics.items()):
            try:
                self._sums[index] += torch.tensor([metric(recording, audio), 1, 0], dtype=torch.float64)
            except ValueError as error:
                self._sums[index, 2] += 1
                logger.warning("no %s of '%s' at step %d: %s", name, batch.cut_ids[0], trainer.global_step, error)

    def on_validation_epoch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Log the means."""
        if trainer.sanity_checking or not self._metrics:
            return
        for name, (total, scored, failed) in zip(self._metrics, sum_over_ranks(self._sums, pl_module.device).tolist(), strict=True):
            if scored:
                pl_module.log(f"val/{name}", total / scored, sync_dist=True)
            if failed:
                pl_module.log(f"val/{name}_not_scored", failed, sync_dist=True)
