"""The state of the language model: keys and values of rows that may differ in length."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, TypeVar

import torch
from torch import Tensor

_LEAST_ROOM = 64
_State = TypeVar("_State", bound="LMState")


class LayerCache:
    """One layer's keys and values, (B, kv_heads, W, head_dim) each, in buffers with room for more columns."""

    def __init__(self) -> None:
        self.length = 0
        self._keys: Tensor | None = None
        self._values: Tensor | None = None

    @property
    def keys(self) -> Tensor:
        """Keys of all columns, a view."""
        assert self._keys is not None, "nothing has been seen"
        return self._keys[:, :, : self.length]

    @property
    def values(self) -> Tensor:
        """Values of all columns, a view."""
        assert self._values is not None, "nothing has been seen"
        return self._values[:, :, : self.length]

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append the columns of ``keys`` and ``values``; returns all."""
        begin, self.length = self.length, self.length + keys.shape[2]
        self._keys, self._values = _appended(self._keys, keys, begin), _appended(self._values, values, begin)
        return self.keys, self.values


class KVCache:
    """The layers of a `Backbone`."""

    def __init__(self) -> None:
        self.layers: list[LayerCache] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append columns to layer ``layer_idx``, which may be the next that does not exist yet; returns all of its keys and values."""
        return self.layer(layer_idx).extend(keys, values)

    def layer(self, number: int) -> LayerCache:
        """The cache of layer ``number``, which may be the next that does not exist yet."""
        if number == len(self.layers):
            self.layers.append(LayerCache())
        return self.layers[number]

    def get_seq_length(self) -> int:
        """Columns seen so far."""
        return self.layers[0].length if self.layers else 0


def _appended(room: Tensor | None, new: Tensor, begin: int) -> Tensor:
    """``room`` with ``new`` written behind its first ``begin`` columns; a larger copy where it does not fit."""
    if room is None:
        return new
    end = begin + new.shape[2]
    if torch.is_grad_enabled():
        return torch.cat([room[:, :, :begin], new], dim=2)  # what a gradient may pass through is not written over
    foreign = room.is_inference() and not torch.is_inference_mode_enabled()
    if end > room.shape[2] or foreign:
        # Half as much again: copies a position stay bounded however long the speech gets.
        larger = room.new_empty(*room.shape[:2], max(_LEAST_ROOM, end + end // 2), room.shape[3])
        larger[:, :, :begin] = room[:, :, :begin]
        room = larger
    room[:, :, begin:end] = new
    return room


class LMState(ABC):
    """The past of B rows that ``KalleLM.step`` needs, which may differ in length. Each backbone has a kind of its own.

    A step extends a state in place; ``join`` and ``select`` copy, or return a state that needs no change.
    """

    @property
    @abstractmethod
    def lengths(self) -> tuple[int, ...]:
        """Positions of each row seen so far."""

    @property
    def rows(self) -> int:
        """Number of rows B; 0 before the first position."""
        return len(self.lengths)

    @property
    def length(self) -> int:
        """Positions of the longest row."""
        return max(self.lengths, default=0)

    @staticmethod
    def join(states: Sequence[_State]) -> _State:
        """One state with the rows of all ``states`` in order, which are of one kind and have seen something each."""
        assert states, "join of no states"
        assert all(state.length for state in states), "join of states without positions"
        return states[0] if len(states) == 1 else states[0]._joined(states)

    def select(self, rows: Sequence[int]) -> Self:
        """The given rows in the given order."""
        assert rows, "select of no rows"
        return self if list(rows) == list(range(self.rows)) else self._selected(rows)

    @abstractmethod
    def _joined(self, states: Sequence[Self]) -> Self:
        """``join`` of more than one, of which this is the first."""

    @abstractmethod
    def _selected(self, rows: Sequence[int]) -> Self:
        """``select`` of other rows than all in their order."""


@dataclass(frozen=True)
class CachedState(LMState):
    """Keys and values of every layer, as a `Backbone` keeps them.

    Rows end in the same column; a shorter row is padded on its left, so that a new position of every row goes into the
    same new column. W columns. ``select`` leaves out the columns that no row needs.
    """

    cache: KVCache
    """Per layer, keys and values of shape (B, kv_heads, W, head_dim)."""
    padding: Tensor | None = None
    """(B,) int64: columns at the left of each row that hold nothing; None where no row has any."""

    @property
    def length(self) -> int:
        """Columns W: positions of the longest row."""
        return self.cache.get_seq_length()

    @property
    def rows(self) -> int:
        """Number of rows B; 0 before the first position."""
        return len(self._layers()[0][0]) if self.length else 0

    @property
    def lengths(self) -> tuple[int, ...]:
        """Positions of each row seen so far."""
        padding = [0] * self.rows if self.padding is None else self.padding.tolist()
        return tuple(self.length - left for left in padding)

    def attention_mask(self, new: int) -> Tensor | None:
        """(B, W + new) bool, True where a column is valid once ``new`` more exist; None where all are."""
        if self.padding is None:
            return None
        return torch.arange(self.length + new, device=self.padding.device) >= self.padding[:, None]

    def position_ids(self, new: int) -> Tensor | None:
        """(B, new) int64, the positions of the next ``new`` columns counted from each row's own start; None where all rows agree."""
        if self.padding is None:
            return None
        return torch.arange(self.length, self.length + new, device=self.padding.device) - self.padding[:, None]

    def _joined(self, states: Sequence[CachedState]) -> CachedState:
        width = max(state.length for state in states)
        cache = KVCache()
        for number, layers in enumerate(zip(*(state._layers() for state in states), strict=True)):
            keys, values = (_align_right(parts, width) for parts in zip(*layers, strict=True))
            cache.update(keys, values, number)
        return self._padded([length for state in states for length in state.lengths], cache)

    def _selected(self, rows: Sequence[int]) -> CachedState:
        every = self.lengths
        lengths = tuple(every[row] for row in rows)
        width = max(lengths)
        cache = KVCache()
        for number, (keys, values) in enumerate(self._layers()):
            index = torch.tensor(list(rows), device=keys.device)
            cache.update(keys[index, :, -width:], values[index, :, -width:], number)
        return self._padded(lengths, cache)

    @classmethod
    def _padded(cls, lengths: Sequence[int], cache: KVCache) -> CachedState:
        state = cls(cache)
        padding = [state.length - length for length in lengths]
        return cls(cache, torch.tensor(padding, device=state._layers()[0][0].device)) if any(padding) else state

    def _layers(self) -> list[tuple[Tensor, Tensor]]:
        return [(layer.keys, layer.values) for layer in self.cache.layers]


def _align_right(parts: Sequence[Tensor], width: int) -> Tensor:
    """``parts`` (B_i, heads, W_i, head_dim) below one another (sum B_i, heads, width, head_dim), zeros at the left."""
    joined = parts[0].new_zeros(sum(len(part) for part in parts), parts[0].shape[1], width, parts[0].shape[3])
    row = 0
    for part in parts:
        joined[row : row + len(part), :, width - part.shape[2] :] = part
        row += len(part)
    return joined
