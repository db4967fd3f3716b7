"""How fast a data module's loader is without a model behind it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from kalle.errors import UserError
from kalle.models.batch import LMBatch, WaveBatch

WARM_UP_BATCHES = 3


class Trains(Protocol):
    """What a data module has."""

    num_workers: int

    def train_dataloader(self) -> Any:
        """Batches of one epoch at each iteration."""
        ...


@dataclass(frozen=True)
class LoaderSpeed:
    """What came out of a loader in ``seconds``, after a warm-up."""

    workers: int
    batches: int
    items: int
    """Utterances or crops."""
    frames: int
    """Latent frames, or samples of waveforms, without padding."""
    seconds: float
    start_seconds: float
    """From asking for the first batch to having it: reading manifests and starting workers."""

    @property
    def items_per_second(self) -> float:
        """Utterances or crops a second."""
        return self.items / self.seconds

    @property
    def frames_per_second(self) -> float:
        """Latent frames, or samples, a second."""
        return self.frames / self.seconds


def measure_loader(
    data_module: Trains, batches: int, workers: int, *, warm_up: int = WARM_UP_BATCHES, clock: Callable[[], float] = time.perf_counter
) -> LoaderSpeed:
    """Take ``batches`` training batches from the loader of ``data_module`` with ``workers`` processes, over as many epochs as that takes.

    With workers what they have prepared during the warm-up counts too, at most two batches each, so take many more batches than that.
    The number of workers of the module is set and put back. UserError when there is nothing to measure.
    """
    if batches < 1 or workers < 0 or warm_up < 0:
        raise UserError(f"loader: got batches={batches}, workers={workers}, warm_up={warm_up}, expected at least 1, 0 and 0; correct them")
    before = data_module.num_workers
    data_module.num_workers = workers
    try:
        began = clock()
        loader = data_module.train_dataloader()
        stream = _endless(loader)
        items, frames = _size(next(stream))
        start_seconds = clock() - began
        for _ in range(warm_up):
            next(stream)
        items = frames = 0
        began = clock()
        for _ in range(batches):
            more = _size(next(stream))
            items, frames = items + more[0], frames + more[1]
        seconds = clock() - began
    finally:
        data_module.num_workers = before
    return LoaderSpeed(workers, batches, items, frames, seconds, start_seconds)


def _endless(loader: Any) -> Any:
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def _size(batch: LMBatch | WaveBatch) -> tuple[int, int]:
    """Items and frames of a batch."""
    if isinstance(batch, WaveBatch):
        return len(batch.wav), batch.wav.numel()
    return len(batch.latent_lengths), int(batch.latent_lengths.sum())
