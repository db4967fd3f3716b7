"""The anti-aliased SnakeBeta for training on CUDA, compiled by Triton; `kalle.models.flowvae.training_activation` says what is computed.

A lane computes ``EACH`` samples that follow one another, from the columns around them: column c is the pair of values that are made
between the samples c - 1 and c. Columns at the seams are computed twice, so that lanes need nothing of each other.
"""

# Triton knows neither the types of other languages nor (*a, b).
# mypy: disable-error-code="no-untyped-def, assignment"
# ruff: noqa: RUF005

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

EACH = 4
"""Samples of a lane; `_joined` knows the number."""
LANES = 64
"""Of a program: fewer would compute more columns twice over, more would idle in the slow first stages."""

# Without a kernel for each kind of size: compiling one takes seconds.
_any_size = triton.jit(do_not_specialize=("channels", "length", "x_batch", "x_channel", "dy_batch", "dy_channel"))


@triton.jit
def _square_and_slope(u, turns) -> Any:
    """sin²(αu) and sin(2αu) for ``turns`` α/π, by the polynomials of `fused_activation`: the device's sine is slow, or not exact."""
    r = u * turns
    r = r - tl.floor(r + 0.5)
    q = r * r
    square = -3.2713890477687664 * q + 12.989535847552718
    square = square * q - 30.08560804526965
    square = square * q + 42.725338650911084
    square = square * q - 32.469578336179836
    square = square * q + 9.869602862421694
    slope = -12.268859941072586 * q + 41.203743633697975
    slope = slope * q - 76.57968785102582
    slope = slope * q + 81.59613875538264
    slope = slope * q - 41.34141938561707
    slope = slope * q + 6.283182793407027
    return square * q, slope * r


@triton.jit
def _six(values, at: tl.constexpr, filters, of: tl.constexpr) -> Any:
    """The sum of six ``values`` from ``at`` on, times the filter that begins at ``of``."""
    total = values[at] * tl.load(filters + of)
    for k in tl.static_range(1, 6):
        total += values[at + k] * tl.load(filters + of + k)
    return total


@triton.jit
def _six_back(values, at: tl.constexpr, filters, of: tl.constexpr) -> Any:
    """`_six` with the filter backwards, as its transpose needs it."""
    total = values[at] * tl.load(filters + of + 5)
    for k in tl.static_range(1, 6):
        total += values[at + k] * tl.load(filters + of + 5 - k)
    return total


@triton.jit
def _joined(values) -> Any:
    """Four values of each lane, one lane's behind those of the one before."""
    return tl.interleave(tl.interleave(values[0], values[2]), tl.interleave(values[1], values[3]))


@triton.jit
def _around(row, first, length, each: tl.constexpr) -> Any:
    """The samples from 5 before ``first`` to 5 behind the ``each`` of a lane; the first and the last of the ``row`` go on for ever."""
    samples = ()
    for i in tl.static_range(each + 10):
        samples = samples + (tl.load(row + tl.minimum(tl.maximum(first + (i - 5), 0), length - 1)).to(tl.float32),)
    return samples


@triton.jit
def _end_value(row, at, of: tl.constexpr, length, filters, turns, scale) -> Any:
    """The SnakeBeta of the value that the filter at ``of`` makes of six samples from ``at`` on."""
    u = 0.0
    for k in tl.static_range(6):
        u += tl.load(row + tl.minimum(tl.maximum(at + k, 0), length - 1)).to(tl.float32) * tl.load(filters + of + k)
    square, _ = _square_and_slope(u, turns)
    return u + square * scale


@_any_size
def _forward(x, y, filters, alpha, beta, channels, length, x_batch, x_channel, LANES: tl.constexpr, EACH: tl.constexpr) -> None:
    """``alpha``: α/π, ``beta``: 1/β."""
    row = tl.program_id(0).to(tl.int64)
    channel = row % channels
    x += row // channels * x_batch + channel * x_channel
    turns, scale = tl.load(alpha + channel), tl.load(beta + channel)
    start = tl.program_id(1) * LANES * EACH
    first = start + tl.arange(0, LANES) * EACH
    samples = _around(x, first, length, EACH)
    # Before the first of the 2 * length values lies the first again, behind the last one the last.
    front = _end_value(x, -3, 6, length, filters, turns, scale)
    back = _end_value(x, length - 3, 0, length, filters, turns, scale)
    odd, even = (), ()
    for k in tl.static_range(EACH + 5):
        column = first + (k - 2)
        u, v = _six(samples, k, filters, 0), _six(samples, k, filters, 6)
        square_u, _ = _square_and_slope(u, turns)
        square_v, _ = _square_and_slope(v, turns)
        u, v = u + square_u * scale, v + square_v * scale
        odd = odd + (tl.where(column <= 0, front, tl.where(column > length, back, u)),)
        even = even + (tl.where(column < 0, front, tl.where(column >= length, back, v)),)
    results = ()
    for k in tl.static_range(EACH):
        results = results + (_six(odd, k, filters, 12) + _six(even, k, filters, 18),)
    at = start + tl.arange(0, LANES * EACH)
    tl.store(y + row * length + at, _joined(results), mask=at < length)


