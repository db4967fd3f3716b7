"""Latents to audio for many utterances, as much at a time as memory allows."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kalle.models.flowvae import FlowVAE
from kalle.synthesis.batching import check_budget
from kalle.synthesis.speech import FloatArray

DEFAULT_DECODE_FRAMES = 1000
"""As many as the longest utterance alone has at most."""


@torch.no_grad()
def decode_batch(flowvae: FlowVAE, latents: Sequence[Tensor], *, frame_budget: int = DEFAULT_DECODE_FRAMES) -> list[FloatArray]:
    """Audio (T_i * hop,) of each of ``latents`` (T_i, D), in their order; nothing for no frames.

    Only utterances of equal length share a pass, because padding would change the end of the shorter one, and no pass
    has more than ``frame_budget`` frames, unless a single utterance has.
    """
    check_budget(frame_budget)
    weight = next(flowvae.parameters())
    audio = [np.zeros(0, dtype=np.float32)] * len(latents)
    for rows in _passes([len(row) for row in latents], frame_budget):
        batch = torch.stack([latents[row].to(weight.device, weight.dtype) for row in rows])
        for row, wav in zip(rows, flowvae.decode(batch).float().cpu().numpy(), strict=True):
            audio[row] = wav
    return audio


def _passes(lengths: Sequence[int], frame_budget: int) -> list[list[int]]:
    """Indices of ``lengths`` in groups of one length, each group within the budget; a length of 0 is in none."""
    groups: list[list[int]] = []
    for length in sorted(set(lengths) - {0}):
        rows = [row for row, other in enumerate(lengths) if other == length]
        size = max(1, frame_budget // length)
        groups += [rows[start : start + size] for start in range(0, len(rows), size)]
    return groups
