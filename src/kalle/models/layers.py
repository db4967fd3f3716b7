"""Convolutions shared by the Flow-VAE's parts. Layout inside the models is (B, C, T)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm


def same_conv(channels_in: int, channels_out: int, kernel_size: int, dilation: int = 1) -> nn.Module:
    """Weight-normed convolution with zero padding on both sides that keeps the length (odd kernels)."""
    return weight_norm(nn.Conv1d(channels_in, channels_out, kernel_size, dilation=dilation, padding=dilation * (kernel_size - 1) // 2))


class CausalConv1d(nn.Module):
    """Weight-normed convolution that sees the present and the past only: (B, C, T) -> (B, C', T)."""

    def __init__(self, channels_in: int, channels_out: int, kernel_size: int, dilation: int = 1) -> None:
        super().__init__()
        self.past = dilation * (kernel_size - 1)
        self.conv = weight_norm(nn.Conv1d(channels_in, channels_out, kernel_size, dilation=dilation))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (self.past, 0)))


class CausalUpsample1d(nn.Module):
    """Transposed convolution with kernel 2 * stride, trimmed at the end: (B, C, T) -> (B, C', T * stride).

    Output sample t depends on the inputs up to floor(t / stride) only.
    """

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.conv = weight_norm(nn.ConvTranspose1d(channels_in, channels_out, 2 * stride, stride))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., : -self.stride]


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """A block outside any autocast of ``device``. The meta device, on which models are only measured, has none to leave."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)


def in_full_precision(layer: nn.Module, x: Tensor) -> Tensor:
    """``layer(x)`` outside any autocast, in the dtype of the layer's parameters.

    For the last layer of a network whose output is a signal: rounded to bf16, a waveform carries noise at -54 dB.
    """
    dtypes = [parameter.dtype for parameter in layer.parameters()]
    with without_autocast(x.device):
        return layer(x.to(dtypes[0]) if dtypes else x)


SPEECH_RMS = 0.1
"""Typical level of speech, -20 dBFS: a first convolution starts by bringing it to unit variance."""


def variance_preserving(conv: nn.Module, gain: float) -> None:
    """Normal weights of standard deviation ``gain`` / sqrt(fan-in), zero bias; sets a weight-normed weight through its parts."""
    assert isinstance(conv, nn.Conv1d | nn.Conv2d)
    assert conv.bias is not None
    conv.weight = torch.randn_like(conv.weight) * gain / math.sqrt(conv.weight[0].numel())
    nn.init.zeros_(conv.bias)