@_any_size
def _backward(
    dy, x, dx, sums, filters, alpha, beta, channels, length, dy_batch, dy_channel, x_batch, x_channel,
    LANES: tl.constexpr, EACH: tl.constexpr,
) -> None:  # fmt: skip
    """``alpha``: α/π, ``beta``: α/β. Each program writes its own two ``sums``."""
    row = tl.program_id(0).to(tl.int64)
    channel = row % channels
    x += row // channels * x_batch + channel * x_channel
    dy += row // channels * dy_batch + channel * dy_channel
    turns, steep = tl.load(alpha + channel), tl.load(beta + channel)
    start = tl.program_id(1) * LANES * EACH
    first = start + tl.arange(0, LANES) * EACH
    samples = _around(x, first, length, EACH)
    given = ()
    for i in tl.static_range(EACH + 10):
        at = first + (i - 5)
        given = given + (tl.load(dy + at, mask=(at >= 0) & (at < length), other=0.0).to(tl.float32),)
    # The first and the last value are seen by as many of the filter's taps as reach beyond them.
    front, back = 0.0, 0.0
    for s in tl.static_range(3):
        at_front = tl.load(dy + s, mask=s < length, other=0.0).to(tl.float32)
        at_back = tl.load(dy + length - 1 - s, mask=s < length, other=0.0).to(tl.float32)
        for k in tl.static_range(6 - 2 * s):
            front += at_front * tl.load(filters + 12 + 6 * (k % 2) + k // 2)
            back += at_back * tl.load(filters + 12 + 6 * ((11 - k) % 2) + (11 - k) // 2)
    odd, even = (), ()
    by_alpha, by_beta = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
    for k in tl.static_range(EACH + 5):
        column = first + (k - 2)
        u, v = _six(samples, k, filters, 0), _six(samples, k, filters, 6)
        square_u, slope_u = _square_and_slope(u, turns)
        square_v, slope_v = _square_and_slope(v, turns)
        inside = (column > 0) & (column < length)
        du, dv = _six_back(given, k, filters, 12), _six_back(given, k, filters, 18)
        du = tl.where(inside, du, tl.where(column == length, back, 0.0))
        dv = tl.where(inside, dv, tl.where(column == 0, front, 0.0))
        # Each column counts once: of the lane's own samples, and the one behind the last sample with that sample.
        if k >= 2 and k <= EACH + 2:
            own = (column < length) & (k < EACH + 2) | (column == length) & (k > 2)
            by_alpha += tl.where(own, du * u * slope_u + dv * v * slope_v, 0.0)
            by_beta += tl.where(own, du * square_u + dv * square_v, 0.0)
        odd = odd + (du + du * steep * slope_u,)
        even = even + (dv + dv * steep * slope_v,)
    results = ()
    for k in tl.static_range(EACH):
        value = _six_back(odd, k, filters, 0) + _six_back(even, k, filters, 6)
        # The first and the last sample are also what the filter sees beyond them.
        before, behind = tl.zeros([LANES], tl.float32), tl.zeros([LANES], tl.float32)
        for column in tl.static_range(3):
            for tap in tl.static_range(3 - column):
                if k == 0:
                    before += odd[column + 2] * tl.load(filters + tap) + even[column + 2] * tl.load(filters + 6 + tap)
                behind += odd[k + 3 - column] * tl.load(filters + 5 - tap) + even[k + 3 - column] * tl.load(filters + 11 - tap)
        value += tl.where(first + k == 0, before, 0.0) + tl.where(first + k == length - 1, behind, 0.0)
        results = results + (value,)
    at = start + tl.arange(0, LANES * EACH)
    tl.store(dx + row * length + at, _joined(results), mask=at < length)
    place = sums + (row * tl.num_programs(1) + tl.program_id(1)) * 2
    tl.store(place, tl.sum(by_alpha))
    tl.store(place + 1, tl.sum(by_beta))


def forward(x: Tensor, filters: Tensor, turns: Tensor, scale: Tensor) -> Tensor:
    """As `fused_activation.forward`; ``x`` may be of any floating-point type, in which the result is."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        _forward[_grid(x)](x, y, filters, turns, scale, *x.shape[1:], *x.stride()[:2], LANES=LANES, EACH=EACH, num_warps=LANES // 32)
    return y


def backward(dy: Tensor, x: Tensor, filters: Tensor, turns: Tensor, steep: Tensor) -> tuple[Tensor, Tensor]:
    """As `fused_activation.backward`, whatever the types. The sums are made in the same order every time."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grid = _grid(x)
    sums = torch.empty(*x.shape[:2], grid[1], 2, dtype=torch.float32, device=x.device)
    places = (*x.shape[1:], *dy.stride()[:2], *x.stride()[:2])
    with torch.cuda.device_of(x):
        _backward[grid](dy, x, dx, sums, filters, turns, steep, *places, LANES=LANES, EACH=EACH, num_warps=LANES // 32)
    return dx, sums.sum(2)


def _grid(x: Tensor) -> tuple[int, int]:
    """Programs: channels of the batch, and pieces of a channel."""
    batch, channels, length = x.shape
    return batch * channels, triton.cdiv(length, EACH * LANES)
