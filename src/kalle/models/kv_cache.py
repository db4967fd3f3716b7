"""Keys and values of the positions that a `Backbone` has seen."""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_ROOM = 64


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
    """The layers of a `Backbone`; it has the three names of transformers' DynamicCache that `LMState` needs."""

    def __init__(self) -> None:
        self.layers: list[LayerCache] = []

    def update(self, keys: Tensor, values: Tensor, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append columns to layer ``layer_idx``, which may be the next that does not exist yet; returns all of its keys and values."""
        if layer_idx == len(self.layers):
            self.layers.append(LayerCache())
        return self.layers[layer_idx].extend(keys, values)

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
