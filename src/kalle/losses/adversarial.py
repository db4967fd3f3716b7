"""Least-squares adversarial losses and feature matching; the defaults are BigVGAN's reductions and factors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

OverParts = Literal["sum", "mean"]
"""How the losses of sub-discriminators, or of feature maps, become one: their sum (BigVGAN) or their mean."""
FEATURE_MATCHING_FACTOR = 2.0
"""BigVGAN's (and HiFi-GAN's, arXiv 2010.05646 eq. 6) factor inside the term, beside any weight from a configuration."""


def _over_parts(losses: Sequence[Tensor], reduction: OverParts) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'sum' or 'mean'")
    stacked = torch.stack(list(losses))
    return stacked.sum() if reduction == "sum" else stacked.mean()


def discriminator_loss(real_scores: Sequence[Tensor], fake_scores: Sequence[Tensor], reduction: OverParts = "sum") -> Tensor:
    """``sum_i mean((1 - D_i(y))^2) + mean(D_i(y_hat)^2)`` over sub-discriminators (HiFi-GAN eq. 1); scalar, fp32.

    The scores are (B, N_i); the caller detaches the generator's audio before it scores it.
    """
    pairs = zip(real_scores, fake_scores, strict=True)
    return _over_parts([(1 - real.float()).square().mean() + fake.float().square().mean() for real, fake in pairs], reduction)


def generator_loss(fake_scores: Sequence[Tensor], reduction: OverParts = "sum") -> Tensor:
    """``sum_i mean((1 - D_i(y_hat))^2)`` over sub-discriminators (HiFi-GAN eq. 2); scores (B, N_i), scalar, fp32."""
    return _over_parts([(1 - fake.float()).square().mean() for fake in fake_scores], reduction)


def feature_matching_loss(
    real_features: Sequence[Sequence[Tensor]],
    fake_features: Sequence[Sequence[Tensor]],
    factor: float = FEATURE_MATCHING_FACTOR,
    reduction: OverParts = "sum",
) -> Tensor:
    """``factor * sum_i sum_l mean|F_il(y) - F_il(y_hat)|`` over sub-discriminators i and feature maps l; scalar, fp32.

    No gradient flows into the real features.
    """
    distances = [
        (real.detach().float() - fake.float()).abs().mean()
        for real_maps, fake_maps in zip(real_features, fake_features, strict=True)
        for real, fake in zip(real_maps, fake_maps, strict=True)
    ]
    return factor * _over_parts(distances, reduction)
