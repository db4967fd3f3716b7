"""What an epoch visits, in which order and in which batches: pure functions of (seed, epoch)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np

from kalle.data.mixing import Mixture
from kalle.data.sampling import numpy_generator
from kalle.errors import UserError

_LEAST_FILLED = 0.8
"""Least share of their longest item that the items of the last bucket have on average; below it the bucket is split."""


class Batches(Sequence[list[int]]):
    """Batches of item indices over one array: a list of lists would cost forty bytes a visit."""

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
    """What data.shuffle and data.window_shards mean for items of these shards (N,); None for a shuffle of all items.

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


class _Plan:
    """Groups of items, each with a batch size; subclasses say how both are found."""

    def __init__(
        self, groups: Sequence[tuple[np.ndarray, int]], *, shuffle: bool, seed: int, mixture: Mixture | None, windows: ShardWindows | None
    ) -> None:
        assert shuffle or (mixture is None and windows is None), "only a shuffled epoch can be mixed or go by shards"
        self._groups, self._shuffle_batches = groups, shuffle
        self.shuffle, self.seed, self.mixture, self.windows = shuffle, seed, mixture, windows
        self._draws = None if mixture is None else mixture.draws([members for members, _ in groups])

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
        """The visits of one group, shuffled, and sorted by window where there are windows."""
        visits = self._groups[number][0] if self._draws is None else self._draws[number](generator)
        if self.shuffle:
            visits = generator.permutation(visits)
        if window is None:
            return visits
        return visits[np.argsort(window[visits % len(window)], kind="stable")]


class BudgetPlan(_Plan):
    """Batches of similar length under a budget of padded positions.

    A batch of B items costs B * (longest text + longest audio) positions, padding included, and never more than ``max_positions``.
    Items are put into ``buckets`` groups by length once, the group of the longest into more where it has a long tail and there is no
    mixture; an epoch shuffles each group, cuts it into batches of nearly equal size and shuffles the batches. The batch size of a group
    follows from its longest items, so every epoch has the same number of batches (the trainer asks only once) and visits every item
    exactly once, or as often as ``mixture`` says. With ``windows`` the groups are shuffled within windows of shards and cut through all
    windows in turn, which changes the order and no number.

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
        mixture: Mixture | None = None,
        windows: ShardWindows | None = None,
    ) -> None:
        total = text_lengths + audio_lengths
        assert total.size, "no items to batch"
        assert int(total.max()) <= max_positions, (int(total.max()), max_positions)

        def size_of(members: np.ndarray) -> int:
            size = max(1, max_positions // int(text_lengths[members].max() + audio_lengths[members].max()))
            return size if max_items is None else min(size, max_items)

        *ordinary, longest = equal_buckets(total, buckets)
        # A mixture draws a fixed number from each group, which should not be of a few items: always the same would be left out.
        tail = _tight(longest, total, size_of) if ordinary and mixture is None else [longest]
        groups = [(members, size_of(members)) for members in (*ordinary, *tail)]
        super().__init__(groups, shuffle=shuffle, seed=seed, mixture=mixture, windows=windows)

    def _bounds(self, items: int, size: int) -> np.ndarray:
        # An update of one or two left-over utterances would count as much as any other.
        batches = -(-items // size)
        return np.arange(batches + 1) * items // max(batches, 1)


class FixedSizePlan(_Plan):
    """Batches of ``batch_size`` out of ``items`` items in a fresh order every epoch; the last one may be smaller."""

    def __init__(
        self,
        items: int,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        mixture: Mixture | None = None,
        windows: ShardWindows | None = None,
    ) -> None:
        assert items > 0, "no items to batch"
        super().__init__([(np.arange(items), batch_size)], shuffle=shuffle, seed=seed, mixture=mixture, windows=windows)
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
