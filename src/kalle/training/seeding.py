"""Training noise as a function of the seed and the step, so that a resumed run draws what an uninterrupted one would have."""

from __future__ import annotations

import numpy as np
import torch


def step_generator(seed: int, *counters: int) -> torch.Generator:
    """A CPU generator that depends on ``seed`` and ``counters`` (step, rank, …) only."""
    state = int(np.random.SeedSequence([seed, *counters]).generate_state(1, np.uint64)[0] >> np.uint64(1))
    return torch.Generator().manual_seed(state)
