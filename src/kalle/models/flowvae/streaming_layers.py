"""Layers that carry their past as an explicit value: any split of a signal into chunks gives the numbers of the whole.

A layer is ``push(x, state, ...) -> (y, new state)`` with (B, C, t) tensors; t may be 0. No state is ever changed in
place, so an older one can be continued again. A layer that looks ahead is used in one of two ways:

- *delayed*: it emits what its input determines and keeps the rest for the next push, or for the end;
- *windowed* (delay 0): it treats the last sample as the end of the signal and emits everything. The trailing ``hold``
  samples of its input are provisional: they are given again with the next push and leave no trace in the new state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalle.models.flowvae.bigvgan import snake_beta
from kalle.models.layers import CausalConv1d, CausalUpsample1d

REACH = 5
"""Samples that one anti-aliased activation sees to each side: half of two 12-tap filters at twice the rate."""


def _last(x: Tensor, count: int, hold: int) -> Tensor:
    """A copy of the last ``count`` samples (fewer if there are not so many) of ``x`` without its trailing ``hold``."""
    end = x.shape[-1] - hold
    return x[..., max(0, end - count) : end].clone()


def join(state: Tensor, x: Tensor) -> Tensor:
    """``state`` followed by ``x`` along time, sparing the copy when one is empty."""
    if not state.shape[-1]:
        return x
    return torch.cat((state, x), dim=-1) if x.shape[-1] else state


def delayed_sum(queue: Tensor, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """Residual sum when ``branch`` lags behind ``x``: the sum as far as ``branch`` goes, and the samples of ``x`` still waiting."""
    waiting = join(queue, x)
    ready = branch.shape[-1]
    return waiting[..., :ready] + branch, waiting[..., ready:].clone()


class CausalConvStream:
    """``CausalConv1d`` with its past as state."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, CausalConv1d), type(layer)
        # A weight-normed convolution computes its weight at every look; this takes one for all pushes.
        self.weight, self.bias = layer.conv.weight.detach(), layer.conv.bias.detach()
        self.dilation, self.past = layer.conv.dilation, layer.past

    def start(self, batch: int) -> Tensor:
        """The zeros before a signal."""
        return self.weight.new_zeros(batch, self.weight.shape[1], self.past)

    def push(self, x: Tensor, state: Tensor, hold: int = 0) -> tuple[Tensor, Tensor]:
        """(B, C, t) -> (B, C', t)."""
        if not x.shape[-1]:
            return x.new_zeros(x.shape[0], self.weight.shape[0], 0), state
        joined = join(state, x)
        return F.conv1d(joined, self.weight, self.bias, dilation=self.dilation), _last(joined, self.past, hold)


class UpsampleStream:
    """``CausalUpsample1d`` with the previous input sample as state."""

    def __init__(self, layer: nn.Module) -> None:
        assert isinstance(layer, CausalUpsample1d), type(layer)
        self.weight, self.bias, self.stride = layer.conv.weight.detach(), layer.conv.bias.detach(), layer.stride

    def start(self, batch: int) -> Tensor:
        """The zero before a signal."""
        return self.weight.new_zeros(batch, self.weight.shape[0], 1)

    def push(self, x: Tensor, state: Tensor, hold: int = 0) -> tuple[Tensor, Tensor]:
        """(B, C, t) -> (B, C', t * stride)."""
        if not x.shape[-1]:
            return x.new_zeros(x.shape[0], self.weight.shape[1], 0), state
        joined = join(state, x)
        y = F.conv_transpose1d(joined, self.weight, self.bias, stride=self.stride)
        return y[..., self.stride : -self.stride], _last(joined, 1, hold)


class SymmetricConvStream:
    """A zero-padded "same" convolution, delayed by half its (dilated) kernel."""

    def __init__(self, conv: nn.Module) -> None:
        assert isinstance(conv, nn.Conv1d), type(conv)
        assert conv.bias is not None
        self.weight, self.bias = conv.weight.detach(), conv.bias.detach()
        self.dilation, self.groups = conv.dilation, conv.groups
        self.delay = conv.dilation[0] * (conv.kernel_size[0] - 1) // 2

    def start(self, batch: int) -> Tensor:
        """The zeros before a signal."""
        return self.weight.new_zeros(batch, self.weight.shape[1] * self.groups, self.delay)

    def push(self, x: Tensor, state: Tensor, end: bool = False) -> tuple[Tensor, Tensor]:
        """(B, C, t) -> (B, C', up to t samples; all that are left at the ``end``)."""
        joined = join(state, x)
        if end:
            joined = F.pad(joined, (0, self.delay))
        if joined.shape[-1] <= 2 * self.delay:
            return x.new_zeros(x.shape[0], self.weight.shape[0], 0), joined.clone()
        y = F.conv1d(joined, self.weight, self.bias, dilation=self.dilation, groups=self.groups)
        return y, _last(joined, 2 * self.delay, 0)


class ActivationStream:
    """The anti-aliased activation, delayed by its reach or (``delay=0``) windowed. State: the input that is still seen.

    A state shorter than it may be means that it begins where the signal does, which is where the offline activation
    repeats the first sample: before its upsampler, and again before its downsampler.
    """

    def __init__(self, activation: Any, delay: int) -> None:
        """``activation``: what ``anti_aliased_snake`` makes."""
        snake, upsample, lowpass = activation.act, activation.upsample, activation.downsample.lowpass
        assert (upsample.ratio, upsample.kernel_size, lowpass.stride, lowpass.kernel_size) == (2, 12, 2, 12)
        channels = snake.alpha.shape[0]
        self.alpha, self.beta = snake.alpha.detach().exp()[:, None], snake.beta.detach().exp()[:, None]
        self.up = (upsample.ratio * upsample.filter).repeat(channels, 1, 1)
        self.down = lowpass.filter.repeat(channels, 1, 1)
        self.delay, self.kept = delay, REACH + delay

    def start(self, batch: int) -> Tensor:
        """Nothing before a signal."""
        return self.alpha.new_zeros(batch, self.alpha.shape[0], 0)

    def push(self, x: Tensor, state: Tensor, hold: int = 0, end: bool = False) -> tuple[Tensor, Tensor]:
        """(B, C, t) -> (B, C, t) when windowed, else what is determined (all that is left at the ``end``)."""
        joined = join(state, x)
        starts, ends = state.shape[-1] < self.kept, end or not self.delay
        sent = max(0, state.shape[-1] - self.delay) if starts else 0
        if joined.shape[-1] - sent - (0 if starts else REACH) - (0 if ends else REACH) > 0:
            y = self._activate(joined, starts, ends)[..., sent:]
        else:
            y = joined[..., :0]
        return y, _last(joined, self.kept, hold)

    def _activate(self, x: Tensor, starts: bool, ends: bool) -> Tensor:
        left, right = REACH * starts, REACH * ends
        channels = x.shape[1]
        if starts or ends:
            x = F.pad(x, (left, right), mode="replicate")
        # ``padding`` cuts what the transposed convolution makes from less than all of its taps.
        u = snake_beta(F.conv_transpose1d(x, self.up, stride=2, padding=2 * REACH, groups=channels), self.alpha, self.beta)
        if starts or ends:
            u = F.pad(u[..., left : u.shape[-1] - right], (left, right), mode="replicate")
        return F.conv1d(u, self.down, stride=2, groups=channels)
