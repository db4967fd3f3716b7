"""16-bit weights on a CPU: which of the two types is faster for a step, measured here, since no name of a processor tells.

A step multiplies every weight with one row, so that it should take as long as reading them. Libraries reach that on some processors only:
torch's float16 product of one row is fast with AVX-512 and slow elsewhere, oneDNN's bfloat16 product is fast with AMX from some rows on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HALF = "half"
"""The dtype that stands for the faster of the two."""
_CANDIDATES = ((torch.float16, 1), (torch.bfloat16, 1), (torch.bfloat16, 4))
"""Types, and rows that a product has at least."""
_SHAPE = (8192, 2048)
_WEIGHTS = 4
"""Different ones by turns, so that no cache holds them: 134 MB."""
_REPEATS = 5


class PaddedLinear(nn.Linear):
    """A linear layer that multiplies at least ``least_rows`` rows, of zeros where there are fewer."""

    least_rows = 1

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[:-1].numel()
        if rows >= self.least_rows:
            return super().forward(x)
        padded = F.pad(x.reshape(rows, -1), (0, 0, 0, self.least_rows - rows))
        return super().forward(padded)[:rows].view(*x.shape[:-1], -1)


def fastest_half(device: torch.device) -> torch.dtype:
    """The 16-bit type to load weights in for steps on ``device``: bfloat16 but on the CPU, where it is measured once a process."""
    return torch.bfloat16 if device.type != "cpu" else _fastest((torch.float16, torch.bfloat16), torch.get_num_threads())[0]


def pad_products(module: nn.Module) -> None:
    """Let the products of ``module``, on the CPU in a 16-bit type, have as many rows as is fastest for one."""
    layers = [layer for layer in module.modules() if isinstance(layer, PaddedLinear)]
    dtype = layers[0].weight.dtype
    if layers[0].weight.device.type != "cpu" or dtype not in (torch.float16, torch.bfloat16):
        return
    _, least_rows = _fastest((dtype,), torch.get_num_threads())
    for layer in layers:
        layer.least_rows = least_rows


@cache
def _fastest(dtypes: Sequence[torch.dtype], threads: int) -> tuple[torch.dtype, int]:
    """Of the candidates in ``dtypes`` the one whose product of one row is fastest with so many ``threads``, in a third of a second."""
    return min((each for each in _CANDIDATES if each[0] in dtypes), key=lambda each: _seconds(*each))


@torch.inference_mode()
def _seconds(dtype: torch.dtype, rows: int) -> float:
    weights = [torch.full(_SHAPE, 0.01, dtype=dtype) for _ in range(_WEIGHTS)]
    x, times = torch.ones(rows, _SHAPE[1], dtype=dtype), []
    for _ in range(_REPEATS + 1):
        started = time.perf_counter()
        for weight in weights:
            F.linear(x, weight)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])
