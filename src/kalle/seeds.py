"""The one place where a seed is derived from others, and noise from a seed.

Five formulas stand here, because what each seed once gave must stay: the batches and noise of a training that is resumed
(`derived_seed`) and what its global generators draw (`step_seed`), a voice or a retry that is found again by its number (`purpose_seed`),
the sentences of a long text (`sentence_seed`), the items of a test list (`item_seed`). Use `derived_seed` for anything new.
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


def item_seed(seed: int, index: int) -> int:
    """A 31-bit seed that belongs to ``seed`` and an item's 0-based index, so that an item of a test list does not depend on the others."""
    import numpy as np

    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0] >> 1)


def step_seed(*counters: int) -> int:
    """A 63-bit seed for the global generators at a step of a training, from ``counters`` such as (seed, step, batch, rank)."""
    import numpy as np

    return int(np.random.SeedSequence(counters).generate_state(1, np.uint64)[0] >> np.uint64(1))


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
