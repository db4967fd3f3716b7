"""The mean of a loss over all ranks, where each has another number of frames."""

from __future__ import annotations

from typing import Literal

import torch
import torch.distributed
from torch import Tensor

Reduction = Literal["global", "rank"]
REDUCTIONS = ("global", "rank")


def global_weight(count: Tensor) -> Tensor:
    """What a rank's mean over ``count`` things has to be multiplied with, so that the average over ranks is the mean over all things.

    Distributed training averages gradients over ranks, so a mean of each rank's own would weight a frame of a short batch more than one
    of a long batch. ``count`` is a scalar; every rank must call this equally often. Returns count * ranks / sum of counts, fp32 scalar; 1
    where there is one process.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return torch.ones((), device=count.device)
    total = count.detach().float().clone()
    torch.distributed.all_reduce(total)
    return count.detach().float() * torch.distributed.get_world_size() / total
