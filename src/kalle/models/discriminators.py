"""BigVGAN v1's multi-period and multi-resolution discriminators (arXiv 2206.04658; https://github.com/NVIDIA/BigVGAN, MIT).

Legend: B batch, S samples, P period, F frequency bins, N scores of one sub-discriminator.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

from kalle.checkpoint import check_fields
from kalle.errors import UserError
from kalle.models.layers import SPEECH_RMS, variance_preserving

LEAKY_SLOPE = 0.1
_LEAST_MAGNITUDE = 1e-3
_MEAN_LOG_MAGNITUDE, _STD_LOG_MAGNITUDE = -2.0, 2.0
"""Roughly those of speech at -20 dBFS in windows of 256 to 1024 samples, in nepers."""
_INITIAL_SCORE = 0.3
"""Standard deviation of the first scores: well below the distance of 1 between real and generated."""


@dataclass(frozen=True)
class DiscriminatorConfig:
    """Sizes of the discriminators; the defaults are BigVGAN v1's at 16 to 24 kHz."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)
    """Folding periods in samples, one sub-discriminator each."""
    resolutions: tuple[tuple[int, int, int], ...] = ((1024, 120, 600), (2048, 240, 1200), (512, 50, 240))
    """(n_fft, hop, win) in samples, one sub-discriminator each."""
    period_channels: tuple[int, ...] = (32, 128, 512, 1024, 1024)
    """Output channels of the period convolutions; the last has stride 1, the others 3."""
    resolution_channels: int = 32
    """Channels of every convolution on a spectrogram."""
    width: float = 1.0
    """Multiplier of all channel counts, for small models."""
    log_magnitude: bool = False
    """Spectrograms as logarithms, in which noise between the harmonics counts as they do. BigVGAN's are linear."""
    variance_preserving: bool = False
    """Start with signals of unit variance at every depth. torch's default, which BigVGAN has, shrinks them from layer to layer, and
    narrow discriminators then stay undecided for thousands of steps."""

    def __post_init__(self) -> None:
        check_fields(self, "discriminators")
        # A YAML file gives lists; tuples keep the configuration hashable and comparable.
        object.__setattr__(self, "periods", tuple(self.periods))
        object.__setattr__(self, "resolutions", tuple(tuple(resolution) for resolution in self.resolutions))
        object.__setattr__(self, "period_channels", tuple(self.period_channels))
        if not self.periods and not self.resolutions:
            raise UserError("discriminators: got no period and no resolution, expected at least one; set periods or resolutions")
        if min(self.scaled(channels) for channels in (*self.period_channels, self.resolution_channels)) < 1:
            raise UserError(f"discriminators: got width {self.width}, which leaves a convolution without channels; use a larger width")

    def scaled(self, channels: int) -> int:
        """``channels`` times ``width``."""
        return int(channels * self.width)


@dataclass(frozen=True)
class DiscriminatorOutput:
    """The output of discriminators for waveforms."""

    scores: list[Tensor] = field(default_factory=list)
    """One (B, N_i) per sub-discriminator."""
    features: list[list[Tensor]] = field(default_factory=list)
    """Per sub-discriminator, the output of every convolution, the last (score) one included."""

    def __add__(self, other: DiscriminatorOutput) -> DiscriminatorOutput:
        """The sub-discriminators of both."""
        return DiscriminatorOutput(self.scores + other.scores, self.features + other.features)

    def split(self, batch: int) -> tuple[DiscriminatorOutput, DiscriminatorOutput]:
        """The first ``batch`` items and the rest, for real and generated audio scored in one pass."""
        halves = (slice(None, batch), slice(batch, None))
        first, rest = (
            DiscriminatorOutput([score[part] for score in self.scores], [[fmap[part] for fmap in fmaps] for fmaps in self.features])
            for part in halves
        )
        return first, rest


