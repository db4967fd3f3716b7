"""A decoder for machines without a GPU: ConvNeXt blocks at the STFT's rate and an inverse-STFT head.

Not in the KALL-E paper. The idea is that of Vocos (arXiv 2306.00814): predict magnitude and phase, let the inverse
Fourier transform do the upsampling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalle.models.flowvae.config import ISTFTConfig
from kalle.models.layers import in_full_precision
from kalle.seeds import standard_noise

_MAX_LOG_MAGNITUDE = 5.0
"""exp(5) is far above what a full-scale signal needs; the limit keeps an early step from overflowing."""
MIN_ENVELOPE = 1e-8
"""Lower limit of the envelope that divides the overlapped samples."""
_INITIAL_LOG_MAGNITUDE = -3.0
"""Start near silence: at exp(0) the first outputs are noise tens of decibels too loud."""
NOISE_FRAMES = 512
"""STFT frames after which the noise of a head begins again: five seconds at 100 Hz."""
_INITIAL_LOG_NOISE = -4.0
"""The noise of a head starts below what is heard of speech."""


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer norm, two pointwise layers, scaled residual: (B, C, T) -> (B, C, T).

    Source: ConvNeXt (arXiv 2201.03545), in one dimension.
    """

    def __init__(self, channels: int, expansion: int, kernel_size: int, scale: float) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(channels, channels, kernel_size, padding=kernel_size // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.widen = nn.Linear(channels, expansion * channels)
        self.narrow = nn.Linear(expansion * channels, channels)
        self.scale = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.depthwise(x))

    def mix(self, x: Tensor) -> Tensor:
        """The layers after the depthwise convolution, frame by frame: (B, C, N) -> (B, C, N)."""
        inner = self.norm(x.transpose(1, 2))
        inner = self.narrow(F.gelu(self.widen(inner)))
        return (self.scale * inner).transpose(1, 2)


