"""Batch order and training noise as pure functions of (seed, epoch, ...), so that a run can be resumed exactly.

A sampler yields whole batches, each a list of `Visit`; the epoch travels inside the visit, so that a data set keeps no
state and workers, however many, produce the same batches.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

logger = logging.getLogger(__name__)

Plan = Callable[[int], list[list[int]]]
"""From an epoch to its batches of item indices; the number of batches must not depend on the epoch."""


class Visit(NamedTuple):
    """One item of one epoch."""

    epoch: int
    item: int


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from ``parts``: equal parts give equal seeds, on any machine and in any process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def standard_noise(shape: Sequence[int], *parts: int | str) -> Tensor:
    """Standard normal fp32 noise of ``shape``, drawn on the CPU from the seed of ``parts``."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(derived_seed(*parts)))


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator seeded from ``parts``."""
    return np.random.default_rng(derived_seed(*parts))


def equal_buckets(positions: np.ndarray, buckets: int) -> list[np.ndarray]:
    """Item indices in at most ``buckets`` groups of similar length and nearly equal total length.

    ``positions`` (N,) is the length of each item. Groups are ordered by length and none is empty.
    """
    order = np.argsort(positions, kind="stable")
    filled = np.cumsum(positions[order])
    group = np.minimum((filled - 1) * buckets // max(int(filled[-1]), 1), buckets - 1)
    return [order[group == index] for index in np.unique(group)]


class BudgetPlan:
    """Batches of similar length under a budget of padded positions.

    A batch of B items costs B * (longest text + longest audio) positions, padding included, and never more than
    ``max_positions``. Items are put into ``buckets`` groups by length once; an epoch shuffles each group, cuts it into batches and
    shuffles the batches. The batch size of a group follows from its longest items, so every epoch has the same number of
    batches (the trainer asks only once) and visits every item exactly once.

    ``text_lengths`` and ``audio_lengths`` are (N,) int64, in positions; the sum of no item may exceed ``max_positions``.
    """

    def __init__(
        self,
        text_lengths: np.ndarray,
        audio_lengths: np.ndarray,
        *,
        max_positions: int,
        max_items: int | None = None,
        buckets: int = 30,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        total = text_lengths + audio_lengths
        assert total.size, "no items to batch"
        assert int(total.max()) <= max_positions, (int(total.max()), max_positions)
        self.seed, self.shuffle = seed, shuffle
        self._groups: list[tuple[np.ndarray, int]] = []
        for members in equal_buckets(total, buckets):
            widest = int(text_lengths[members].max() + audio_lengths[members].max())
            size = max(1, max_positions // widest)
            self._groups.append((members, size if max_items is None else min(size, max_items)))

    def __call__(self, epoch: int) -> list[list[int]]:
        """The batches of ``epoch`` as lists of item indices."""
        generator = numpy_generator("batches", self.seed, epoch)
        batches: list[list[int]] = []
        for members, size in self._groups:
            order = generator.permutation(members) if self.shuffle else members
            batches += [order[start : start + size].tolist() for start in range(0, len(order), size)]
        if self.shuffle:
            batches = [batches[index] for index in generator.permutation(len(batches))]
        return batches


class FixedSizePlan:
    """Batches of ``batch_size`` out of ``items`` items in a fresh order every epoch; the last one may be smaller."""

    def __init__(self, items: int, batch_size: int, *, shuffle: bool = True, seed: int = 0) -> None:
        assert items > 0, "no items to batch"
        self.items, self.batch_size, self.shuffle, self.seed = items, batch_size, shuffle, seed

    def __call__(self, epoch: int) -> list[list[int]]:
        """The batches of ``epoch`` as lists of item indices."""
        order = np.arange(self.items)
        if self.shuffle:
            order = numpy_generator("batches", self.seed, epoch).permutation(order)
        return [order[start : start + self.batch_size].tolist() for start in range(0, self.items, self.batch_size)]


class EpochSampler(Sampler[list[Visit]]):
    """The batches of one rank, one epoch at a time, beginning with batch ``start`` (the loader sets it back to 0).

    Rank r of R takes the batches r, r + R, ... of the epoch's plan. When their number is no multiple of R, the first ones are
    visited a second time, so that all ranks make equally many steps; ``repeated`` counts them. The trainer calls `set_epoch`.
    """

    def __init__(self, plan: Plan, *, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch = 0
        self.start = 0
        batches = len(plan(0))
        self._length = math.ceil(batches / world_size)
        self.repeated = self._length * world_size - batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration; a new epoch begins at its first batch."""
        if epoch != self.epoch:
            self.start = 0
        self.epoch = epoch

    def state_dict(self, delivered: int) -> dict[str, int]:
        """The state after ``delivered`` batches of the current epoch."""
        return {"epoch": self.epoch, "delivered": delivered, "world_size": self.world_size}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that ``state`` counts; the number of ranks must be the same."""
        if state["world_size"] != self.world_size:
            # Another split of the epoch: the only point all ranks share is its beginning.
            logger.warning("%d processes instead of %d: epoch %d starts anew", self.world_size, state["world_size"], state["epoch"])
            self.epoch, self.start = state["epoch"], 0
            return
        self.epoch, self.start = state["epoch"], state["delivered"]

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[list[Visit]]:
        batches = self.plan(self.epoch)
        padded = batches + [batches[index % len(batches)] for index in range(self.repeated)]
        mine = padded[self.rank :: self.world_size]
        assert len(mine) == self._length, (len(mine), self._length)
        return iter([[Visit(self.epoch, index) for index in batch] for batch in mine[self.start :]])


class ConstantSampler(Sampler[list[Visit]]):
    """The same batches, in the same order and with the same noise, at every iteration: for validation.

    It has no ``set_epoch`` on purpose, for trainers also call that on validation samplers.
    """

    def __init__(self, batches: list[list[int]], *, rank: int = 0, world_size: int = 1) -> None:
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Visit]]:
        return iter([[Visit(0, index) for index in batch] for batch in self.batches])
