from __future__ import annotations

import math

import pytest
import torch

from kalle.losses.latent import stop_bce, stop_rows


def test_equals_the_sum_written_out() -> None:
    logits = torch.tensor([[0.5, -1.0, 2.0, 9.0], [3.0, 9.0, 9.0, 9.0]])
    lengths = torch.tensor([2, 0])

    def surprise(logit: float, end: bool) -> float:
        return -math.log(1 / (1 + math.exp(-logit if end else logit)))

    expected = surprise(0.5, False) + surprise(-1.0, False) + 7 * surprise(2.0, True) + 7 * surprise(3.0, True)
    assert int(stop_rows(lengths)) == 4
    assert float(stop_bce(logits, lengths, positive_weight=7.0)) == pytest.approx(expected / 4, rel=1e-6)


@pytest.mark.parametrize("garbage", [1e30, float("inf"), float("nan")])
def test_padding_has_no_part_in_the_loss_or_its_gradient(garbage: float) -> None:
    torch.manual_seed(0)
    lengths, given = torch.tensor([3, 1]), torch.randn(2, 4)
    beyond = torch.tensor([[False, False, False, False], [False, False, True, True]])
    dirty = given.masked_fill(beyond, garbage).requires_grad_()
    loss = stop_bce(dirty, lengths)
    assert torch.equal(loss, stop_bce(given, lengths))
    loss.backward()
    assert dirty.grad is not None
    assert torch.equal(dirty.grad == 0, beyond)


def test_weighted_ends_pull_as_hard_as_many_frames() -> None:
    """With one end in 101 rows and a weight of 100, the best constant logit is 0."""
    lengths = torch.tensor([100])
    logit = torch.zeros((), requires_grad=True)
    stop_bce(logit.expand(1, 101), lengths, 100.0).backward()
    assert float(logit.grad) == pytest.approx(0, abs=1e-6)  # type: ignore[arg-type]
