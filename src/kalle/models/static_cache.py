"""A backbone whose step is the same operations on the same memory every time, so that a CUDA graph can replay it.

Keys and values lie in buffers of fixed sizes: rows and columns in steps (`rows_of`, `columns_of`), a row's own positions from column 0 on.
A step embeds a frame, runs every layer and predicts; on CUDA it is recorded once for each buffer and then replayed. Elsewhere, and with
``graph`` off, the same function runs as it is. Prompts are read as a `Backbone` reads them.

B rows, W new positions, H hidden size, D latent dimensions.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from kalle.models.backbone import Backbone, BackboneConfig
from kalle.models.lm_state import KVCache, LMState


class _Rows(Protocol):
    """Tensors with one row for each of the model's, indexed like one."""

    def __getitem__(self, index: Any, /) -> Any: ...


T = TypeVar("T", bound=_Rows)
LEAST_COLUMNS = 256
_KEPT = 2
"""Buffers of one size that are kept for the next state: a batch that changes copies from one into the other."""
_WARM_UPS = 3
"""Runs before a capture, in which libraries choose their kernels and allocate their workspaces."""


def rows_of(rows: int) -> int:
    """Rows of the buffer for ``rows``: the next power of 2."""
    return 1 << (rows - 1).bit_length()


def columns_of(positions: int) -> int:
    """Columns of the buffer for ``positions``: `LEAST_COLUMNS`, or twice, four times, … as many."""
    return LEAST_COLUMNS << max(0, (-(-positions // LEAST_COLUMNS) - 1).bit_length())


class StaticCache:
    """Keys and values of every layer in buffers that never move, and the recorded step that works on them."""

    def __init__(self, backbone: StaticBackbone, rows: int, columns: int) -> None:
        config, like = backbone.config, backbone.embed_tokens.weight
        shape = (config.num_hidden_layers, rows, config.num_key_value_heads, columns, config.head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.cosine, self.sine = backbone.rotary_emb.span(like, 0, columns)
        """(columns, head_dim) each. Kept here, because the table that they are part of may be replaced by a larger one."""
        self.rows, self.columns = (torch.arange(size, device=like.device) for size in (rows, columns))
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=like.device)
        """(rows,) positions of each row on the device, where a step counts on; in a row that nothing uses as well."""
        self.known: tuple[int, ...] = ()
        """The same on the host, of the rows in use."""
        self.replay: Callable[[Tensor], Any] | None = None
        """From frames (rows, D) to the prediction: the recorded step, once there is one."""

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.keys.shape[1], self.keys.shape[3]

    def set_lengths(self, lengths: tuple[int, ...]) -> None:
        """Let the first rows have ``lengths``, and the rest 0."""
        if lengths != self.known:
            self.lengths.copy_(torch.tensor([*lengths, *[0] * (len(self.lengths) - len(lengths))]))
            self.known = lengths


@dataclass(frozen=True)
class _LayerColumn:
    """One layer's buffers in a step, which writes ``at`` (rows,) one column of each row."""

    keys: Tensor
    values: Tensor
    at: Tensor

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``keys`` and ``values`` (rows, kv_heads, 1, head_dim); returns all columns, of which the mask hides those behind."""
        index = self.at[:, None, None, None].expand_as(keys)
        return self.keys.scatter_(2, index, keys), self.values.scatter_(2, index, values)


class _Pool:
    """Buffers that no state uses any more, with their recorded steps, by size. A copy of a model begins with none."""

    def __init__(self) -> None:
        self._free: dict[tuple[int, int], list[StaticCache]] = {}

    def __deepcopy__(self, memo: Any) -> _Pool:
        return _Pool()

    def take(self, backbone: StaticBackbone, rows: int, columns: int) -> _Lease:
        """A buffer of that size for as long as the lease lives."""
        like, free = backbone.embed_tokens.weight, self._free.setdefault((rows, columns), [])
        free[:] = [cache for cache in free if (cache.keys.dtype, cache.keys.device) == (like.dtype, like.device)]
        lease = _Lease(free.pop() if free else StaticCache(backbone, rows, columns))
        weakref.finalize(lease, self._give_back, lease.cache)
        return lease

    def _give_back(self, cache: StaticCache) -> None:
        free = self._free.setdefault(cache.size, [])
        if len(free) < _KEPT:
            free.append(cache)


@dataclass(frozen=True, eq=False)
class _Lease:
    """The use of a buffer: it goes back to its pool with the last state that holds this."""

    cache: StaticCache


Layers = tuple[tuple[Tensor, Tensor], ...]


@dataclass(frozen=True, eq=False)
class StaticState(LMState):
    """Rows in a buffer, or as a prompt left them. A step writes behind ``lengths``, so that of several copies only the newest goes on."""

    backbone: StaticBackbone
    lengths: tuple[int, ...] = ()
    fresh: Layers = field(default=(), repr=False)
    """Keys and values (B, kv_heads, W, head_dim) of each layer, of rows of one length that no step has seen yet."""
    lease: _Lease | None = field(default=None, repr=False)

    def in_buffer(self, room: int) -> StaticState:
        """This state in a buffer with ``room`` more columns."""
        if self.lease is not None and self.lease.cache.size[1] >= self.length + room:
            return self
        return self._copied([self], [range(self.rows)], room)

    def _joined(self, states: Sequence[Self]) -> Self:
        return self._copied(states, [range(state.rows) for state in states], 1)

    def _selected(self, rows: Sequence[int]) -> Self:
        return self._copied([self], [rows], 1)

    def _copied(self, states: Sequence[Self], chosen: Sequence[Sequence[int]], room: int) -> Self:
        """The ``chosen`` rows of each of ``states`` below one another in a buffer of their own."""
        lengths = tuple(state.lengths[row] for state, rows in zip(states, chosen, strict=True) for row in rows)
        lease = self.backbone.buffer(len(lengths), max(lengths) + room)
        begin = 0
        for state, rows in zip(states, chosen, strict=True):
            width = max(state.lengths[row] for row in rows)
            index = torch.tensor(list(rows), device=lease.cache.keys.device)
            for number, layer in enumerate(state.layers()):
                for target, source in zip((lease.cache.keys, lease.cache.values), layer, strict=True):
                    target[number, begin : begin + len(rows), :, :width] = source[index, :, :width]
            begin += len(rows)
        return replace(self, lengths=lengths, fresh=(), lease=lease)

    def layers(self) -> Layers:
        """Keys and values of each layer, with columns behind the rows' own where they lie in a buffer."""
        if self.lease is None:
            return self.fresh
        return tuple(zip(self.lease.cache.keys, self.lease.cache.values, strict=True))


class StaticBackbone(Backbone):
    """A `Backbone` with the same weights and results; its states are `StaticState`. For inference, from one thread at a time."""

    def __init__(self, config: BackboneConfig, graph: bool = False) -> None:
        """``graph`` records steps as CUDA graphs; it needs the weights to be on CUDA and to stay where they are."""
        super().__init__(config)
        self.graph = graph
        self._pool = _Pool()

    def new_state(self) -> StaticState:  # type: ignore[override]
        """The state before the first position."""
        return StaticState(self)

    def advance(self, embeddings: Tensor, state: StaticState) -> tuple[Tensor, StaticState]:  # type: ignore[override]
        """As ``Backbone.advance``. A beginning is read at once, what follows position by position."""
        rows, new, _ = embeddings.shape
        if not state.lengths:
            cache = KVCache()
            hidden = self(embeddings, past_key_values=cache).last_hidden_state[:, -1]
            fresh = tuple((layer.keys, layer.values) for layer in cache.layers)
            return hidden, replace(state, lengths=(new,) * rows, fresh=fresh)
        for x in embeddings.split(1, dim=1):
            hidden, state = self._append(x[:, 0], state, lambda padded, cache: self._layers(padded[:, None], cache), graph=False)
        return hidden, state

    def step(  # type: ignore[override]
        self, z: Tensor, state: StaticState, embed: Callable[[Tensor], Tensor], head: Callable[[Tensor], T]
    ) -> tuple[T, StaticState]:
        """As ``Backbone.step``, all of it recorded where ``graph`` is on; ``embed`` and ``head`` are the same every time."""
        return self._append(z, state, lambda frames, cache: head(self._layers(embed(frames[:, None]), cache)), self.graph)

    def buffer(self, rows: int, positions: int) -> _Lease:
        """A buffer with room for ``rows`` of ``positions``."""
        return self._pool.take(self, rows_of(rows), columns_of(positions))

    def _append(self, x: Tensor, state: StaticState, run: Callable[[Tensor, StaticCache], T], graph: bool) -> tuple[T, StaticState]:
        """``run`` on the rows of ``x`` (B, any), padded to those of the buffer, and the state with one more position."""
        state = state.in_buffer(1)
        assert state.lease is not None
        assert len(x) == state.rows, f"{len(x)} rows for a state of {state.rows}"
        cache = state.lease.cache
        cache.set_lengths(state.lengths)
        padded = F.pad(x.to(cache.keys.device), (0, 0, 0, cache.size[0] - len(x)))
        if not graph:
            result = run(padded, cache)[: len(x)]
        else:
            if cache.replay is None:
                cache.replay = _recorded(lambda frames: run(frames, cache), padded, cache)
            result = cache.replay(padded)[cache.rows[: len(x)]]  # a copy: the next replay writes over what it gave
        cache.known = tuple(length + 1 for length in state.lengths)
        return result, replace(state, lengths=cache.known)

    def _layers(self, x: Tensor, cache: StaticCache) -> Tensor:
        """The hidden state (rows, H) of one position ``x`` (rows, 1, H) behind each row of ``cache``."""
        at = cache.lengths.clamp(max=cache.size[1] - 1)  # a row that nothing uses counts on for ever
        rotary = cache.cosine[at][:, None, None], cache.sine[at][:, None, None]
        mask = (cache.columns <= at[:, None])[:, None, None]
        for layer, keys, values in zip(self.layers, cache.keys, cache.values, strict=True):
            x = layer(x, rotary, mask, _LayerColumn(keys, values, at))
        cache.lengths.add_(1)
        hidden: Tensor = self.norm(x)[:, -1]
        return hidden


def _recorded(run: Callable[[Tensor], T], x: Tensor, cache: StaticCache) -> Callable[[Tensor], T]:
    """``run`` as a CUDA graph, with inputs like ``x``; its results are written over by the next call. Changes no state."""
    given, lengths = x.clone(), cache.lengths.clone()
    with torch.cuda.device(x.device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                run(given)
                cache.lengths.copy_(lengths)  # what was written behind them is not read before it is written again
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may decode meanwhile
            result = run(given)

    def replay(inputs: Tensor) -> T:
        given.copy_(inputs)
        graph.replay()
        return result

    return replay