class ISTFTHead(nn.Module):
    """Hidden frames (B, C, N) to a waveform (B, N * hop) through log-magnitude and phase.

    With ``noise`` there is a second magnitude for every bin, that of white noise, which is the same in every run and a function of the
    place in the signal. A network that is given nothing random can only repeat itself where speech is noise: frame by frame the same
    phases, which is heard as a buzz.
    """

    window: Tensor
    white: Tensor

    def __init__(self, channels: int, n_fft: int, hop_length: int, noise: bool = False) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.noise = nn.Linear(channels, n_fft // 2 + 1) if noise else None
        self.project = nn.Linear(channels, n_fft + 2)
        with torch.no_grad():
            self.project.bias[: n_fft // 2 + 1].fill_(_INITIAL_LOG_MAGNITUDE)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        if self.noise is not None:
            self.silence_noise()
            self.register_buffer("white", white_frames(n_fft, hop_length), persistent=False)

    @torch.no_grad()
    def silence_noise(self) -> None:
        """Start again with noise that is hardly heard, the same in all bins."""
        assert self.noise is not None
        nn.init.zeros_(self.noise.weight)
        nn.init.constant_(self.noise.bias, _INITIAL_LOG_NOISE)

    @property
    def trim(self) -> int:
        """Samples cut from the beginning of what the frames cover.

        N frames cover (N - 1) * hop + n_fft samples; the surplus of n_fft - hop is cut evenly, leaving N * hop.
        """
        return (self.n_fft - self.hop_length) // 2

    def forward(self, x: Tensor, first: int | Tensor = 0) -> Tensor:
        frames = self.frames(x, first)
        kept = slice(self.trim, self.trim + frames.shape[1] * self.hop_length)
        return self.overlap_add(frames)[:, kept] / self.envelope(frames.shape[1])[:, kept].clamp(min=MIN_ENVELOPE)

    def frames(self, x: Tensor, first: int | Tensor = 0) -> Tensor:
        """Windowed frames (B, N, n_fft) of the hidden frames (B, C, N), of which ``first``, or (B,) of them, is the place in the noise."""
        parameters = in_full_precision(self.project, x.transpose(1, 2))
        log_magnitude, phase = parameters.float().chunk(2, dim=-1)
        magnitude = log_magnitude.clamp(max=_MAX_LOG_MAGNITUDE).exp()
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        if self.noise is not None:
            level = in_full_precision(self.noise, x.transpose(1, 2)).float().clamp(max=_MAX_LOG_MAGNITUDE).exp()
            places = torch.as_tensor(first, device=x.device)[..., None] + torch.arange(x.shape[-1], device=x.device)
            spectrum = spectrum + level * torch.view_as_complex(self.white[places % NOISE_FRAMES].float())
        return torch.fft.irfft(spectrum, n=self.n_fft, dim=-1) * self.window

    def overlap_add(self, frames: Tensor) -> Tensor:
        """All that the frames (B, N, n_fft) cover, (B, (N - 1) * hop + n_fft)."""
        length = (frames.shape[1] - 1) * self.hop_length + self.n_fft
        return F.fold(frames.transpose(1, 2), (1, length), (1, self.n_fft), stride=(1, self.hop_length))[:, 0, 0]

    def envelope(self, count: int) -> Tensor:
        """The sum of squared windows under ``count`` overlapped frames, (1, (count - 1) * hop + n_fft)."""
        return self.overlap_add(self.window.square().expand(1, count, -1))


def white_frames(n_fft: int, hop_length: int) -> Tensor:
    """Spectra of frames of white noise, whose bins have a mean square of 1: (NOISE_FRAMES, n_fft // 2 + 1, 2), real and imaginary parts.

    The signal that they are frames of is a loop, so that the last go on with the first.
    """
    loop = standard_noise((NOISE_FRAMES * hop_length,), "noise of the inverse-STFT decoder")
    window = torch.hann_window(n_fft)
    frames = loop.repeat(1 + -(-n_fft // len(loop))).unfold(0, n_fft, hop_length)[:NOISE_FRAMES]
    return torch.view_as_real(torch.fft.rfft(frames * window / window.square().sum().sqrt()))


class ISTFTDecoder(nn.Module):
    """Latents (B, D, T) to a waveform (B, T * hop); may exceed [-1, 1] slightly. Looks ahead by a bounded number of frames."""

    def __init__(self, config: ISTFTConfig, latent_dim: int) -> None:
        super().__init__()
        self.upsample = config.upsample
        self.conv_in = nn.Conv1d(latent_dim, config.channels, 3, padding=1)
        self.spread = nn.Linear(config.channels, config.upsample * config.channels)
        self.blocks = nn.ModuleList(
            ConvNeXtBlock(config.channels, config.expansion, config.kernel_size, 1 / config.blocks) for _ in range(config.blocks)
        )
        self.norm = nn.LayerNorm(config.channels, eps=1e-6)
        self.head = ISTFTHead(config.channels, config.n_fft, config.hop_length_stft, config.noise)

    def forward(self, z: Tensor, first: int | Tensor = 0) -> Tensor:
        """``first``, or (B,) of them, is the STFT frame of the noise that the signal begins with, where the decoder has noise."""
        x = self.widen(self.conv_in(z))
        for block in self.blocks:
            x = block(x)
        return self.head(self.normalise(x), first)

    def widen(self, x: Tensor) -> Tensor:
        """Latent frames after the first convolution to the STFT's rate: (B, C, T) -> (B, C, T * upsample)."""
        x = F.gelu(x).transpose(1, 2)
        batch, frames, channels = x.shape
        return self.spread(x).view(batch, frames * self.upsample, channels).transpose(1, 2)

    def normalise(self, x: Tensor) -> Tensor:
        """The last layer norm, over channels: (B, C, N) -> (B, C, N)."""
        return self.norm(x.transpose(1, 2)).transpose(1, 2)
