"""A loader that knows how many batches it has handed out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from kalle.data.sampling import EpochSampler


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def as_is(batch: Any) -> Any:
    """The batch, which the data set has already put together."""
    return batch


class ResumableLoader(DataLoader):
    """Hands out what ``dataset[list of visits]`` returns, and can continue in the middle of an epoch.

    `state_dict` counts the batches that were handed out, not those that workers have prepared ahead; the trainer stores it in its
    checkpoints, and `load_state_dict` makes the next iteration start behind them.
    """

    def __init__(self, dataset: Dataset, sampler: Sampler, *, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=as_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )
        self._delivered = 0
        self._epoch = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator on purpose: Lightning makes its first iterator before it tells the sampler the epoch, so the epoch's batches
        # are not to be looked up before the first one is asked for.
        if isinstance(self.sampler, EpochSampler):
            self._delivered, self._epoch = self.sampler.start, self.sampler.epoch
        batches = super().__iter__()
        # PyTorch asks the sampler for its iterator more than once while it starts workers, so only here is the start used up.
        if isinstance(self.sampler, EpochSampler):
            self.sampler.start = 0
        for batch in batches:
            self._delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches handed out; empty for validation loaders, which always start anew."""
        if not isinstance(self.sampler, EpochSampler):
            return {}
        return self.sampler.state_dict(self._delivered if self._epoch == self.sampler.epoch else 0)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that ``state`` counts."""
        if isinstance(self.sampler, EpochSampler):
            self.sampler.load_state_dict(state)
            self._delivered, self._epoch = self.sampler.start, self.sampler.epoch
