"""Which part of a list of work is this process's, when several processes share it without talking to each other."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kalle.errors import UserError

if TYPE_CHECKING:
    import torch

_ENVIRONMENTS = (("RANK", "WORLD_SIZE"), ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"), ("SLURM_PROCID", "SLURM_NTASKS"))
"""The variables that torchrun and SLURM's srun set for a process; the step's number of tasks has precedence over the job's."""
_LOCAL = ("LOCAL_RANK", "SLURM_LOCALID")


@dataclass(frozen=True)
class Share:
    """The part of process ``rank`` of ``world_size``: number n belongs to rank n % world_size, so the parts are disjoint and complete."""

    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"ranks: got rank={self.rank} of world_size={self.world_size}, expected 0 <= rank < world_size; correct them")

    def owns(self, number: int) -> bool:
        """Whether the piece of work ``number`` (counted from 0) is ours."""
        return number % self.world_size == self.rank

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size}"


def share_of_process(rank: int | None = None, world_size: int | None = None, environment: Mapping[str, str] | None = None) -> Share:
    """The share that ``rank`` and ``world_size`` name, else that of torchrun or SLURM in ``environment`` (os.environ), else all of it.

    UserError for one number without the other, or for values that are no ranks.
    """
    if (rank is None) != (world_size is None):
        raise UserError(f"ranks: got rank={rank} and world_size={world_size}, expected both or neither; add the other")
    if rank is not None and world_size is not None:
        return Share(rank, world_size)
    found = os.environ if environment is None else environment
    for rank_name, size_name in _ENVIRONMENTS:
        if rank_name in found and size_name in found:
            return Share(_number(found, rank_name), _number(found, size_name))
    return Share()


def local_rank(environment: Mapping[str, str] | None = None) -> int | None:
    """This process's number on its own machine as torchrun or SLURM give it; None where neither started it."""
    found = os.environ if environment is None else environment
    return next((_number(found, name) for name in _LOCAL if name in found), None)


def rank_device(device: str) -> torch.device:
    """``device`` as ``resolve_device`` does, except that the ranks of a machine share its GPUs: cuda becomes cuda:LOCAL_RANK.

    More ranks than GPUs take turns. A device with a number is taken as it is. UserError as in ``resolve_device``.
    """
    import torch

    from kalle.checkpoint import resolve_device

    resolved, local = resolve_device(device), local_rank()
    if resolved.type != "cuda" or resolved.index is not None or local is None:
        return resolved
    return torch.device("cuda", local % torch.cuda.device_count())


def _number(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except ValueError:
        raise UserError(f"environment variable {name}: got '{environment[name]}', expected a whole number; unset or correct it") from None


class OthersUnfinished(Exception):
    """This process has done its share, but parts of other ranks are not there yet; whichever rank ends last completes the result."""

    def __init__(self, share: Share, missing: int, pieces: str) -> None:
        """``missing`` counts the ``pieces`` (a plural noun) that other ranks have yet to write."""
        super().__init__(
            f"{share} has done its part; {missing} {pieces} of other ranks are not there yet, and the rank that ends last completes the "
            "result (if no other runs, start the missing ranks, or the same command alone with rank=0 world_size=1)"
        )
