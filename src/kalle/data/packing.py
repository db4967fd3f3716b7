"""Batches by the sum of their utterances' positions: for packed rows, where padding costs nothing and length needs no company."""

from __future__ import annotations

import heapq
import math

import numpy as np

from kalle.data.mixing import Mixture
from kalle.data.plans import ShardWindows, equal_buckets
from kalle.data.sampling import numpy_generator

_LENGTH_GROUPS = 30
"""A mixture draws from groups of similar length, so that no draw can hold much more than another."""


class PackedPlan:
    """Batches whose utterances have at most ``max_positions`` positions together, of any lengths, in a fresh mix every epoch.

    An epoch goes through the items in random order and puts each into the batch that holds least so far. With K batches of items
    no longer than m the fullest then holds at most (total - m) / K + m positions, so the K chosen here keeps the budget whatever the
    order; every epoch has K batches, nearly equally full, and visits every item exactly once, or as often as ``mixture`` says. With
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
        mixture: Mixture | None = None,
        windows: ShardWindows | None = None,
    ) -> None:
        assert positions.size, "no items to batch"
        assert shuffle or (mixture is None and windows is None), "only a shuffled epoch can be mixed or go by shards"
        longest = int(positions.max())
        assert longest <= max_positions, (longest, max_positions)
        # A batch of n items that each count for at least 1 / max_items of the budget has no more than max_items.
        least = 1 if max_items is None else math.ceil(max_positions / max_items)
        self._sizes = np.maximum(positions, least)
        self.shuffle, self.seed, self.windows = shuffle, seed, windows
        groups = equal_buckets(self._sizes, _LENGTH_GROUPS)
        self._draws = None if mixture is None else mixture.draws(groups)
        visits, total = len(positions), int(self._sizes.sum())
        if self._draws is not None:
            counts = [len(draw(numpy_generator("count"))) for draw in self._draws]
            visits = sum(counts)
            total = sum(count * int(self._sizes[group].max()) for count, group in zip(counts, groups, strict=True) if count)
        # A run of the order may hold a whole visit more than its share, a balanced batch does not.
        spared = 0 if windows is not None else int(self._sizes.max())
        self.batches = _batches_needed(total - spared, max_positions - int(self._sizes.max()), visits)
        self.filled = total / (self.batches * max_positions)
        """Share of the budget that batches hold on average."""

    def __call__(self, epoch: int) -> list[list[int]]:
        """The batches of ``epoch`` as lists of item indices (see `Mixture` for those beyond N)."""
        generator = numpy_generator("batches", self.seed, epoch)
        visits = np.arange(len(self._sizes)) if self._draws is None else np.concatenate([draw(generator) for draw in self._draws])
        if self.shuffle:
            visits = generator.permutation(visits)
        if self.windows is None:
            return self._balanced(visits)
        window = self.windows.of_items(numpy_generator("windows", self.seed, epoch))
        return self._cut(visits[np.argsort(window[visits % len(window)], kind="stable")])

    def _balanced(self, visits: np.ndarray) -> list[list[int]]:
        """Each visit in turn into the batch that holds least."""
        batches: list[list[int]] = [[] for _ in range(self.batches)]
        emptiest = [(0, batch) for batch in range(self.batches)]
        sizes = self._sizes[visits % len(self._sizes)].tolist()
        for visit, size in zip(visits.tolist(), sizes, strict=True):
            filled, batch = emptiest[0]
            batches[batch].append(visit)
            heapq.heapreplace(emptiest, (filled + size, batch))
        return batches

    def _cut(self, visits: np.ndarray) -> list[list[int]]:
        """Runs of nearly equal sums, in order; none is empty."""
        sizes = self._sizes[visits % len(self._sizes)]
        before = np.cumsum(sizes) - sizes
        numbers = np.arange(self.batches - 1)
        starts = np.searchsorted(before, (numbers + 1) * int(sizes.sum()) / self.batches)
        # Behind a visit longer than a share the next runs take one visit each, and so do the last ones if need be.
        starts = np.maximum(np.maximum.accumulate(starts - numbers) + numbers, numbers + 1)
        starts = np.minimum(starts, len(visits) - (self.batches - 1) + numbers)
        return [run.tolist() for run in np.split(visits, starts)]


def _batches_needed(total: int, room: int, visits: int) -> int:
    """The least K with total / K <= room; with a batch for each visit nothing can overflow."""
    if room == 0:
        return visits if total else 1
    return min(visits, max(1, math.ceil(total / room)))
