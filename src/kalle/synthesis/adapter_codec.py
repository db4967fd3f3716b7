"""Changes of weights, stored small."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

ROWS = ":rows"
"""Ending of the name of a tensor that lists the rows another one holds."""
_LARGEST_EXPONENT = 14
"""A change is scaled by a power of two so that its largest value lies just below 2 ** 14, which fp16 holds: 2 ** 28 below it is still
a number."""


def encode_changes(changes: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
    """``changes`` (fp32) as fp16 tensors, and by their names the binary exponents that scale them back.

    A tensor without a change is left out; of one in which most rows have none (a text embedding), the others are kept, with their numbers
    (int32) under the name + ``ROWS``. The error of a value is at most 2 ** -11 of it.
    """
    stored: dict[str, Tensor] = {}
    exponents: dict[str, int] = {}
    for name, change in changes.items():
        largest = float(change.abs().max()) if change.numel() else 0.0
        if largest == 0:
            continue
        exponents[name] = math.frexp(largest)[1] - _LARGEST_EXPONENT
        kept = change
        if change.ndim == 2:
            rows = change.any(dim=1).nonzero()[:, 0]
            if 2 * len(rows) < len(change):
                kept, stored[name + ROWS] = change[rows], rows.to(torch.int32)
        stored[name] = torch.ldexp(kept, torch.tensor(-exponents[name])).to(torch.float16)
    return stored, exponents


def decode_change(stored: Mapping[str, Tensor], name: str, exponent: int, like: Tensor) -> Tensor:
    """The change ``name`` in fp32, of the shape and on the device of ``like``."""
    values = torch.ldexp(stored[name].to(like.device, torch.float32), torch.tensor(exponent, device=like.device))
    rows = stored.get(name + ROWS)
    if rows is None:
        return values
    change = torch.zeros(like.shape, device=like.device)
    change[rows.to(like.device, torch.int64)] = values
    return change
