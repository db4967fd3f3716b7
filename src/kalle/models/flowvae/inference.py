"""The paper's decoder ready to decode: weights as the kernels want them, and the anti-aliased activation as few passes over memory.

Signals are (B, C, 1, n) here: with a height of 1 torch has kernels for images in the channels-last layout, which on a CPU are faster
than those for (B, C, n). Every function takes any layout; the results differ by rounding only.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalle.models.flowvae.bigvgan import EPSILON, AntiAliasedSnake, BigVGANDecoder, BigVGANStage
from kalle.models.layers import CausalConv1d, CausalUpsample1d

if TYPE_CHECKING:
    from kalle.models.flowvae.fused_activation import FusedActivation

logger = logging.getLogger(__name__)

REACH = 5
"""Samples that one anti-aliased activation sees to each side: half of two 12-tap filters at twice the rate."""
_BLOCK_VALUES = 1 << 16
"""Input values of an activation, for each thread, whose intermediate results stay in a core's cache."""
_LEAST_ALPHA = 1e-30
"""The activation divides by α; below this its sine is 0 in fp32 anyway."""
_MARGIN = 1.5
"""Channels-last is left out where it takes so many times as long: less would be decided by chance, and differently at the next start."""
_LEAST_CHANNELS = 8
"""Output channels below which torch leaves oneDNN's kernels for one ten times as slow; zeros are added."""


def joined(parts: Sequence[Tensor]) -> Tensor:
    """The signals ``parts`` (B, C, 1, n) one after the other; on a CPU channels-last, which torch.cat alone may not keep."""
    filled = [part for part in parts if part.shape[-1]] or [parts[0]]
    if len(filled) == 1:
        return filled[0]
    if torch.is_grad_enabled() or filled[0].device.type != "cpu":
        return torch.cat(filled, dim=-1)
    rows, channels = filled[0].shape[:2]
    whole = filled[0].new_empty(rows, 1, sum(part.shape[-1] for part in filled), channels).permute(0, 3, 1, 2)
    return torch.cat(filled, dim=-1, out=whole)


def _between(parts: Sequence[Tensor], begin: int, end: int) -> Tensor:
    """The samples from ``begin`` to ``end`` of the ``parts`` one after the other; a view where one part holds them all."""
    found, at = [], 0
    for part in parts:
        length = part.shape[-1]
        if at < end and begin < at + length:
            found.append(part[..., max(0, begin - at) : end - at])
        at += length
    return joined(found)


class PreparedConv:
    """A convolution with its weight norm computed once: (B, C, 1, n) -> (B, C', 1, n - dilation * (kernel - 1)), channels-last on a CPU."""

    def __init__(self, weight: Tensor, bias: Tensor, dilation: int = 1, dtype: torch.dtype | None = None) -> None:
        """``weight`` (C', C, k). ``dtype`` is that of the products; without one it is the weight's own."""
        weight, bias = weight.detach()[:, :, None].to(dtype or weight.dtype), bias.detach().to(dtype or bias.dtype)
        self.channels_out, self.channels_in, _, kernel_size = weight.shape
        self.dtype, self.device, self.dilation = weight.dtype, weight.device, dilation
        self.past = dilation * (kernel_size - 1)
        self.format = channels_last_on(weight.device)
        if self.format == torch.channels_last and self.channels_out < _LEAST_CHANNELS:
            rest = _LEAST_CHANNELS - self.channels_out
            weight, bias = F.pad(weight, (0, 0, 0, 0, 0, 0, 0, rest)), F.pad(bias, (0, rest))
        self.weight, self.bias = weight.contiguous(memory_format=self.format), bias

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype).contiguous(memory_format=self.format)
        if self.format == torch.channels_last and 2 * (x.shape[-1] - self.past) <= self.channels_out:
            return self._product(x)
        return F.conv2d(x, self.weight, self.bias, dilation=(1, self.dilation))[:, : self.channels_out]

    def _product(self, x: Tensor) -> Tensor:
        """The same as one product of matrices: for few samples torch's convolution takes longer to reorder its weight than to use it."""
        rows, channels, _, length = x.shape
        count, taps = length - self.past, self.weight.shape[-1]
        samples = x.permute(0, 2, 3, 1)[:, 0]
        seen = torch.stack([samples[:, tap * self.dilation : tap * self.dilation + count] for tap in range(taps)], dim=2)
        y = F.linear(seen.view(rows, count, taps * channels), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return y[:, None].permute(0, 3, 1, 2)[:, : self.channels_out]

    def zeros(self, batch: int, samples: int) -> Tensor:
        """Silence of its input."""
        zeros = torch.zeros(batch, self.channels_in, 1, samples, dtype=self.dtype, device=self.device)
        return zeros.contiguous(memory_format=self.format)

    def nothing(self, batch: int) -> Tensor:
        """Its output for no samples."""
        return torch.zeros(batch, self.channels_out, 1, 0, dtype=self.dtype, device=self.device)


@cache
def channels_last_on(device: torch.device) -> torch.memory_format:
    """The memory format of signals on ``device``: on a CPU channels-last unless it is measured, once, to be much slower here."""
    if device.type != "cpu":
        return torch.contiguous_format
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(size, generator=generator) for size in ((96, 96, 1, 7), (1, 96, 1, 1030)))
    return torch.channels_last if _seconds(x, weight, torch.channels_last) < _MARGIN * _seconds(x, weight) else torch.contiguous_format


