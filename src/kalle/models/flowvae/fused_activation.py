"""The anti-aliased SnakeBeta in one pass over memory on a CPU, compiled by numba the first time and kept on the disk since.

To decode there is `FusedActivation`; `PreparedActivation` says what is computed and is the reference. Signals lie channels-last: with C
channels the same channel of the next sample is C values further, so that the filters are sums of shifted rows of a flat array, whatever
C is. To train there are `forward` and `backward`, on signals as the layers have them, a channel's samples one behind the other;
`kalle.models.flowvae.training_activation` says what is computed.
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
        _run(_work, work.ctypes.data, threads)
        return whole[:, None].permute(0, 3, 1, 2)


def _samples(x: Tensor) -> Tensor:
    """(B, C, 1, n) as (B, n, C), each sample's channels behind those of the one before; a copy where they lie otherwise."""
    samples = x[:, :, 0].transpose(1, 2)
    channels = samples.shape[2]
    together = (channels == 1 or samples.stride(2) == 1) and (samples.shape[1] == 1 or samples.stride(1) == channels)
    return samples if together else samples.contiguous()


def _run(kernel: Any, work: int, threads: int) -> None:
    """The ``kernel`` on ``work`` by so many ``threads``: those of torch, whose own loops wait spinning and would disturb any others."""
    call = _call(kernel.address)
    if threads == 1:
        call(work)
        return
    team = _torch_team()
    if team is not None:
        team(kernel.address, work, threads, 0)
        return
    waiting = [_pool(threads).submit(call, work) for _ in range(threads - 1)]
    call(work)
    for one in waiting:
        one.result()


@cache
def _call(address: int) -> Any:
    return ctypes.CFUNCTYPE(None, ctypes.c_void_p)(address)


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


_ROW_STRIP = 1024
"""Samples of a channel that are computed together in training."""
_ROWS = np.dtype(
    [
        (name, np.int64)
        for name in (
            # Addresses: as in `_WORK`; of the gradient of the result (0: forwards) and of the two sums of each row.
            *("counters", "x", "dy", "y", "sums", "filters", "alpha", "beta", "scratch", "scratch_stride"),
            # Values from a row of the batch, and from a channel, to the next.
            *("x_batch", "x_channel", "dy_batch", "dy_channel"),
            # Channels, samples, rows (batch times channels), rows of an item, samples computed together.
            *("channels", "length", "rows", "each", "strip"),
        )
    ]
)

# sin(2πr) = r·s(q), fitted as sin² is above: exact to 1e-7 before rounding.
_S0, _S1, _S2, _S3, _S4, _S5 = (
    np.float32(value)
    for value in (6.283182793407027, -41.34141938561707, 81.59613875538264, -76.57968785102582, 41.203743633697975, -12.268859941072586)
)


@_jit
def _window(x: int, at: int, count: int, length: int, room: int, outside: Any) -> int:
    """The address of ``count`` samples of the row ``x`` from ``at`` on; copied to ``room`` where some lie beyond the row.

    Those are its first or its last sample times ``outside``.
    """
    if at >= 0 and at + count <= length:
        return x + 4 * at
    source, target = _pointer(x, np.float32(0)), _pointer(room, np.float32(0))
    for i in range(count):
        t = min(max(at + i, 0), length - 1)
        target[i] = source[t] if t == at + i else outside * source[t]
    return room


@_jit
def _activated(x: Any, count: int, f: Any, turns: Any, scale: Any, v0: Any, v1: Any) -> None:
    """`_upwards` for one channel."""
    a0, a1, a2, a3, a4, a5 = f[0], f[1], f[2], f[3], f[4], f[5]
    b0, b1, b2, b3, b4, b5 = f[6], f[7], f[8], f[9], f[10], f[11]
    for i in range(count):
        x0, x1, x2, x3, x4, x5 = x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5]
        v0[i] = _snake(a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5, turns, scale)
        v1[i] = _snake(b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5, turns, scale)


@_jit
def _spread(dy: Any, count: int, f: Any, v0: Any, v1: Any) -> None:
    """The transpose of `_downwards`: from the gradient of its result to those of its values."""
    a0, a1, a2, a3, a4, a5 = f[12], f[13], f[14], f[15], f[16], f[17]
    b0, b1, b2, b3, b4, b5 = f[18], f[19], f[20], f[21], f[22], f[23]
    for i in range(count):
        y0, y1, y2, y3, y4, y5 = dy[i], dy[i + 1], dy[i + 2], dy[i + 3], dy[i + 4], dy[i + 5]
        v0[i] = a5 * y0 + a4 * y1 + a3 * y2 + a2 * y3 + a1 * y4 + a0 * y5
        v1[i] = b5 * y0 + b4 * y1 + b3 * y2 + b2 * y3 + b1 * y4 + b0 * y5


