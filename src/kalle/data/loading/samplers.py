"""Which items an epoch has, in which order and in which batches: pure functions of (seed, epoch)."""

from __future__ import annotations

import heapq
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
from torch.utils.data import Sampler

from kalle.data.latents.mix import Mix
from kalle.errors import UserError
from kalle.seeds import numpy_generator

logger = logging.getLogger(__name__)
BatchSampler = Callable[[int], Sequence[list[int]]]
"""From an epoch to its batches of item indices; the numbers of batches and of their items must not depend on the epoch.

An item that a mix samples several times an epoch is ``index + n * items`` at its n-th repetition.
"""


class Sample(NamedTuple):
    """One item of one epoch."""

    epoch: int
    item: int


class RankSampler(Sampler[list[Sample]]):
    """The batches of one rank, one epoch at a time, beginning with batch ``start`` (the loader sets it back to 0).

    Rank r of R takes the batches r, r + R, ... of the epoch's plan. When their number is no multiple of R, some of the last ones are
    halved, so that all ranks make equally many steps and nothing comes twice; ``split`` counts the batches so gained. Only when
    every batch is down to one item do some come a second time; ``repeated`` counts those. The trainer calls `set_epoch`.
    """

    def __init__(self, plan: BatchSampler, *, rank: int = 0, world_size: int = 1) -> None:
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

    def __iter__(self) -> Iterator[list[Sample]]:
        epoch = self.epoch
        body, tail, _ = even_out(self.plan(epoch), self.world_size)
        total = len(body) + len(tail)
        assert total == self._length * self.world_size, (total, self._length, self.world_size)
        mine = range(self.rank, total, self.world_size)[self.start :]
        batches = (body[number] if number < len(body) else tail[number - len(body)] for number in mine)
        return ([Sample(epoch, index) for index in batch] for batch in batches)


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


class ConstantSampler(Sampler[list[Sample]]):
    """The same batches, in the same order and with the same noise, at every iteration: for validation.

    It has no ``set_epoch`` on purpose, for trainers also call that on validation samplers.
    """

    def __init__(self, batches: Sequence[list[int]], *, rank: int = 0, world_size: int = 1) -> None:
        self.batches = batches[rank::world_size]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter([[Sample(0, index) for index in batch] for batch in self.batches])