@torch.inference_mode()
def _seconds(x: Tensor, weight: Tensor, layout: torch.memory_format = torch.contiguous_format) -> float:
    x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
    return _least_seconds(lambda: F.conv2d(x, weight))


def _least_seconds(run: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


class PreparedUpsample:
    """``CausalUpsample1d`` as a convolution of two taps with ``stride`` times the channels: (B, C, 1, 1 + n) -> (B, C', 1, n * stride).

    The first sample is the one before the signal.
    """

    def __init__(self, layer: CausalUpsample1d, dtype: torch.dtype | None = None) -> None:
        weight, bias = layer.conv.weight.detach(), layer.conv.bias.detach()
        channels_in, self.channels, _ = weight.shape
        self.stride, self.dtype = layer.stride, weight.dtype
        taps = weight.view(channels_in, self.channels, 2, self.stride).flip(2)  # the second half meets the sample before
        self.conv = PreparedConv(taps.permute(3, 1, 0, 2).reshape(-1, channels_in, 2), bias.repeat(self.stride), dtype=dtype)

    def nothing(self, batch: int) -> Tensor:
        """Its output for no samples."""
        return self.conv.nothing(batch)[:, : self.channels]

    def __call__(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        # In channels-last memory the result already is a sample after the other.
        steps = y.permute(0, 2, 3, 1).reshape(len(y), 1, y.shape[-1] * self.stride, self.channels).permute(0, 3, 1, 2)
        return steps.contiguous(memory_format=self.conv.format).to(self.dtype)


class PreparedActivation:
    """`AntiAliasedSnake`, by blocks that stay in the cache.

    Upsampling makes from six samples the two values between the middle ones, u[2t - 1] and u[2t], the rows of an image; so both filters are
    depthwise convolutions. α is part of the upsampling filter and taken out by the downsampling one. Where nothing needs a gradient, one
    compiled pass does all of it (`kalle.models.flowvae.fused_activation`) if that is faster here.
    """

    def __init__(self, activation: Any, fused: type[FusedActivation] | None = None) -> None:
        """``activation``: an `AntiAliasedSnake`, or anything of its parts; ``fused``: what `fused_activation` returns."""
        snake, upsample, lowpass = activation.act, activation.upsample, activation.downsample.lowpass
        assert (upsample.ratio, upsample.kernel_size, lowpass.stride, lowpass.kernel_size) == (2, 12, 2, 12)
        alpha, beta = (parameter.detach().exp() for parameter in (snake.alpha, snake.beta))
        alpha = alpha.clamp(min=_LEAST_ALPHA)[:, None, None, None]
        self.channels = len(alpha)
        up = upsample.ratio * upsample.filter.flatten()
        # A height of 1 padded by 1 meets the lower row of the filter first.
        self.up = (alpha * torch.stack([up[1::2], up[0::2]]).flip(1)).contiguous(memory_format=torch.channels_last)
        self.scale = alpha[:, 0] / (beta[:, None, None] + EPSILON)
        self.down = (lowpass.filter.view(1, 6, 2).transpose(1, 2) / alpha).contiguous(memory_format=torch.channels_last)
        self.fused = None
        if fused is not None and self.up.dtype == torch.float32:
            filters = torch.stack([up[0::2], up[1::2]]).flip(1), lowpass.filter.view(6, 2).t()
            self.fused = fused(*filters, snake.alpha.detach().exp() / math.pi, 1 / (beta + EPSILON))

    def nothing(self, batch: int) -> Tensor:
        """Its input or output for no samples."""
        return self.up.new_zeros(batch, self.channels, 1, 0)

    def __call__(self, parts: Sequence[Tensor], starts: bool, ends: bool) -> list[Tensor]:
        """(B, C, 1, n) in pieces of the signal (B, C, 1, n) that the ``parts`` are; ``REACH`` samples fewer at an edge that isn't its own.

        ``starts`` and ``ends``: whether the signal begins and ends there, where the filters see the edge's sample repeated.
        """
        parts = [part for part in parts if part.shape[-1]]
        if starts:
            parts.insert(0, parts[0][..., :1].expand(-1, -1, -1, REACH))
        if ends:
            parts.append(parts[-1][..., -1:].expand(-1, -1, -1, REACH))
        count = sum(part.shape[-1] for part in parts) - 2 * REACH
        step = count
        if parts[0].device.type == "cpu":
            step = max(4 * REACH, _BLOCK_VALUES * torch.get_num_threads() // (self.channels * len(parts[0])))
        return [
            self._block(_between(parts, at, min(at + step, count) + 2 * REACH), starts and at == 0, ends and at + step >= count)
            for at in range(0, count, step)
        ]

    def after(self, past: Tensor, parts: Sequence[Tensor], starts: bool, ends: bool, sent: int = 0) -> Tensor:
        """The same without its first ``sent`` samples behind ``past`` (B, C, 1, p), in the dtype of ``past``: (B, C, 1, p + n)."""
        if self.fused is not None and not torch.is_grad_enabled() and self.fused.takes(past, parts):
            return self.fused.after(past, parts, starts, ends, sent)
        pieces = self(parts, starts, ends)
        pieces[0] = pieces[0][..., sent:]
        return joined([past, *(piece.to(past.dtype) for piece in pieces)])

    def _block(self, x: Tensor, starts: bool, ends: bool) -> Tensor:
        angle = F.conv2d(x.to(self.up.dtype), self.up, padding=(1, 0), groups=self.channels)
        sine = angle.sin()
        square = sine.square() if sine.requires_grad else sine.square_()
        value = square.mul_(self.scale).add_(angle)
        # The filter downwards sees the first and the last of the values repeated.
        if starts:
            value[..., :2] = value[:, :, 1:, 2:3].clone()
            value[:, :, 0, 2] = value[:, :, 1, 2].clone()
        if ends:
            value[..., -2:] = value[:, :, :1, -3:-2].clone()
            value[:, :, 1, -3] = value[:, :, 0, -3].clone()
        return F.conv2d(value, self.down, groups=self.channels)


@cache
def fused_activation() -> type[FusedActivation] | None:
    """The activation in one pass for this CPU, told once; None where it cannot be had, or is measured to be slower."""
    if importlib.util.find_spec("numba") is None:
        logger.info("the decoder's activations are computed by torch: numba is not installed (extra fast)")
        return None
    activation = AntiAliasedSnake(96)
    x = torch.zeros(1, 1, 4096, 96).permute(0, 3, 1, 2)
    try:
        from kalle.models.flowvae.fused_activation import FusedActivation

        by_torch, by_numba = (_activation_seconds(PreparedActivation(activation, kind), x) for kind in (None, FusedActivation))
    except Exception as error:  # numba's have no base of their own: an unknown numpy or processor, compiling switched off, a damaged cache
        logger.info("the decoder's activations are computed by torch: numba cannot be used here (%s)", " ".join(str(error).split())[:200])
        return None
    chosen = by_numba < by_torch
    message = "the decoder's activations are computed by %s: %.2f ms by numba, %.2f by torch"
    logger.info(message, "numba" if chosen else "torch", 1e3 * by_numba, 1e3 * by_torch)
    return FusedActivation if chosen else None


@torch.inference_mode()
def _activation_seconds(activation: PreparedActivation, x: Tensor) -> float:
    return _least_seconds(lambda: activation.after(x[..., :0], [x], True, True))


class PreparedBlock:
    """The layers of an `AMPBlock`, in their order: activation, dilated convolution, activation, plain convolution."""

    def __init__(self, block: Any, dtype: torch.dtype | None, fused: type[FusedActivation] | None) -> None:
        activations = [PreparedActivation(activation, fused) for activation in block.activations]
        convs = [[prepared_conv(conv, dtype) for conv in convs] for convs in (block.dilated, block.plain)]
        self.pairs = tuple(zip(activations[::2], convs[0], activations[1::2], convs[1], strict=True))


class PreparedStage:
    """The layers of a `BigVGANStage`."""

    def __init__(self, stage: BigVGANStage, dtype: torch.dtype | None, fused: type[FusedActivation] | None) -> None:
        self.up = PreparedUpsample(stage.up, dtype)
        self.blocks = [PreparedBlock(block, dtype, fused) for block in stage.blocks]


class PreparedDecoder:
    """The layers of a `BigVGANDecoder` with its weights as they are now."""

    def __init__(self, decoder: BigVGANDecoder, dtype: torch.dtype | None = None) -> None:
        """``dtype`` is that of the convolutions; the activations, the residual sums and the last convolution keep the weights' own."""
        conv_in = decoder.conv_in
        assert isinstance(conv_in, nn.Conv1d)
        assert conv_in.bias is not None
        self.conv_in = PreparedConv(conv_in.weight, conv_in.bias, dtype=dtype)
        # The compiled pass reads channels-last signals.
        fused = fused_activation() if self.conv_in.format == torch.channels_last else None
        self.stages = [PreparedStage(stage, dtype, fused) for stage in decoder.stages if isinstance(stage, BigVGANStage)]
        self.activation_out = PreparedActivation(decoder.activation_out, fused)
        self.conv_out = prepared_conv(decoder.conv_out, None)
        self.finish = decoder.finish


def prepared_conv(layer: nn.Module, dtype: torch.dtype | None = None) -> PreparedConv:
    """``layer``, a `CausalConv1d`, without the zeros before the signal."""
    assert isinstance(layer, CausalConv1d), type(layer)
    return PreparedConv(layer.conv.weight, layer.conv.bias, layer.conv.dilation[0], dtype)
