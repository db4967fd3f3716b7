"""Batch order and training noise as pure functions of (seed, epoch, ...), so that a run can be resumed exactly.

A sampler yields whole batches, each a list of `Visit`; the epoch travels inside the visit, so that a data set keeps no
state and workers, however many, produce the same batches.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from kalle.errors import UserError

logger = logging.getLogger(__name__)

Plan = Callable[[int], Sequence[list[int]]]
"""From an epoch to its batches of item indices; the numbers of batches and of their items must not depend on the epoch.

An item that a mixture visits several times an epoch is ``index + n * items`` at its n-th repetition.
"""


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


def standard_noise_into(out: Tensor, generator: torch.Generator, *parts: int | str) -> None:
    """Fill the contiguous fp32 ``out`` with what `standard_noise` gives for its shape; ``generator`` is only spared being made anew."""
    assert out.is_contiguous(), out.stride()
    torch.randn(out.shape, generator=generator.manual_seed(derived_seed(*parts)), out=out)


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator seeded from ``parts``."""
    return np.random.default_rng(derived_seed(*parts))


class EpochSampler(Sampler[list[Visit]]):
    """The batches of one rank, one epoch at a time, beginning with batch ``start`` (the loader sets it back to 0).

    Rank r of R takes the batches r, r + R, ... of the epoch's plan. When their number is no multiple of R, some of the last ones are
    halved, so that all ranks make equally many steps and nothing is visited twice; ``split`` counts the batches so gained. Only when
    every batch is down to one item are some visited a second time; ``repeated`` counts those. The trainer calls `set_epoch`.
    """

    def __init__(self, plan: Plan, *, rank: int = 0, world_size: int = 1) -> None:
        assert 0 <= rank < world_size, (rank, world_size)
        self.plan, self.rank, self.world_size = plan, rank, world_size
        self.epoch = 0
        self.start = 0
        batches = plan(0)
        body, tail, self.repeated = even_out(batches, world_size)
        self.split = len(body) + len(tail) - len(batches) - self.repeated
        self._length = (len(body) + len(tail)) // world_size

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
        epoch = self.epoch
        body, tail, _ = even_out(self.plan(epoch), self.world_size)
        total = len(body) + len(tail)
        assert total == self._length * self.world_size, (total, self._length, self.world_size)
        mine = range(self.rank, total, self.world_size)[self.start :]
        batches = (body[number] if number < len(body) else tail[number - len(body)] for number in mine)
        return ([Visit(epoch, index) for index in batch] for batch in batches)


def even_out(batches: Sequence[list[int]], world_size: int) -> tuple[Sequence[list[int]], list[list[int]], int]:
    """Bring the number of batches to a multiple of ``world_size``.

    Returns the first batches as they are, the last ones, halved where needed, and how many of those had to be repeated.
    """
    missing = -len(batches) % world_size
    if not missing:
        return batches, [], 0
    cut, gain = len(batches), 0
    while cut and (gain < missing or len(batches) - cut < missing):
        cut -= 1
        gain += len(batches[cut]) - 1
    tail = list(batches[cut:])
    repeated = 0
    for _ in range(missing):
        longest = max(range(len(tail)), key=lambda number: len(tail[number]))
        whole = tail[longest]
        if len(whole) == 1:
            tail.append(tail[repeated])  # all of one item by now
            repeated += 1
        else:
            tail[longest : longest + 1] = [whole[: -(-len(whole) // 2)], whole[-(-len(whole) // 2) :]]
    return batches[:cut], tail, repeated


class ConstantSampler(Sampler[list[Visit]]):
    """The same batches, in the same order and with the same noise, at every iteration: for validation.

    It has no ``set_epoch`` on purpose, for trainers also call that on validation samplers.
    """

    def __init__(self, batches: Sequence[list[int]], *, rank: int = 0, world_size: int = 1) -> None:
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Visit]]:
        return iter([[Visit(0, index) for index in batch] for batch in self.batches])


def one_each(batches: Sequence[list[int]], world_size: int, split: str) -> Sequence[list[int]]:
    """``batches`` of a split that is looked at once, at least one for every rank: the larger ones are halved when there are too few.

    A rank without a batch would miss the meeting in which all add up their sums, and the others would wait for it.
    UserError when the split has fewer utterances than ``world_size``: none may count twice.
    """
    if world_size == 1 or len(batches) >= world_size:
        return batches
    utterances = sum(map(len, batches))
    if utterances < world_size:
        raise UserError(
            f"split '{split}': got {utterances} utterances for {world_size} processes, expected at least one for each; "
            f"use {utterances or 1} of them or prepare a larger split"
        )
    body, tail, _ = even_out(batches, world_size)
    return [*body, *tail]