@_jit
def _gathered(v0: Any, v1: Any, count: int, f: Any, dx: Any) -> None:
    """The transpose of the filters of `_activated`."""
    a0, a1, a2, a3, a4, a5 = f[0], f[1], f[2], f[3], f[4], f[5]
    b0, b1, b2, b3, b4, b5 = f[6], f[7], f[8], f[9], f[10], f[11]
    for i in range(count):
        low = a5 * v0[i] + a4 * v0[i + 1] + a3 * v0[i + 2] + a2 * v0[i + 3] + a1 * v0[i + 4] + a0 * v0[i + 5]
        dx[i] = low + (b5 * v1[i] + b4 * v1[i + 1] + b3 * v1[i + 2] + b2 * v1[i + 3] + b1 * v1[i + 4] + b0 * v1[i + 5])


@_jit
def _slope(u: Any, turns: Any) -> Any:
    """sin²(αu) and sin(2αu) for ``turns`` α/π."""
    r = u * turns
    r = r - np.rint(r)
    q = r * r
    square = q * (_P0 + q * (_P1 + q * (_P2 + q * (_P3 + q * (_P4 + q * _P5)))))
    return square, r * (_S0 + q * (_S1 + q * (_S2 + q * (_S3 + q * (_S4 + q * _S5)))))


@_jit
def _differentiated(x: Any, count: int, f: Any, turns: Any, steep: Any, v0: Any, v1: Any, by_alpha: Any, by_beta: Any) -> None:
    """Gradients of what the SnakeBeta returned, ``v0`` and ``v1``, to those of what it was given, and their parts of a row's two sums.

    ``steep`` is α/β.
    """
    a0, a1, a2, a3, a4, a5 = f[0], f[1], f[2], f[3], f[4], f[5]
    b0, b1, b2, b3, b4, b5 = f[6], f[7], f[8], f[9], f[10], f[11]
    for i in range(count):
        x0, x1, x2, x3, x4, x5 = x[i], x[i + 1], x[i + 2], x[i + 3], x[i + 4], x[i + 5]
        u0 = a0 * x0 + a1 * x1 + a2 * x2 + a3 * x3 + a4 * x4 + a5 * x5
        u1 = b0 * x0 + b1 * x1 + b2 * x2 + b3 * x3 + b4 * x4 + b5 * x5
        square0, slope0 = _slope(u0, turns)
        square1, slope1 = _slope(u1, turns)
        d0, d1 = v0[i], v1[i]
        by_alpha[i] = d0 * u0 * slope0 + d1 * u1 * slope1
        by_beta[i] = d0 * square0 + d1 * square1
        v0[i] = d0 + d0 * steep * slope0
        v1[i] = d1 + d1 * steep * slope1


# The order of a sum is the compiler's, whatever the number of threads.
_summing_jit: Any = njit(fastmath={"contract", "reassoc"}, error_model="numpy")


@_summing_jit
def _sum(values: Any, begin: int, end: int) -> Any:
    total = np.float32(0)
    for i in range(begin, end):
        total += values[i]
    return total


@_jit
def _forward_strip(w: Any, x: int, y: Any, t: int, n: int, f: Any, turns: Any, scale: Any, scratch: int) -> None:
    """The samples ``y`` from ``t`` on, ``n`` of them, of one row: of columns ``t`` - 2 to ``t`` + ``n`` + 2, kept in ``scratch``."""
    kind, room = np.float32(0), w.strip + 2 * REACH
    v0, v1 = _pointer(scratch, kind), _pointer(scratch + 4 * room, kind)
    samples = _window(x, t - REACH, n + 2 * REACH, w.length, scratch + 8 * room, np.float32(1))
    _activated(_pointer(samples, kind), n + REACH, f, turns, scale, v0, v1)
    # Before the first of the 2 * length values lies the first again, behind the last one the last.
    for i in range(max(0, 3 - t)):
        v0[i] = v1[2 - t]
        v1[i] = v1[2 - t]
    last = w.length + 2 - t
    for i in range(last, n + REACH):
        v1[i] = v0[last]
        v0[i] = v0[last]
    _downwards(v0, v1, n, 1, f, y)


