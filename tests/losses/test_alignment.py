from __future__ import annotations

import torch

from kalle.losses.latent import alignment_loss, diagonal_band


def attention_to(columns: list[int], width: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor([columns]), width).float()


def test_the_straight_line_is_free_and_the_way_back_is_not() -> None:
    texts, frames = torch.tensor([40]), torch.tensor([20])
    forward = attention_to(list(range(0, 40, 2)), 40)
    assert float(alignment_loss(forward, texts, frames)) == 0
    assert float(alignment_loss(forward.flip(1), texts, frames)) > 3


def test_attention_elsewhere_counts_as_astray() -> None:
    forward = 0.5 * attention_to(list(range(0, 40, 2)), 40)
    loss = alignment_loss(forward, torch.tensor([40]), torch.tensor([20]))
    torch.testing.assert_close(loss, torch.tensor(2.0).log())


def test_padding_has_no_part() -> None:
    lengths, frames = torch.tensor([40, 10]), torch.tensor([20, 5])
    attention = torch.rand(2, 20, 40, generator=torch.Generator().manual_seed(0))
    changed = attention.clone()
    changed[1, 5:] = 0.7
    attention.requires_grad_()
    loss = alignment_loss(attention, lengths, frames)
    assert torch.equal(loss, alignment_loss(changed, lengths, frames))
    loss.backward()
    assert attention.grad is not None
    assert not attention.grad[1, 5:].any()


def test_the_band_scales_with_the_text() -> None:
    band = diagonal_band(torch.tensor([100]), torch.tensor([50]), 100, 50)[0]
    assert float(band[25, 50]) == 1
    assert float(band[25, 60]) == 1, "within a tenth of the text"
    assert float(band[25, 90]) < 0.05
    assert float(band[0, 99]) < 1e-6
