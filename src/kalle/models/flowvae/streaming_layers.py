"""Layers that carry their past as an explicit value: any split of a signal into chunks gives the numbers of the whole.

A layer is ``push(x, state, ...) -> (y, new state)`` with (B, C, t) tensors, or (B, C, 1, t) in the paper's decoder; t may be 0. No state is
ever changed in place, so an older one can be continued again. A layer that looks ahead is used in one of two ways:

- *delayed*: it emits what its input determines and keeps the rest for the next push, or for the end;
- *windowed* (delay 0): it treats the last sample as the end of the signal and emits everything. The trailing ``hold``
  samples of its input are provisional: they are given again with the next push and leave no trace in the new state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalle.models.flowvae.inference import REACH, PreparedActivation, PreparedConv, PreparedUpsample, joined


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

    def __init__(self, conv: PreparedConv) -> None:
        self.conv, self.past = conv, conv.past

    def start(self, batch: int) -> Tensor:
        """The zeros before a signal."""
        return self.conv.zeros(batch, self.past)

    def push(self, whole: Tensor, hold: int = 0) -> tuple[Tensor, Tensor]:
        """``whole`` (B, C, 1, past + t), new samples behind the state -> (B, C', 1, t)."""
        if whole.shape[-1] == self.past:
            return self.conv.nothing(len(whole)), whole
        return self.conv(whole), _last(whole, self.past, hold)


class UpsampleStream:
    """``CausalUpsample1d`` with the previous input sample as state."""

    def __init__(self, up: PreparedUpsample) -> None:
        self.up, self.stride = up, up.stride

    def start(self, batch: int) -> Tensor:
        """The zero before a signal."""
        return self.up.conv.zeros(batch, 1)

    def push(self, x: Tensor, state: Tensor, hold: int = 0) -> tuple[Tensor, Tensor]:
        """(B, C, 1, t) -> (B, C', 1, t * stride)."""
        if not x.shape[-1]:
            return self.up.nothing(len(state)), state
        whole = joined([state, x.to(state.dtype)])
        return self.up(whole), _last(whole, 1, hold)


class DelayedConvStream:
    """A zero-padded "same" convolution, delayed by half its kernel."""

    def __init__(self, conv: PreparedConv) -> None:
        self.conv, self.delay = conv, conv.past // 2

    def start(self, batch: int) -> Tensor:
        """The zeros before a signal."""
        return self.conv.zeros(batch, self.delay)

    def push(self, x: Tensor, state: Tensor, end: bool = False) -> tuple[Tensor, Tensor]:
        """(B, C, 1, t) -> (B, C', 1, up to t samples; all that are left at the ``end``)."""
        after = [self.conv.zeros(len(state), self.delay)] if end else []
        whole = joined([state, x.to(state.dtype), *after])
        if whole.shape[-1] <= 2 * self.delay:
            return self.conv.nothing(len(state)), whole.clone()
        return self.conv(whole), _last(whole, 2 * self.delay, 0)


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

    def __init__(self, activation: PreparedActivation, delay: int) -> None:
        self.activation, self.delay, self.kept = activation, delay, REACH + delay

    def start(self, batch: int) -> Tensor:
        """Nothing before a signal."""
        return self.activation.nothing(batch)

    def push(self, x: Tensor, state: Tensor, past: Tensor, hold: int = 0, end: bool = False) -> tuple[Tensor, Tensor]:
        """(B, C, 1, t) -> behind ``past`` (B, C, 1, p), which the next layer has kept and whose dtype it takes, (B, C, 1, p + t).

        Not t when delayed, but what is determined (all that is left at the ``end``).
        """
        length = state.shape[-1] + x.shape[-1]
        starts, ends = state.shape[-1] < self.kept, end or not self.delay
        sent = max(0, state.shape[-1] - self.delay) if starts else 0
        whole = past
        if length - sent - (0 if starts else REACH) - (0 if ends else REACH) > 0:
            whole = self.activation.after(past, [state, x], starts, ends, sent)
        # Only the end is kept, which most often lies in ``x`` alone.
        seen = x if x.shape[-1] >= self.kept + hold else joined([state, x])
        return whole, _last(seen, self.kept, hold)
