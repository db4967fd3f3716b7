"""The anti-aliased SnakeBeta in one pass over memory on a CPU, compiled by numba the first time and kept on the disk since.

`PreparedActivation` says what is computed and is the reference. Signals lie channels-last: with C channels the same channel of the next
sample is C values further, so that the filters are sums of shifted rows of a flat array, whatever C is.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import carray, cfunc, from_dtype, njit, types
from numba.extending import intrinsic
from torch import Tensor

REACH = 5
DTYPES = (torch.float32, torch.bfloat16)
_STRIP_VALUES = 4096
"""Values that are computed together: their intermediate results stay in a core's caches."""
_ITEM_VALUES = 1 << 16
"""Values, about, that a thread takes at once; the five columns at its seam, computed twice, are few beside them."""
_LEAST_VALUES = 1 << 15
"""Values for which another thread is worth its start."""

_WORK = np.dtype(
    [
        (name, np.int64)
        for name in (
            # Addresses: of two counters, items and threads that have begun; of the signal's two parts, of the result, of the parameters.
            *("counters", "x0", "x1", "y", "filters", "alpha", "beta", "scratch"),
            # Values from a row of the batch to the next, and those of one thread's scratch memory.
            *("x0_stride", "x1_stride", "y_stride", "scratch_stride"),
            # Samples: of the first part and of both, the first and the last wanted, of an item, computed together.
            *("first", "length", "begin", "end", "rows", "strip"),
            *("batch", "channels", "items"),
            # Flags: whether the signal begins and ends here, whether the input and the result are in bfloat16.
            *("starts", "ends", "x_half", "y_half"),
        )
    ]
)

# sin²(πr) = q·p(q) with q = r² of at most 1/4: a least-squares fit at Chebyshev's points, exact to 3e-8 before rounding.
_P0, _P1, _P2, _P3, _P4, _P5 = (
    np.float32(value)
    for value in (9.869602862421694, -32.469578336179836, 42.725338650911084, -30.08560804526965, 12.989535847552718, -3.2713890477687664)
)


_intrinsic: Any = intrinsic
# "contract" lets a product and a sum be one instruction; nothing else that could change a value is allowed.
_options: Any = {"fastmath": {"contract"}, "error_model": "numpy"}
_jit: Any = njit(**_options)