def _run(convs: Iterable[nn.Module], conv_post: nn.Module, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """``x`` (B, 1, H, W) through the convolutions: flattened scores (B, N) and the feature maps (B, C, H', W')."""
    features = []
    for conv in convs:
        x = F.leaky_relu(conv(x), LEAKY_SLOPE)
        features.append(x)
    x = conv_post(x)
    features.append(x)
    return x.flatten(1), features


class PeriodDiscriminator(nn.Module):
    """Scores a waveform folded to rows of ``period`` samples, without mixing the columns."""

    def __init__(self, period: int, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.period = period
        channels = [1, *(config.scaled(count) for count in config.period_channels)]
        strides = [3] * (len(channels) - 2) + [1]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(before, after, (5, 1), (stride, 1), padding=(2, 0)))
            for before, after, stride in zip(channels[:-1], channels[1:], strides, strict=True)
        )
        self.conv_post = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def fold(self, wav: Tensor) -> Tensor:
        """``wav`` (B, S), reflected at its end to a multiple of P, as (B, 1, S' / P, P)."""
        missing = -wav.shape[1] % self.period
        padded = F.pad(wav.unsqueeze(1), (0, missing), mode="reflect")
        return padded.view(wav.shape[0], 1, -1, self.period)

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``wav`` (B, S) to scores (B, N) and feature maps."""
        return _run(self.convs, self.conv_post, self.fold(wav))


class ResolutionDiscriminator(nn.Module):
    """Scores a magnitude spectrogram of one resolution, taken with a rectangular window."""

    window: Tensor

    def __init__(self, resolution: tuple[int, int, int], config: DiscriminatorConfig) -> None:
        super().__init__()
        self.n_fft, self.hop, self.win = resolution
        self.log_magnitude = config.log_magnitude
        self.register_buffer("window", torch.ones(self.win), persistent=False)
        width = config.scaled(config.resolution_channels)
        self.convs = nn.ModuleList(
            [
                weight_norm(nn.Conv2d(1, width, (3, 9), padding=(1, 4))),
                *(weight_norm(nn.Conv2d(width, width, (3, 9), stride=(1, 2), padding=(1, 4))) for _ in range(3)),
                weight_norm(nn.Conv2d(width, width, (3, 3), padding=(1, 1))),
            ]
        )
        self.conv_post = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=(1, 1)))

    def spectrogram(self, wav: Tensor) -> Tensor:
        """``wav`` (B, S) to magnitudes (B, F, frames), or their logarithms, in fp32: half precision has too small a range."""
        padding = (self.n_fft - self.hop) // 2
        padded = F.pad(wav.float().unsqueeze(1), (padding, padding), mode="reflect").squeeze(1)
        magnitude = torch.stft(padded, self.n_fft, self.hop, self.win, self.window.float(), center=False, return_complex=True).abs()
        if not self.log_magnitude:
            return magnitude
        return (magnitude.clamp(min=_LEAST_MAGNITUDE).log() - _MEAN_LOG_MAGNITUDE) / _STD_LOG_MAGNITUDE

    def forward(self, wav: Tensor) -> tuple[Tensor, list[Tensor]]:
        """``wav`` (B, S), S > (n_fft - hop) / 2, to scores (B, N) and feature maps."""
        spectrogram = self.spectrogram(wav).to(self.conv_post.bias.dtype)
        image = spectrogram.unsqueeze(1)
        if image.device.type == "cpu":
            # oneDNN takes two to six times as long for few channels in the usual layout; the convolutions keep the one they are given.
            image = image.to(memory_format=torch.channels_last)
        return _run(self.convs, self.conv_post, image)


def _judge(discriminators: Iterable[nn.Module], wav: Tensor) -> DiscriminatorOutput:
    """Collect the scores and feature maps of several sub-discriminators."""
    assert wav.dim() == 2, f"discriminators take (batch, samples): got {tuple(wav.shape)}"
    output = DiscriminatorOutput()
    for discriminator in discriminators:
        scores, features = discriminator(wav)
        output.scores.append(scores)
        output.features.append(features)
    return output


class MultiPeriodDiscriminator(nn.Module):
    """One ``PeriodDiscriminator`` per period."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(PeriodDiscriminator(period, config) for period in config.periods)

    def forward(self, wav: Tensor) -> DiscriminatorOutput:
        """``wav`` (B, S) in [-1, 1] to scores and feature maps of every period."""
        return _judge(self.discriminators, wav)


class MultiResolutionDiscriminator(nn.Module):
    """One ``ResolutionDiscriminator`` per (n_fft, hop, win)."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.discriminators = nn.ModuleList(ResolutionDiscriminator(resolution, config) for resolution in config.resolutions)

    def forward(self, wav: Tensor) -> DiscriminatorOutput:
        """``wav`` (B, S) in [-1, 1] to scores and feature maps of every resolution."""
        return _judge(self.discriminators, wav)


class Discriminators(nn.Module):
    """Both kinds as one module: what Flow-VAE training optimises against the generator."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.mpd = MultiPeriodDiscriminator(config)
        self.mrd = MultiResolutionDiscriminator(config)
        if config.variance_preserving and not next(self.parameters()).is_meta:
            self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        gain = nn.init.calculate_gain("leaky_relu", LEAKY_SLOPE)
        # A spectrogram has about unit variance as it is: as a logarithm by its scale, as a magnitude by the window's length.
        for sub, first in ((self.mpd, gain / SPEECH_RMS), (self.mrd, gain)):
            for discriminator in sub.discriminators:
                assert isinstance(discriminator, PeriodDiscriminator | ResolutionDiscriminator)
                for index, conv in enumerate(discriminator.convs):
                    variance_preserving(conv, first if index == 0 else gain)
                variance_preserving(discriminator.conv_post, _INITIAL_SCORE)

    def forward(self, wav: Tensor) -> DiscriminatorOutput:
        """``wav`` (B, S) in [-1, 1] to the scores and feature maps of all periods, then all resolutions."""
        periods: DiscriminatorOutput = self.mpd(wav)
        return periods + self.mrd(wav)
