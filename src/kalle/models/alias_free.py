"""SnakeBeta, evaluated at twice the sample rate so that its harmonics do not alias."""

from __future__ import annotations

import torch
from alias_free_torch import Activation1d
from torch import Tensor, nn

_EPSILON = 1e-9


class SnakeBeta(nn.Module):
    """x + sin²(αx)/β with α, β per channel, stored as logarithms: (B, C, T) -> (B, C, T).

    Source: BigVGAN (arXiv 2206.04658), equation 2, with a separate magnitude β.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake_beta(x, self.alpha.exp()[:, None], self.beta.exp()[:, None])


def snake_beta(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """x + sin²(αx)/β, element by element."""
    return x + torch.sin(alpha * x).square() / (beta + _EPSILON)


def anti_aliased_snake(channels: int) -> nn.Module:
    """SnakeBeta between a 2x upsampler and a 2x downsampler (symmetric filters, replicate padding: it looks ahead)."""
    return Activation1d(activation=SnakeBeta(channels))
