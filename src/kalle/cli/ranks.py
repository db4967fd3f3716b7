"""What a command that runs as one of several processes has to know of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank_device(device: str) -> torch.device:
    """``device`` as ``resolve_device`` does, except that the ranks of a machine share its GPUs: cuda becomes cuda:LOCAL_RANK.

    More ranks than GPUs take turns. A device with a number is taken as it is. UserError as in ``resolve_device``.
    """
    import torch

    from kalle.checkpoint import resolve_device
    from kalle.data.ranks import local_rank

    resolved, local = resolve_device(device), local_rank()
    if resolved.type != "cuda" or resolved.index is not None or local is None:
        return resolved
    return torch.device("cuda", local % torch.cuda.device_count())
