"""The Flow-VAE's encoder: waveform to posterior parameters."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kalle.models.flowvae.config import EncoderConfig
from kalle.models.layers import in_full_precision, same_conv

_STAGE_SLOPE = 0.2
_RESIDUAL_SLOPE = 0.01
_SPEECH_RMS = 0.1
"""Typical level of speech, -20 dBFS: the first convolution starts by bringing it to unit variance."""
_INITIAL_LOG_STD = -1.0
"""The posterior starts narrower than the spread of its means, so that the decoder receives the signal from the first step."""


class ResidualLayer(nn.Module):
    """Dilated then plain convolution, added to the input: (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilated = same_conv(channels, channels, 3, dilation)
        self.plain = same_conv(channels, channels, 3)
        self.activation = nn.LeakyReLU(_RESIDUAL_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.plain(self.activation(self.dilated(self.activation(x))))


class EncoderStage(nn.Module):
    """Strided convolution, residual stack, activation: (B, C, T) -> (B, C', about T / stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, residual_layers: int) -> None:
        super().__init__()
        kernel_size = 2 * stride
        self.down = weight_norm(nn.Conv1d(channels_in, channels_out, kernel_size, stride, padding=(kernel_size - 1) // 2))
        self.residual = nn.Sequential(*(ResidualLayer(channels_out, 2**i) for i in range(residual_layers)))
        self.activation = nn.LeakyReLU(_STAGE_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.residual(self.down(x)))


class Encoder(nn.Module):
    """Waveform (B, 1, S) to parameters (B, 2D, T), mean then log_std. Not causal; the input is not padded to a whole frame."""

    def __init__(self, config: EncoderConfig, latent_dim: int) -> None:
        super().__init__()
        widths = config.channels
        self.conv_in = same_conv(1, widths[0], 3)
        self.activation = nn.LeakyReLU(_STAGE_SLOPE)
        self.stages = nn.Sequential(
            *(
                EncoderStage(before, after, stride, config.residual_layers)
                for before, after, stride in zip(widths[:-1], widths[1:], config.strides, strict=True)
            )
        )
        self.conv_out = same_conv(widths[-1], 2 * latent_dim, 3)
        if not self.conv_in.weight.is_meta:  # which is about to be given its weights
            self._initialise()

    def forward(self, wav: Tensor) -> Tensor:
        x = self.stages(self.activation(self.conv_in(wav)))
        # Posteriors may be narrower than what bf16 resolves of their means.
        return in_full_precision(self.conv_out, x)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Start with signals of unit variance at every depth.

        torch's default shrinks them by about the square root of 3 in each of the eight unnormalised convolutions on the
        main path; the posterior then hardly depends on the input and the first minutes of training are lost.
        """
        _variance_preserving(self.conv_in, 1 / _SPEECH_RMS)
        for stage in self.stages:
            assert isinstance(stage, EncoderStage)
            _variance_preserving(stage.down, nn.init.calculate_gain("leaky_relu", _STAGE_SLOPE))
            for layer in stage.residual:
                assert isinstance(layer, ResidualLayer)
                _variance_preserving(layer.dilated, nn.init.calculate_gain("leaky_relu", _RESIDUAL_SLOPE))
                _variance_preserving(layer.plain, 1 / math.sqrt(2 * len(stage.residual)))
        _variance_preserving(self.conv_out, 1.0)
        assert isinstance(self.conv_out, nn.Conv1d)
        weight, bias = self.conv_out.weight.clone(), self.conv_out.bias
        assert bias is not None
        log_std_rows = slice(len(bias) // 2, None)
        weight[log_std_rows] *= 0.01
        self.conv_out.weight = weight
        bias[log_std_rows] = _INITIAL_LOG_STD


def _variance_preserving(conv: nn.Module, gain: float) -> None:
    """Normal weights of standard deviation ``gain`` / sqrt(fan-in), zero bias; sets a weight-normed weight through its parts."""
    assert isinstance(conv, nn.Conv1d)
    assert conv.bias is not None
    _, channels_in, kernel_size = conv.weight.shape
    conv.weight = torch.randn_like(conv.weight) * gain / math.sqrt(channels_in * kernel_size)
    nn.init.zeros_(conv.bias)
