"""A head start for reading: attention to the text that moves from its beginning to its end as the frames do."""

from __future__ import annotations

import torch
from torch import Tensor

RELATIVE_TOLERANCE = 0.08
"""How far from the straight line attention may be for nothing, as a share of the text; speech is not read at one pace."""
TOLERANCE_POSITIONS = 3.0
"""The same in text positions, which counts in short texts."""
RELATIVE_WIDTH = 0.08
"""Standard deviation of what is beyond the tolerance, as a share of the text."""
_SMALLEST_SHARE = 1e-6


def diagonal_band(text_lengths: Tensor, frame_lengths: Tensor, text_width: int, frame_width: int) -> Tensor:
    """How welcome attention to text position n is at frame t, (B, frame_width, text_width) in [0, 1].

    1 near n / L = t / T, falling off as a Gaussian; the idea of guided attention (Tachibana et al., arXiv 1710.08969) with room
    around the line. ``text_lengths`` and ``frame_lengths`` are (B,) int64.
    """
    texts, frames = text_lengths[:, None, None].float(), frame_lengths[:, None, None].clamp(min=1).float()
    positions = (torch.arange(text_width, device=text_lengths.device) + 0.5) / texts
    times = (torch.arange(frame_width, device=text_lengths.device)[:, None] + 0.5) / frames
    away = ((positions - times).abs() - RELATIVE_TOLERANCE - TOLERANCE_POSITIONS / texts).clamp(min=0)
    return torch.exp(-0.5 * (away / RELATIVE_WIDTH).square())


def alignment_loss(attention: Tensor, text_lengths: Tensor, frame_lengths: Tensor) -> Tensor:
    """``-log`` of the attention that falls into `diagonal_band`, averaged over all frames; a scalar in nats, fp32.

    ``attention`` (B, T, L) is a head's, to the text alone; what it spends elsewhere counts as astray.
    """
    band = diagonal_band(text_lengths, frame_lengths, attention.shape[2], attention.shape[1])
    astray = -(attention * band).sum(-1).clamp(min=_SMALLEST_SHARE).log()
    valid = torch.arange(attention.shape[1], device=frame_lengths.device) < frame_lengths[:, None]
    return astray.masked_fill(~valid, 0.0).sum() / valid.sum()