@_intrinsic
def _pointer(_: Any, address: Any, like: Any) -> Any:
    """The int64 ``address`` as a pointer to values of the kind of ``like``: unlike an array's, its indices are never wrapped."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(like)(address, like), generate


@_intrinsic
def _next(_: Any, address: Any) -> Any:
    """The int64 at ``address``, which is one more for whoever asks next, whatever its thread."""

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], word.as_pointer()), word(1), "seq_cst")

    return types.int64(types.int64), generate


@_jit
def _snake(u: Any, alpha: Any, beta: Any) -> Any:
    """u + sin²(αu)/β for ``alpha`` α/π and ``beta`` 1/β."""
    turns = u * alpha
    r = turns - np.rint(turns)
    q = r * r
    return u + beta * (q * (_P0 + q * (_P1 + q * (_P2 + q * (_P3 + q * (_P4 + q * _P5))))))


@_jit
def _upwards(x: Any, count: int, row: int, f: Any, alpha: Any, beta: Any, v0: Any, v1: Any) -> None:
    """The two values between the middle ones of the six samples from each of ``count`` on, through the SnakeBeta."""
    a0, a1, a2, a3, a4, a5 = f[0], f[1], f[2], f[3], f[4], f[5]
    b0, b1, b2, b3, b4, b5 = f[6], f[7], f[8], f[9], f[10], f[11]
    for i in range(count):
        x0, x1, x2, x3, x4, x5 = x[i], x[i + row], x[i + 2 * row], x[i + 3 * row], x[i + 4 * row], x[i + 5 * row]
        v0[i] = _snake(a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5, alpha[i], beta[i])
        v1[i] = _snake(b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5, alpha[i], beta[i])


@_jit
def _downwards(v0: Any, v1: Any, count: int, row: int, f: Any, y: Any) -> None:
    """One sample of every twelve values from each of ``count`` on."""
    a0, a1, a2, a3, a4, a5 = f[12], f[13], f[14], f[15], f[16], f[17]
    b0, b1, b2, b3, b4, b5 = f[18], f[19], f[20], f[21], f[22], f[23]
    for i in range(count):
        j, k, m, n, o = i + row, i + 2 * row, i + 3 * row, i + 4 * row, i + 5 * row
        low = a0 * v0[i] + a1 * v0[j] + a2 * v0[k] + a3 * v0[m] + a4 * v0[n] + a5 * v0[o]
        y[i] = low + (b0 * v1[i] + b1 * v1[j] + b2 * v1[k] + b3 * v1[m] + b4 * v1[n] + b5 * v1[o])


@_jit
def _copy(source: Any, target: Any, count: int) -> None:
    for i in range(count):
        target[i] = source[i]


@_jit
def _widened(source: Any, target: Any, count: int) -> None:
    """bfloat16 to float32, both as integers."""
    for i in range(count):
        target[i] = np.uint32(source[i]) << np.uint32(16)


@_jit
def _rounded(source: Any, target: Any, count: int) -> None:
    """float32 to the nearest bfloat16, both as integers; of two equally near the even one."""
    for i in range(count):
        bits = source[i]
        target[i] = np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@_jit
def _gather(w: Any, b: int, at: int, rows: int, target: int) -> None:
    """``rows`` samples of the signal from ``at`` on to the address ``target``; the first and the last go on for ever."""
    c = w.channels
    done = 0
    while done < rows:
        t = min(max(at + done, 0), w.length - 1)
        # As many samples as lie one after the other in one part.
        run = 1 if at + done < 0 or at + done >= w.length else min((w.first if t < w.first else w.length) - t, rows - done)
        part, offset = (w.x0, b * w.x0_stride + t * c) if t < w.first else (w.x1, b * w.x1_stride + (t - w.first) * c)
        to = target + 4 * done * c
        if w.x_half:
            _widened(_pointer(part + 2 * offset, np.uint16(0)), _pointer(to, np.uint32(0)), run * c)
        else:
            _copy(_pointer(part + 4 * offset, np.float32(0)), _pointer(to, np.float32(0)), run * c)
        done += run


@_jit
def _source(w: Any, b: int, at: int, rows: int, room: int) -> int:
    """The address of ``rows`` samples of the signal from ``at`` on: where they lie, or ``room``, where they have been put."""
    if not w.x_half and at >= 0:
        if at + rows <= w.first:
            return w.x0 + 4 * (b * w.x0_stride + at * w.channels)
        if at >= w.first and at + rows <= w.length:
            return w.x1 + 4 * (b * w.x1_stride + (at - w.first) * w.channels)
    _gather(w, b, at, rows, room)
    return room


@_jit
def _repeat_edges(w: Any, base: int, begin: int, end: int, v0: Any, v1: Any) -> None:
    """Of the columns from ``begin`` to ``end``, v[0] being column ``base``: those that see the signal's first or last value repeated."""
    c = w.channels
    if w.starts and begin <= 2:
        kept = (2 - base) * c
        for column in range(begin, 3):
            at = (column - base) * c
            for i in range(c):
                value = v1[kept + i]
                v0[at + i] = value
                v1[at + i] = value
    last = w.end + 2
    if w.ends and end > last:
        kept = (last - base) * c
        for column in range(max(begin, last), end):
            at = (column - base) * c
            for i in range(c):
                value = v0[kept + i]
                v1[at + i] = value
                v0[at + i] = value


@_jit
def _item(w: Any, b: int, t: int, end: int, scratch: int) -> None:
    """The samples from ``t`` to ``end`` of row ``b``."""
    c, kind = w.channels, np.float32(0)
    columns = w.strip + REACH
    alpha = _pointer(scratch, kind)
    beta = _pointer(scratch + 4 * columns * c, kind)
    v0_at, v1_at = scratch + 8 * columns * c, scratch + 12 * columns * c
    y_at, room = scratch + 16 * columns * c, scratch + 20 * columns * c
    v0, v1, filters = _pointer(v0_at, kind), _pointer(v1_at, kind), _pointer(w.filters, kind)
    front = REACH if w.starts else 0
    known = 0
    while t < end:
        count = min(w.strip, end - t)
        new = count + REACH - known
        begin = t + known
        x = _pointer(_source(w, b, begin - front, new + REACH, room), kind)
        _upwards(x, new * c, c, filters, alpha, beta, _pointer(v0_at + 4 * known * c, kind), _pointer(v1_at + 4 * known * c, kind))
        _repeat_edges(w, t, begin, begin + new, v0, v1)
        offset = b * w.y_stride + (t - w.begin) * c
        if w.y_half:
            _downwards(v0, v1, count * c, c, filters, _pointer(y_at, kind))
            _rounded(_pointer(y_at, np.uint32(0)), _pointer(w.y + 2 * offset, np.uint16(0)), count * c)
        else:
            _downwards(v0, v1, count * c, c, filters, _pointer(w.y + 4 * offset, kind))
        _copy(_pointer(v0_at + 4 * count * c, kind), v0, REACH * c)
        _copy(_pointer(v1_at + 4 * count * c, kind), v1, REACH * c)
        known = REACH
        t += count


_kernel: Any = cfunc(types.void(types.CPointer(from_dtype(_WORK))), cache=True, **_options)


