"""Least-squares losses and feature matching; the comparison with BigVGAN's numbers is in test_discriminators."""

from __future__ import annotations

import pytest
import torch

from kalle.losses.waveform import discriminator_loss, feature_matching_loss, generator_loss


def test_discriminator_loss_is_zero_for_perfect_scores():
    ones, zeros = [torch.ones(2, 3), torch.ones(2, 5)], [torch.zeros(2, 3), torch.zeros(2, 5)]
    assert discriminator_loss(ones, zeros).item() == 0
    assert discriminator_loss(zeros, ones).item() == 4
    assert generator_loss(ones).item() == 0
    assert generator_loss(zeros).item() == 2


def test_sub_discriminators_weigh_equally_whatever_their_size():
    scores = [torch.full((2, 3), 0.5), torch.zeros(2, 500)]
    assert generator_loss(scores).item() == pytest.approx(0.25 + 1.0)


def test_feature_matching_sums_maps_and_doubles():
    real = [[torch.zeros(1, 2, 3), torch.zeros(1, 4)], [torch.zeros(1, 5)]]
    fake = [[torch.full((1, 2, 3), 0.5), torch.full((1, 4), -1.0)], [torch.full((1, 5), 2.0)]]
    assert feature_matching_loss(real, fake).item() == pytest.approx(2 * (0.5 + 1.0 + 2.0))


def test_feature_matching_gradient_reaches_the_fake_only():
    real, fake = torch.zeros(1, 3, requires_grad=True), torch.ones(1, 3, requires_grad=True)
    feature_matching_loss([[real]], [[fake]]).backward()
    assert real.grad is None
    torch.testing.assert_close(fake.grad, torch.full((1, 3), 2 / 3))


def test_losses_are_fp32_from_half_scores():
    half = [torch.full((2, 3), 300.0, dtype=torch.float16)]
    assert generator_loss(half).item() == pytest.approx(299.0**2)  # 89401 is beyond fp16
    assert discriminator_loss(half, half).dtype == torch.float32


def test_unequal_numbers_of_discriminators_are_an_error():
    with pytest.raises(ValueError, match="zip"):
        discriminator_loss([torch.ones(1, 1)], [])
