"""The anti-aliased SnakeBeta for training: one pass over memory forwards and one backwards, and only the input is kept between them.

Source: alias_free_torch's Activation1d, equal in value and in all gradients. It keeps fourteen times its input for the backward pass.
"""

from __future__ import annotations

import importlib.util
import math
from functools import cache
from typing import Any

import torch
from alias_free_torch.filter import kaiser_sinc_filter1d
from torch import Tensor

from kalle.extras import install_command


def why_not(way: str, device: torch.device) -> str | None:
    """Why numba or triton, ``way``, cannot compute on ``device``; None where it can."""
    kind = {"numba": "cpu", "triton": "cuda"}[way]
    if device.type != kind:
        return f"the device {device.type}"
    if importlib.util.find_spec(way) is None:
        return f"no package {way} ({install_command('fast') if way == 'numba' else 'which torch for CUDA on Linux brings'})"
    if way == "numba":
        try:
            from kalle.models.flowvae.fused_activation import training_kernel

            training_kernel()
        except Exception as error:  # numba's have no base of their own
            return f"a numba that cannot be used here ({' '.join(str(error).split())[:200]})"
    return None


def fused_snake(x: Tensor, alpha: Tensor, beta: Tensor, way: str) -> Tensor:
    """Computes the activation of ``x`` (B, C, T) with ``alpha`` and ``beta`` (C,), not their logarithms, in fp32; ``way``: numba or triton.

    The result is in the dtype of ``x``. T must be at least 1.
    """
    assert x.shape[-1], x.shape
    return _snake(x, alpha.float(), beta.float(), way)


@torch.library.custom_op("kalle::anti_aliased_snake", mutates_args=())
def _snake(x: Tensor, alpha: Tensor, beta: Tensor, way: str) -> Tensor:
    x = _rows(x)
    if way == "triton":
        from kalle.models.flowvae import triton_activation

        return triton_activation.forward(x, _filters(x.device), alpha / math.pi, 1 / beta)
    from kalle.models.flowvae import fused_activation

    return fused_activation.forward(x.float(), _filters(x.device), alpha / math.pi, 1 / beta).to(x.dtype)


@torch.library.custom_op("kalle::anti_aliased_snake_backward", mutates_args=())
def _snake_backward(dy: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, way: str) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, α and β."""
    dy, x, scale = _rows(dy), _rows(x), 1 / beta
    if way == "triton":
        from kalle.models.flowvae import triton_activation

        dx, sums = triton_activation.backward(dy, x, _filters(x.device), alpha / math.pi, alpha * scale)
    else:
        from kalle.models.flowvae import fused_activation

        dx, sums = fused_activation.backward(dy.float(), x.float(), _filters(x.device), alpha / math.pi, alpha * scale)
    # v = u + sin²(αu)/β: its derivatives are 1 + sin(2αu)·α/β, u·sin(2αu)/β and -sin²(αu)/β².
    by_alpha, by_beta = sums.sum(0).unbind(-1)
    return dx.to(x.dtype), by_alpha * scale, -by_beta * scale.square()


@_snake.register_fake
def _(x: Tensor, alpha: Tensor, beta: Tensor, way: str) -> Tensor:
    return x.new_empty(x.shape)


@_snake_backward.register_fake
def _(dy: Tensor, x: Tensor, alpha: Tensor, beta: Tensor, way: str) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), torch.empty_like(alpha), torch.empty_like(beta)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.way = inputs[3]


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_snake_backward(dy, *ctx.saved_tensors, ctx.way), None


_snake.register_autograd(_gradients, setup_context=_keep)


def _rows(x: Tensor) -> Tensor:
    """``x`` as it is where samples of a channel follow one another; else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@cache
def _filters(device: torch.device) -> Tensor:
    """(24,): for each of two values the six taps that make it from samples, and the six that samples are made of."""
    # As `Activation1d` makes both of its own.
    taps = kaiser_sinc_filter1d(cutoff=0.25, half_width=0.3, kernel_size=12).view(6, 2).t()
    return torch.cat([2 * taps.flip(1).flatten(), taps.flatten()]).to(device)