@_kernel
def _work(pointer: Any) -> None:
    """Take items until none is left. Called by any number of threads with the same ``pointer``."""
    w = carray(pointer, 1)[0]
    c, kind = w.channels, np.float32(0)
    scratch = w.scratch + 4 * _next(w.counters + 8) * w.scratch_stride
    columns = w.strip + REACH
    for column in range(columns):
        _copy(_pointer(w.alpha, kind), _pointer(scratch + 4 * column * c, kind), c)
        _copy(_pointer(w.beta, kind), _pointer(scratch + 4 * (columns + column) * c, kind), c)
    while True:
        item = _next(w.counters)
        if item >= w.items * w.batch:
            break
        t = w.begin + item % w.items * w.rows
        _item(w, item // w.items, t, min(t + w.rows, w.end), scratch)


class FusedActivation:
    """A `PreparedActivation` for signals that need no gradient."""

    def __init__(self, up: Tensor, down: Tensor, alpha: Tensor, beta: Tensor) -> None:
        """``up`` and ``down`` (2, 6): the filters of each of the two values; ``alpha``, ``beta`` (C,): α/π and 1/β. All fp32."""
        self.filters = torch.cat([up.flatten(), down.flatten()]).contiguous()
        self.alpha, self.beta, self.channels = alpha.contiguous(), beta.contiguous(), len(alpha)

    @staticmethod
    def takes(past: Tensor, parts: Sequence[Tensor]) -> bool:
        """Whether ``after`` can be asked for these."""
        found = {part.dtype for part in parts if part.shape[-1]}
        return past.dtype in DTYPES and len(found) == 1 and found <= set(DTYPES)

    def after(self, past: Tensor, parts: Sequence[Tensor], starts: bool, ends: bool, sent: int) -> Tensor:
        """As `PreparedActivation.after`, for at most two ``parts``."""
        samples = [_samples(part) for part in parts if part.shape[-1]]
        assert len(samples) <= 2, len(samples)
        length = sum(part.shape[1] for part in samples)
        begin, end = sent, length - REACH * (2 - starts - ends)
        batch, channels, _, room = past.shape
        whole = past.new_empty(batch, room + end - begin, channels)
        whole[:, :room] = past[:, :, 0].transpose(1, 2)
        values = (end - begin) * channels
        threads = min(torch.get_num_threads(), math.ceil(values * batch / _LEAST_VALUES))
        strip = max(4, _STRIP_VALUES // channels)
        # A multiple of the threads, so that none waits for another's last item.
        items = threads * math.ceil(values / _ITEM_VALUES / threads)
        rows = math.ceil((end - begin) / items)
        room_values = 5 * (strip + REACH) * channels + (strip + 2 * REACH) * channels
        scratch = torch.empty(threads * room_values, dtype=torch.float32)
        counters = np.zeros(2, np.int64)
        first, second = samples[0], samples[-1]
        work = np.array(
            (
                *(counters.ctypes.data, first.data_ptr(), second.data_ptr(), whole.data_ptr() + room * channels * whole.element_size()),
                *(self.filters.data_ptr(), self.alpha.data_ptr(), self.beta.data_ptr(), scratch.data_ptr()),
                *(first.stride(0), second.stride(0), whole.stride(0), room_values),
                *(first.shape[1], length, begin, end, rows, strip),
                *(batch, channels, math.ceil((end - begin) / rows)),
                *(starts, ends, first.dtype == torch.bfloat16, past.dtype == torch.bfloat16),
            ),
            dtype=_WORK,
        )
        _run(work.ctypes.data, threads)
        return whole[:, None].permute(0, 3, 1, 2)


def _samples(x: Tensor) -> Tensor:
    """(B, C, 1, n) as (B, n, C), each sample's channels behind those of the one before; a copy where they lie otherwise."""
    samples = x[:, :, 0].transpose(1, 2)
    channels = samples.shape[2]
    together = (channels == 1 or samples.stride(2) == 1) and (samples.shape[1] == 1 or samples.stride(1) == channels)
    return samples if together else samples.contiguous()


def _run(work: int, threads: int) -> None:
    """The kernel on ``work`` by so many ``threads``: those of torch, whose own loops wait spinning and would disturb any others."""
    if threads == 1:
        _call()(work)
        return
    team = _torch_team()
    if team is not None:
        team(_work.address, work, threads, 0)
        return
    waiting = [_pool(threads).submit(_call(), work) for _ in range(threads - 1)]
    _call()(work)
    for one in waiting:
        one.result()


@cache
def _call() -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_work.address)


@cache
def _torch_team() -> Any:
    """``GOMP_parallel`` of the OpenMP library that torch uses, which calls a function in each of its threads; None without one."""
    try:
        team = ctypes.CDLL(torch._C.__file__).GOMP_parallel
    except (OSError, AttributeError):
        return None
    team.argtypes, team.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return team


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, "kalle-activation")
