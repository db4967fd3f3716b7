"""Building blocks: causality by gradient, lengths, and the activation."""

from __future__ import annotations

import pytest
import torch

from kalle.models.flowvae.bigvgan import AntiAliasedSnake, SnakeBeta
from kalle.models.layers import CausalConv1d, CausalUpsample1d, same_conv


def _gradient(module, length: int, at: int):
    """|d output[at] / d input| for each input position."""
    torch.manual_seed(0)
    x = torch.randn(1, 3, length, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(module(x)[..., at].sum(), x)
    return gradient.abs().sum((0, 1))


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (7, 1), (3, 4), (11, 5)])
def test_causal_convolution_sees_exactly_its_past(kernel, dilation):
    torch.manual_seed(0)
    conv = CausalConv1d(3, 4, kernel, dilation).double()
    gradient = _gradient(conv, 80, 70)
    assert conv(torch.zeros(1, 3, 80, dtype=torch.float64)).shape == (1, 4, 80)
    expected = {70 - dilation * i for i in range(kernel)}
    assert set(gradient.nonzero()[:, 0].tolist()) == expected


@pytest.mark.parametrize("stride", [2, 4, 5])
def test_upsampling_sees_its_own_and_the_previous_input(stride):
    torch.manual_seed(0)
    up = CausalUpsample1d(3, 2, stride).double()
    assert up(torch.zeros(1, 3, 6, dtype=torch.float64)).shape == (1, 2, 6 * stride)
    for offset in range(stride):
        assert _gradient(up, 6, 4 * stride + offset).nonzero()[:, 0].tolist() == [3, 4]


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (3, 8), (7, 1)])
def test_same_convolution_keeps_the_length_and_looks_both_ways(kernel, dilation):
    torch.manual_seed(0)
    conv = same_conv(3, 2, kernel, dilation).double()
    assert conv(torch.zeros(1, 3, 50, dtype=torch.float64)).shape == (1, 2, 50)
    half = dilation * (kernel // 2)
    seen = _gradient(conv, 50, 25).nonzero()[:, 0]
    assert (seen.min(), seen.max()) == (25 - half, 25 + half)


def test_snake_is_its_formula():
    snake = SnakeBeta(3)
    with torch.no_grad():
        snake.alpha.copy_(torch.tensor([0.0, 0.5, -1.0]))
        snake.beta.copy_(torch.tensor([0.3, 0.0, 1.0]))
    x = torch.linspace(-2, 2, 15).expand(1, 3, 15)
    alpha, beta = snake.alpha.exp()[:, None], snake.beta.exp()[:, None]
    torch.testing.assert_close(snake(x), x + torch.sin(alpha * x) ** 2 / beta)


@torch.no_grad()
def test_the_anti_aliased_activation_keeps_the_length_and_a_constant():
    activation = AntiAliasedSnake(2)
    x = torch.full((1, 2, 33), 0.7)
    torch.testing.assert_close(activation(x), SnakeBeta(2)(x), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_anti_aliased_activation_suppresses_what_would_alias():
    # The second harmonic of sin(a x)^2 is above Nyquist here and folds back when it is made at the signal's own rate.
    length, cycles = 2048, 676
    x = torch.sin(2 * torch.pi * cycles / length * torch.arange(length, dtype=torch.float64))[None, None]
    window = torch.hann_window(length, dtype=torch.float64)
    folded = length - 2 * cycles
    plain, filtered = (torch.fft.rfft(f(x)[0, 0] * window).abs()[folded] for f in (SnakeBeta(1).double(), AntiAliasedSnake(1).double()))
    # Twelve taps have a wide transition band.
    assert filtered < 0.25 * plain
