"""Learning-rate schedules, as functions a configuration can hand over partially applied."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from kalle.errors import UserError


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: int, final_ratio: float = 0.0) -> LambdaLR:
    """Linear warm-up over ``warmup_steps``, then a half cosine down to ``final_ratio`` of the peak at ``total_steps``; constant after.

    A UserError for less than one step.
    """
    if total_steps < 1:
        raise UserError(f"scheduler.total_steps: got {total_steps}, expected at least 1; give the number of updates of the whole run")

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return final_ratio + (1 - final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

    return LambdaLR(optimizer, factor)


def exponential(optimizer: Optimizer, decay: float, warmup_steps: int = 0) -> LambdaLR:
    """``decay`` to the power of the step (BigVGAN: 0.9999996), after an optional linear warm-up."""
    return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, warmup_steps)) * decay**step)
