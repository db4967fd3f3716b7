"""Batches by the sum of their utterances' positions: for packed rows, where padding costs nothing and length needs no company."""

from __future__ import annotations

import heapq
import math

import numpy as np

from kalle.data.sampling import numpy_generator


class PackedPlan:
    """Batches whose utterances have at most ``max_positions`` positions together, of any lengths, in a fresh mix every epoch.

    An epoch goes through the items in random order and puts each into the batch that holds least so far. With K batches of items
    no longer than m the fullest then holds at most (total - m) / K + m positions, so the K chosen here keeps the budget whatever the
    order; every epoch has K batches, nearly equally full, and visits every item exactly once.

    ``positions`` (N,) int64 is the length of each item, none longer than ``max_positions``. ``max_items`` bounds the items of a batch.
    """

    def __init__(
        self, positions: np.ndarray, *, max_positions: int, max_items: int | None = None, shuffle: bool = True, seed: int = 0
    ) -> None:
        assert positions.size, "no items to batch"
        longest = int(positions.max())
        assert longest <= max_positions, (longest, max_positions)
        # A batch of n items that each count for at least 1 / max_items of the budget has no more than max_items.
        least = 1 if max_items is None else math.ceil(max_positions / max_items)
        self._sizes = np.maximum(positions, least)
        self.seed, self.shuffle = seed, shuffle
        self.batches = _batches_needed(int(self._sizes.sum()), int(self._sizes.max()), max_positions, len(positions))

    def __call__(self, epoch: int) -> list[list[int]]:
        """The batches of ``epoch`` as lists of item indices."""
        order = np.arange(len(self._sizes))
        if self.shuffle:
            order = numpy_generator("batches", self.seed, epoch).permutation(order)
        batches: list[list[int]] = [[] for _ in range(self.batches)]
        emptiest = [(0, batch) for batch in range(self.batches)]
        for item in order.tolist():
            filled, batch = emptiest[0]
            batches[batch].append(item)
            heapq.heapreplace(emptiest, (filled + int(self._sizes[item]), batch))
        return batches


def _batches_needed(total: int, longest: int, budget: int, items: int) -> int:
    """The least K with (total - longest) / K + longest <= budget; with a batch for each item nothing can overflow."""
    rest, room = total - longest, budget - longest
    if room == 0:
        return items if rest else 1
    return min(items, max(1, math.ceil(rest / room)))
