"""The loss of the stop head: is the next frame the end?"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits


def stop_bce(logits: Tensor, lengths: Tensor, positive_weight: float = 100.0) -> Tensor:
    """Binary cross-entropy of the stop head in nats, a scalar in fp32: the mean over all valid rows of the batch.

    ``logits`` (B, T + 1) as `KalleLM.forward` gives them, ``lengths`` (B,) int64 the frames of each utterance. Row ``lengths[b]`` is the
    end and counts ``positive_weight`` times, because an utterance has one end and many frames (MELLE, arXiv 2407.08551); the
    rows before it are not the end; those beyond have no part in the loss, nor in its gradient, whatever they hold.
    """
    rows = torch.arange(logits.shape[1], device=logits.device)
    valid, target = rows <= lengths[:, None], (rows == lengths[:, None]).float()
    weight = torch.tensor(positive_weight, device=logits.device)
    # Masking the loss instead would multiply an overflow's gradient by zero, which is NaN.
    kept = logits.float().masked_fill(~valid, 0.0)
    each = binary_cross_entropy_with_logits(kept, target, pos_weight=weight, reduction="none")
    return each.where(valid, 0.0).sum() / stop_rows(lengths)


def stop_rows(lengths: Tensor) -> Tensor:
    """How many rows `stop_bce` is a mean over: every frame of ``lengths`` (B,) and an end for each utterance; scalar int64."""
    return lengths.sum() + len(lengths)
