"""Seeds and noise as functions of named parts, such as (seed, epoch, item), so that a run can be resumed exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from ``parts``: equal parts give equal seeds, on any machine and in any process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def standard_noise(shape: Sequence[int], *parts: int | str) -> Tensor:
    """Standard normal fp32 noise of ``shape``, drawn on the CPU from the seed of ``parts``."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(derived_seed(*parts)))


def standard_noise_into(out: Tensor, generator: torch.Generator, *parts: int | str) -> None:
    """Fill the contiguous fp32 ``out`` with what `standard_noise` gives for its shape; ``generator`` is only spared being made anew."""
    assert out.is_contiguous(), out.stride()
    torch.randn(out.shape, generator=generator.manual_seed(derived_seed(*parts)), out=out)


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator seeded from ``parts``."""
    return np.random.default_rng(derived_seed(*parts))
