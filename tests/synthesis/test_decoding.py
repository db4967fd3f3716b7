from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.synthesis.decoding import decode_batch

LENGTHS = [7, 3, 0, 7, 12, 3, 7, 1]


def latents(lengths: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 8, generator=generator) for length in lengths]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """(rows, frames) of each pass through the decoder."""
    seen: list[tuple[int, int]] = []
    decode = FlowVAE.decode

    def spy(self, z):
        seen.append(tuple(z.shape[:2]))
        return decode(self, z)

    monkeypatch.setattr(FlowVAE, "decode", spy)
    return seen


@torch.no_grad()
@pytest.mark.parametrize("frame_budget", [1, 14, 1000])
def test_every_row_equals_its_own_decode(flowvae_tiny: FlowVAE, frame_budget: int) -> None:
    rows = latents(LENGTHS)
    together = decode_batch(flowvae_tiny, rows, frame_budget=frame_budget)
    assert [len(audio) for audio in together] == [1280 * length for length in LENGTHS]
    for z, audio in zip(rows, together, strict=True):
        assert audio.dtype == np.float32
        if len(z):
            np.testing.assert_allclose(audio, flowvae_tiny.decode(z[None])[0].numpy(), rtol=0, atol=1e-5)


def test_passes_stay_within_the_budget_and_share_it(flowvae_tiny: FlowVAE, passes: list[tuple[int, int]]) -> None:
    decode_batch(flowvae_tiny, latents(LENGTHS), frame_budget=14)
    assert sorted(passes) == [(1, 1), (1, 7), (1, 12), (2, 3), (2, 7)]
    passes.clear()
    decode_batch(flowvae_tiny, latents(LENGTHS), frame_budget=5)
    assert sorted(passes) == [(1, 1), (1, 3), (1, 3), (1, 7), (1, 7), (1, 7), (1, 12)]


def test_nothing_to_decode(flowvae_tiny: FlowVAE, passes: list[tuple[int, int]]) -> None:
    assert decode_batch(flowvae_tiny, []) == []
    (audio,) = decode_batch(flowvae_tiny, [torch.zeros(0, 8)])
    assert audio.shape == (0,)
    assert passes == []


def test_a_bad_budget_is_refused(flowvae_tiny: FlowVAE) -> None:
    with pytest.raises(UserError, match="bad frame budget: got 0"):
        decode_batch(flowvae_tiny, latents([2]), frame_budget=0)
