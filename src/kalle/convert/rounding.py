"""Weights in 16 bits: what is rounded, what stays in fp32, and how much the rounding changes."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kalle.errors import UserError

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_RMS_ERROR = 0.01
"""Of the spread of a tensor. Gaussian weights lose a fiftieth of this in float16 and a sixth of it in bfloat16; more means that the
dtype does not suit the tensor: gains close to 1 in bfloat16, or values too small for float16."""


@dataclass(frozen=True)
class Rounding:
    """The effect of rounding on the tensors of one part."""

    error: float
    """The largest |rounded - weight| over the standard deviation of the weight's tensor."""
    where: str | None
    """The tensor that has it; None where nothing was rounded."""
    kept: tuple[str, ...]
    """Floating-point tensors that stayed as they were."""


def rounded(tensors: Mapping[str, Tensor], buffers: Collection[str], dtype: torch.dtype) -> tuple[dict[str, Tensor], Rounding]:
    """``tensors`` with the weights in ``dtype`` (float16 or bfloat16).

    Integers stay, and so do ``buffers``, which are statistics and not weights, and a weight that ``dtype`` does not suit: one that would
    overflow, or lose more than ``LARGEST_RMS_ERROR``. A UserError for NaN or infinity.
    """
    result, kept, worst, where = dict(tensors), [], 0.0, None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"broken weights: {name} has NaN or infinite values, expected numbers only; export an earlier checkpoint")
        if tensor.dtype == dtype:
            continue
        half = tensor.to(dtype)
        largest, rms = _errors(tensor, half)
        if name in buffers or not rms <= LARGEST_RMS_ERROR:
            kept.append(name)
            continue
        result[name] = half
        if where is None or largest > worst:
            worst, where = largest, name
    return result, Rounding(worst, where, tuple(kept))


def _errors(tensor: Tensor, half: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square rounding error, over the standard deviation; over the mean's size where all values are equal."""
    exact = tensor.double()
    error = (half.double() - exact).abs()
    spread = exact.std(correction=0) if exact.numel() > 1 else exact.new_zeros(())
    scale = float(spread) or float(exact.abs().mean()) if exact.numel() else 0.0
    largest, rms = (float(value) for value in (error.max(), error.square().mean().sqrt())) if exact.numel() else (0.0, 0.0)
    return (largest / scale, rms / scale) if scale else (largest, rms)