def one_each(batches: Sequence[list[int]], world_size: int, split: str) -> Sequence[list[int]]:
    """``batches`` of a split that is looked at once, at least one for every rank: the larger ones are halved when there are too few.

    A rank without a batch would miss the all-reduce, and the others would wait for it.
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


_LEAST_FILLED = 0.8
"""Least share of their longest item that the items of the last bucket have on average; below it the bucket is split."""


class Batches(Sequence[list[int]]):
    """Batches of item indices over one array: a list of lists would cost forty bytes a sample."""

    def __init__(self, order: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        """Batch n is ``order[starts[n]:ends[n]]``."""
        self.order, self.starts, self.ends = order, starts, ends

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, index: int) -> list[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Batches: ...
    def __getitem__(self, index: int | slice) -> list[int] | Batches:
        if isinstance(index, slice):
            return Batches(self.order, self.starts[index], self.ends[index])
        items: list[int] = self.order[self.starts[index] : self.ends[index]].tolist()
        return items

    def __iter__(self) -> Iterator[list[int]]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def reordered(self, order: np.ndarray) -> Batches:
        """The batches numbered ``order``, in that order."""
        return Batches(self.order, self.starts[order], self.ends[order])


@dataclass(frozen=True)
class ShardWindows:
    """Shuffle shards, then items only within windows of ``size`` shards, so that each shard is read within a short time.

    ``shard`` (N,) int32 is the shard of each item.
    """

    shard: np.ndarray
    size: int

    def of_items(self, generator: np.random.Generator) -> np.ndarray:
        """The window in which each item comes, (N,) int64."""
        shards = int(self.shard.max()) + 1
        place = np.empty(shards, np.int64)
        place[generator.permutation(shards)] = np.arange(shards)
        return place[self.shard] // self.size


def windows_of(shuffle: str, window_shards: int, shard: np.ndarray | None) -> ShardWindows | None:
    """The windows of data.shuffle and data.window_shards for items of these shards (N,); None for a shuffle of all items.

    UserError for other values, and for a shuffle by shards where there are none.
    """
    if shuffle not in ("items", "shards"):
        raise UserError(f"data.shuffle: got {shuffle!r}, expected 'items' or 'shards'; correct it")
    if window_shards < 1:
        raise UserError(f"data.window_shards: got {window_shards}, expected at least 1; correct it")
    if shuffle == "items":
        return None
    if shard is None:
        raise UserError(
            "data.shuffle=shards: got a corpus of loose recordings, expected shards; run `kalle data shard CORPUS OUT` and train on OUT, "
            "or set data.shuffle=items"
        )
    return ShardWindows(shard, window_shards)


class _GroupedBatchSampler:
    """Groups of items, each with a batch size; subclasses say how both are found."""

    def __init__(
        self, groups: Sequence[tuple[np.ndarray, int]], *, shuffle: bool, seed: int, mix: Mix | None, windows: ShardWindows | None
    ) -> None:
        assert shuffle or (mix is None and windows is None), "only a shuffled epoch can be mixed or go by shards"
        self._groups, self._shuffle_batches = groups, shuffle
        self.shuffle, self.seed, self.mix, self.windows = shuffle, seed, mix, windows
        self._draws = None if mix is None else mix.draws([members for members, _ in groups])

    def __call__(self, epoch: int) -> Batches:
        """The batches of ``epoch`` as lists of item indices."""
        generator = numpy_generator("batches", self.seed, epoch)
        window = None if self.windows is None else self.windows.of_items(numpy_generator("windows", self.seed, epoch))
        orders = [self._order(number, generator, window) for number in range(len(self._groups))]
        starts, ends, filled = [], [], 0
        for order, (_, size) in zip(orders, self._groups, strict=True):
            bounds = filled + self._bounds(len(order), size)
            starts.append(bounds[:-1])
            ends.append(bounds[1:])
            filled += len(order)
        batches = Batches(np.concatenate(orders), np.concatenate(starts), np.concatenate(ends))
        if self._shuffle_batches:
            batches = batches.reordered(generator.permutation(len(batches)))
        if window is None:
            return batches
        # A batch belongs to the window of its last item: what does not fill a batch in one window is carried into the next.
        last = window[batches.order[batches.ends - 1] % len(window)]
        return batches.reordered(np.argsort(last, kind="stable"))

    def _bounds(self, items: int, size: int) -> np.ndarray:
        """Where batches of at most ``size`` begin among ``items``, and the end of the last, (batches + 1,)."""
        return np.append(np.arange(0, items, size), items)

    def _order(self, number: int, generator: np.random.Generator, window: np.ndarray | None) -> np.ndarray:
        """The samples of one group, shuffled, and sorted by window where there are windows."""
        samples = self._groups[number][0] if self._draws is None else self._draws[number](generator)
        if self.shuffle:
            samples = generator.permutation(samples)
        if window is None:
            return samples
        return samples[np.argsort(window[samples % len(window)], kind="stable")]


class BudgetBatchSampler(_GroupedBatchSampler):
    """Batches of similar length under a budget of padded positions.

    A batch of B items costs B * (longest text + longest audio) positions, padding included, and never more than ``max_positions``.
    Items are put into ``buckets`` groups by length once, into fewer where there are few items, the group of the longest into more where
    it has a long tail and there is no mix; an epoch shuffles each group, cuts it into batches of nearly equal size and shuffles the
    batches. The batch size of a group follows from its longest items, so every epoch has the same number of batches (the trainer asks
    only once) and samples every item exactly once, or as often as ``mix`` says. With ``windows`` the groups are shuffled within windows
    of shards and cut through all windows in turn, which changes the order and no number.

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
        mix: Mix | None = None,
        windows: ShardWindows | None = None,
    ) -> None:
        total = text_lengths + audio_lengths
        assert total.size, "no items to batch"
        assert int(total.max()) <= max_positions, (int(total.max()), max_positions)

        def size_of(members: np.ndarray) -> int:
            size = max(1, max_positions // int(text_lengths[members].max() + audio_lengths[members].max()))
            return size if max_items is None else min(size, max_items)

        # A bucket of less than a batch would make batches of few items where all of them fit into one.
        fitting = max(1, len(total) // size_of(np.arange(len(total)))) if mix is None else buckets
        *ordinary, longest = equal_buckets(total, min(buckets, fitting))
        # A mix draws a fixed number from each group, which should not be of a few items: always the same would be left out.
        tail = _tight(longest, total, size_of) if ordinary and mix is None else [longest]
        groups = [(members, size_of(members)) for members in (*ordinary, *tail)]
        super().__init__(groups, shuffle=shuffle, seed=seed, mix=mix, windows=windows)

    def _bounds(self, items: int, size: int) -> np.ndarray:
        # An update of one or two left-over utterances would count as much as any other.
        batches = -(-items // size)
        return np.arange(batches + 1) * items // max(batches, 1)


class FixedSizeBatchSampler(_GroupedBatchSampler):
    """Batches of ``batch_size`` out of ``items`` items in a fresh order every epoch; the last one may be smaller."""

    def __init__(
        self,
        items: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        mix: Mix | None = None,
        windows: ShardWindows | None = None,
    ) -> None:
        assert items > 0, "no items to batch"
        super().__init__([(np.arange(items), batch_size)], shuffle=shuffle, seed=seed, mix=mix, windows=windows)
        # The items are shuffled already; a window's batches come in the order in which it is read.
        self._shuffle_batches = False


def _tight(members: np.ndarray, lengths: np.ndarray, size_of: Callable[[np.ndarray], int]) -> list[np.ndarray]:
    """``members``, ordered by length, in groups whose longest does not make the batches of the others small.

    Few utterances, of many lengths, are the last bucket of a long tail; were they one group, each would be a batch of its own.
    """
    size = size_of(members)
    if len(members) <= size or lengths[members].mean() >= _LEAST_FILLED * lengths[members].max():
        return [members]
    half = int(np.searchsorted(np.cumsum(lengths[members]), lengths[members].sum() / 2)) + 1
    half = min(half, len(members) - 1)
    return _tight(members[:half], lengths, size_of) + _tight(members[half:], lengths, size_of)


def equal_buckets(positions: np.ndarray, buckets: int) -> list[np.ndarray]:
    """Item indices in at most ``buckets`` groups of similar length and nearly equal total length.

    ``positions`` (N,) is the length of each item. Groups are ordered by length and none is empty.
    """
    order = np.argsort(positions, kind="stable")
    filled = np.cumsum(positions[order])
    group = np.minimum((filled - 1) * buckets // max(int(filled[-1]), 1), buckets - 1)
    return [order[group == index] for index in np.unique(group)]


_LENGTH_GROUPS = 30
"""A mix draws from groups of similar length, so that no draw can hold much more than another."""


class PackedBatchSampler:
    """Batches whose utterances have at most ``max_positions`` positions together, of any lengths, in a fresh mix every epoch.

    An epoch goes through the items in random order and puts each into the batch that holds least so far. With K batches of items
    no longer than m the fullest then holds at most (total - m) / K + m positions, so the K chosen here keeps the budget whatever the
    order; every epoch has K batches, nearly equally full, and samples every item exactly once, or as often as ``mix`` says. With
    ``windows`` the order goes by windows of shards and is cut into K runs of nearly equal sums, each below total / K + m.

    ``positions`` (N,) int64 is the length of each item, none longer than ``max_positions``. ``max_items`` bounds the items of a batch.
    """

    def __init__(
        self,
        positions: np.ndarray,
        *,
        max_positions: int,
        max_items: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        mix: Mix | None = None,
        windows: ShardWindows | None = None,
    ) -> None:
        assert positions.size, "no items to batch"
        assert shuffle or (mix is None and windows is None), "only a shuffled epoch can be mixed or go by shards"
        longest = int(positions.max())
        assert longest <= max_positions, (longest, max_positions)
        # A batch of n items that each count for at least 1 / max_items of the budget has no more than max_items.
        least = 1 if max_items is None else math.ceil(max_positions / max_items)
        self._sizes = np.maximum(positions, least)
        self.shuffle, self.seed, self.windows = shuffle, seed, windows
        groups = equal_buckets(self._sizes, _LENGTH_GROUPS)
        self._draws = None if mix is None else mix.draws(groups)
        samples, total = len(positions), int(self._sizes.sum())
        if self._draws is not None:
            counts = [len(draw(numpy_generator("count"))) for draw in self._draws]
            samples = sum(counts)
            total = sum(count * int(self._sizes[group].max()) for count, group in zip(counts, groups, strict=True) if count)
        # A run of the order may hold a whole sample more than its share, a balanced batch does not.
        spared = 0 if windows is not None else int(self._sizes.max())
        self.batches = _batches_needed(total - spared, max_positions - int(self._sizes.max()), samples)
        self.filled = total / (self.batches * max_positions)
        """Share of the budget that batches hold on average."""

    def __call__(self, epoch: int) -> list[list[int]]:
        """The batches of ``epoch`` as lists of item indices (see `Mix` for those beyond N)."""
        generator = numpy_generator("batches", self.seed, epoch)
        samples = np.arange(len(self._sizes)) if self._draws is None else np.concatenate([draw(generator) for draw in self._draws])
        if self.shuffle:
            samples = generator.permutation(samples)
        if self.windows is None:
            return self._balanced(samples)
        window = self.windows.of_items(numpy_generator("windows", self.seed, epoch))
        return self._cut(samples[np.argsort(window[samples % len(window)], kind="stable")])

    def _balanced(self, samples: np.ndarray) -> list[list[int]]:
        """Each sample in turn into the batch that holds least."""
        batches: list[list[int]] = [[] for _ in range(self.batches)]
        emptiest = [(0, batch) for batch in range(self.batches)]
        sizes = self._sizes[samples % len(self._sizes)].tolist()
        for sample, size in zip(samples.tolist(), sizes, strict=True):
            filled, batch = emptiest[0]
            batches[batch].append(sample)
            heapq.heapreplace(emptiest, (filled + size, batch))
        return batches

    def _cut(self, samples: np.ndarray) -> list[list[int]]:
        """Runs of nearly equal sums, in order; none is empty."""
        sizes = self._sizes[samples % len(self._sizes)]
        before = np.cumsum(sizes) - sizes
        numbers = np.arange(self.batches - 1)
        starts = np.searchsorted(before, (numbers + 1) * int(sizes.sum()) / self.batches)
        # Behind a sample longer than a share the next runs take one sample each, and so do the last ones if need be.
        starts = np.maximum(np.maximum.accumulate(starts - numbers) + numbers, numbers + 1)
        starts = np.minimum(starts, len(samples) - (self.batches - 1) + numbers)
        return [run.tolist() for run in np.split(samples, starts)]


def _batches_needed(total: int, room: int, samples: int) -> int:
    """The least K with total / K <= room; with a batch for each sample nothing can overflow."""
    if room == 0:
        return samples if total else 1
    return min(samples, max(1, math.ceil(total / room)))
