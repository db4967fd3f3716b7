"""The one place where a seed is derived from others, and noise from a seed.

Three formulas stand here, because what each seed once gave must stay: the batches and noise of a training that is resumed
(`derived_seed`), a voice or a retry that is found again by its number (`purpose_seed`), the sentences of a long text (`sentence_seed`). Use
`derived_seed` for anything new.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import Tensor


def derived_seed(*parts: int | str) -> int:
    """A 63-bit seed from ``parts``, such as (seed, epoch, item): equal parts give equal seeds, on any machine and in any process."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def purpose_seed(purpose: str) -> int:
    """A seed below 2**31 that ``purpose``, words with the user's seed in them, decides.

    Noise for two purposes must not be seeded with the same number: both would draw the same values.
    """
    return int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "big") % 2**31


def sentence_seed(seed: int, index: int, again: int = 0) -> int:
    """The seed of sentence ``index`` of a text spoken with ``seed``; ``again`` counts further tries.

    The first has that of the whole, so that a text of one sentence is the same however it is spoken.
    """
    if index == again == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{again}".encode()).digest()[:7], "big")


def standard_noise(shape: Sequence[int], *parts: int | str) -> Tensor:
    """Standard normal fp32 noise of ``shape``, drawn on the CPU from the seed of ``parts``."""
    import torch

    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(derived_seed(*parts)))


def standard_noise_into(out: Tensor, generator: torch.Generator, *parts: int | str) -> None:
    """Fill the contiguous fp32 ``out`` with what `standard_noise` gives for its shape; ``generator`` is only spared being made anew."""
    import torch

    assert out.is_contiguous(), out.stride()
    torch.randn(out.shape, generator=generator.manual_seed(derived_seed(*parts)), out=out)


def numpy_generator(*parts: int | str) -> np.random.Generator:
    """A NumPy generator seeded from ``parts``."""
    import numpy as np

    return np.random.default_rng(derived_seed(*parts))