@_jit
def _backward_strip(w: Any, x: int, dy: int, dx: Any, t: int, n: int, f: Any, turns: Any, steep: Any, scratch: int) -> Any:
    """The gradient ``dx`` of the samples from ``t`` on, ``n`` of them, of one row, and the strip's two sums for the parameters."""
    kind, room, length = np.float32(0), w.strip + 2 * REACH, w.length
    v0, v1 = _pointer(scratch, kind), _pointer(scratch + 4 * room, kind)
    by_alpha, by_beta = _pointer(scratch + 8 * room, kind), _pointer(scratch + 12 * room, kind)
    given = _pointer(dy, kind)
    _spread(_pointer(_window(dy, t - REACH, n + 2 * REACH, length, scratch + 16 * room, np.float32(0)), kind), n + REACH, f, v0, v1)
    last = length + 2 - t
    # The first and the last value are seen by as many of the filter's taps as reach beyond them.
    if t < 3:
        for i in range(3 - t):
            v0[i] = v1[i] = np.float32(0)
        total = np.float32(0)
        for s in range(min(3, length)):
            for k in range(6 - 2 * s):
                total += given[s] * f[12 + 6 * (k % 2) + k // 2]
        v1[2 - t] = total
    if last < n + REACH:
        for i in range(last, n + REACH):
            v0[i] = v1[i] = np.float32(0)
        total = np.float32(0)
        for s in range(max(0, length - 3), length):
            for k in range(4 + 2 * (length - s), 12):
                total += given[s] * f[12 + 6 * (k % 2) + k // 2]
        v0[last] = total
    samples = _pointer(_window(x, t - REACH, n + 2 * REACH, length, scratch + 16 * room, np.float32(1)), kind)
    _differentiated(samples, n + REACH, f, turns, steep, v0, v1, by_alpha, by_beta)
    _gathered(v0, v1, n, f, dx)
    # The first and the last sample are also what the filter sees beyond them.
    if t == 0:
        for column in range(3):
            for k in range(3 - column):
                dx[0] += f[k] * v0[column + 2] + f[6 + k] * v1[column + 2]
    if t + n == length:
        for column in range(max(0, length - 2), length + 1):
            for k in range(length + 3 - column, 6):
                dx[n - 1] += f[k] * v0[column + 2 - t] + f[6 + k] * v1[column + 2 - t]
    end = n + 2 + (t + n == length)
    return _sum(by_alpha, 2, end), _sum(by_beta, 2, end)


def _train(pointer: Any) -> None:
    """Take items of rows until none is left, as `_work` does."""
    w = carray(pointer, 1)[0]
    kind = np.float32(0)
    scratch = w.scratch + 4 * _next(w.counters + 8) * w.scratch_stride
    f = _pointer(w.filters, kind)
    while True:
        first = _next(w.counters) * w.each
        if first >= w.rows:
            break
        for row in range(first, min(first + w.each, w.rows)):
            b, c = row // w.channels, row % w.channels
            alpha, beta = _pointer(w.alpha, kind)[c], _pointer(w.beta, kind)[c]
            x, y = w.x + 4 * (b * w.x_batch + c * w.x_channel), w.y + 4 * row * w.length
            by_alpha, by_beta = 0.0, 0.0
            for t in range(0, w.length, w.strip):
                n = min(w.strip, w.length - t)
                target = _pointer(y + 4 * t, kind)
                if w.dy == 0:
                    _forward_strip(w, x, target, t, n, f, alpha, beta, scratch)
                else:
                    dy = w.dy + 4 * (b * w.dy_batch + c * w.dy_channel)
                    parts = _backward_strip(w, x, dy, target, t, n, f, alpha, beta, scratch)
                    by_alpha += parts[0]
                    by_beta += parts[1]
            if w.dy != 0:
                sums = _pointer(w.sums + 8 * row, kind)
                sums[0] = np.float32(by_alpha)
                sums[1] = np.float32(by_beta)


@cache
def training_kernel() -> Any:
    """Compiled when it is first asked for: who decodes does without it."""
    compiled: Any = cfunc(types.void(types.CPointer(from_dtype(_ROWS))), cache=True, **_options)
    return compiled(_train)


def forward(x: Tensor, filters: Tensor, turns: Tensor, scale: Tensor) -> Tensor:
    """The activation of ``x`` (B, C, T): with ``filters`` (24,) as `FusedActivation` joins them, ``turns`` α/π, ``scale`` 1/β, both (C,).

    All are fp32; samples of a channel follow one another.
    """
    y = torch.empty(x.shape)
    _over_rows(x, None, y, y, filters, turns, scale)
    return y


def backward(dy: Tensor, x: Tensor, filters: Tensor, turns: Tensor, steep: Tensor) -> tuple[Tensor, Tensor]:
    """From the gradient ``dy`` (B, C, T) of `forward` to that of ``x`` and (B, C, 2), the sums of v'·u·sin(2αu) and of v'·sin²(αu).

    u are the SnakeBeta's inputs, v' the gradients of its results; ``steep`` (C,) is α/β.
    """
    dx, sums = torch.empty(x.shape), torch.empty(*x.shape[:2], 2)
    _over_rows(x, dy, dx, sums, filters, turns, steep)
    return dx, sums


def _over_rows(x: Tensor, dy: Tensor | None, y: Tensor, sums: Tensor, *parameters: Tensor) -> None:
    """Run `_train`; the ``parameters`` are filters, alpha and beta."""
    batch, channels, length = x.shape
    given, rows = x if dy is None else dy, batch * channels
    threads = max(1, min(torch.get_num_threads(), rows, math.ceil(rows * length / _LEAST_VALUES)))
    each = max(1, min(rows // threads, _ITEM_VALUES // length))
    room = 5 * (_ROW_STRIP + 2 * REACH)
    scratch, counters = torch.empty(threads * room), np.zeros(2, np.int64)
    work = np.array(
        (
            *(counters.ctypes.data, x.data_ptr(), 0 if dy is None else dy.data_ptr(), y.data_ptr(), sums.data_ptr()),
            *(part.data_ptr() for part in parameters),
            *(scratch.data_ptr(), room, *x.stride()[:2], *given.stride()[:2], channels, length, rows, each, _ROW_STRIP),
        ),
        dtype=_ROWS,
    )
    _run(training_kernel(), work.ctypes.data, threads)
