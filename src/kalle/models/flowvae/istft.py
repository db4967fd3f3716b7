"""A decoder for machines without a GPU: ConvNeXt blocks at the STFT's rate and an inverse-STFT head.

Not in the KALL-E paper. The idea is that of Vocos (arXiv 2306.00814): predict magnitude and phase, let the inverse
Fourier transform do the upsampling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

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
_INITIAL_LOG_HARMONICS = -3.0
"""The harmonics of a head start below what is heard of speech, too."""
_QUIET_LOG_HARMONICS = -7.0
"""Mean log-magnitude in the lowest quarter of the bins in pauses. At -4, which frames within words reach too, DistillMOS was 0.15 lower."""
_MEAN_LOG_PITCH, _LOG_PITCH_RANGE = math.log(8.0), math.log(4.0)
"""Of the predicted pitch, in nepers of bins: 200 Hz with 640 samples at 16 kHz, and two octaves to both sides."""
_LOBE = 2.0
"""Half the width of a Hann window's main lobe, in bins."""
_BESIDE = 1e-3
"""Bins by which the transform of a window is evaluated beside its two removable singularities."""


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


@dataclass(frozen=True)
class HarmonicsState:
    """Where the harmonics of B signals are."""

    phase: Tensor
    """Of the fundamental at the centre of the last frame, in radians, (B,), fp64 (fp32 on MPS); a frame before the first is at 0."""
    pitch: Tensor
    """Of the last frame, in bins, (B,), of the same dtype; 0 before the first frame, which then begins at the phase."""


class ISTFTHead(nn.Module):
    """Hidden frames (B, C, N) to a waveform (B, N * hop) through log-magnitude and phase.

    With ``noise`` there is a second magnitude for every bin, that of white noise, which is the same in every run and a function of the
    place in the signal. A network that is given nothing random can only repeat itself where speech is noise: frame by frame the same
    phases, which is heard as a buzz. With ``harmonics`` there are those of a predicted pitch, whose phases are summed up over the frames,
    which a convolution can't do, and a third magnitude and phase for every bin that filters them.
    """

    window: Tensor
    white: Tensor

    def __init__(self, channels: int, n_fft: int, hop_length: int, noise: bool = False, harmonics: bool = False) -> None:
        super().__init__()
        self.n_fft, self.hop_length = n_fft, hop_length
        self.noise = nn.Linear(channels, n_fft // 2 + 1) if noise else None
        self.project = nn.Linear(channels, n_fft + 2)
        with torch.no_grad():
            self.project.bias[: n_fft // 2 + 1].fill_(_INITIAL_LOG_MAGNITUDE)
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.harmonics = nn.Linear(channels, n_fft + 2) if harmonics else None
        self.pitch = nn.Linear(channels, 1) if harmonics else None
        self.silence()
        if self.noise is not None:
            self.register_buffer("white", white_frames(n_fft, hop_length), persistent=False)

    @torch.no_grad()
    def silence(self) -> None:
        """Start with noise and harmonics that are hardly heard, the same in all bins."""
        for layer, level in ((self.noise, _INITIAL_LOG_NOISE), (self.harmonics, _INITIAL_LOG_HARMONICS)):
            if layer is not None:
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)
                layer.bias[: self.n_fft // 2 + 1].fill_(level)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Give the magnitudes of a trained spectrum to the harmonics, which would hardly be used if they had to grow beside it."""
        assert self.harmonics is not None
        bins = self.n_fft // 2 + 1
        self.harmonics.weight[:bins] = self.project.weight[:bins]
        self.harmonics.bias[:bins] = self.project.bias[:bins] + 1.0
        self.project.bias[:bins] -= 2.0

    @property
    def trim(self) -> int:
        """Samples cut from the beginning of what the frames cover.

        N frames cover (N - 1) * hop + n_fft samples; the surplus of n_fft - hop is cut evenly, leaving N * hop.
        """
        return (self.n_fft - self.hop_length) // 2

    def forward(self, x: Tensor, noise_start: int | Tensor = 0, pitch: Tensor | None = None) -> Tensor:
        frames, _ = self.frames(x, noise_start, pitch=pitch)
        kept = slice(self.trim, self.trim + frames.shape[1] * self.hop_length)
        return self.overlap_add(frames)[:, kept] / self.envelope(frames.shape[1])[:, kept].clamp(min=MIN_ENVELOPE)

    def start(self, batch: int) -> HarmonicsState:
        """The harmonics before the first frame of ``batch`` signals."""
        # Apple's devices have no fp64; phases begin anew in pauses, so fp32 is as good there as rounding allows.
        dtype = torch.float32 if self.window.device.type == "mps" else torch.float64
        nothing = torch.zeros(batch, dtype=dtype, device=self.window.device)
        return HarmonicsState(nothing, nothing)

    def log_pitch(self, x: Tensor) -> Tensor:
        """Predicted logarithm of the pitch in bins, (B, N), of the hidden frames (B, C, N)."""
        assert self.pitch is not None
        value = in_full_precision(self.pitch, x.transpose(1, 2)).float()[..., 0]
        return _MEAN_LOG_PITCH + value.clamp(-_LOG_PITCH_RANGE, _LOG_PITCH_RANGE)

    def frames(
        self, x: Tensor, noise_start: int | Tensor = 0, state: HarmonicsState | None = None, pitch: Tensor | None = None
    ) -> tuple[Tensor, HarmonicsState]:
        """Windowed frames (B, N, n_fft) of the hidden frames (B, C, N), and the state after them.

        ``noise_start``, or (B,) of them, is the place of the first frame in the noise; ``state`` is that of the harmonics before it.
        ``pitch`` (B, N) in bins takes the place of the predicted one where it is not NaN.
        """
        state = self.start(len(x)) if state is None else state
        parameters = in_full_precision(self.project, x.transpose(1, 2))
        log_magnitude, phase = parameters.float().chunk(2, dim=-1)
        magnitude = log_magnitude.clamp(max=_MAX_LOG_MAGNITUDE).exp()
        spectrum = torch.complex(magnitude * phase.cos(), magnitude * phase.sin())
        if self.noise is not None:
            level = in_full_precision(self.noise, x.transpose(1, 2)).float().clamp(max=_MAX_LOG_MAGNITUDE).exp()
            places = torch.as_tensor(noise_start, device=x.device)[..., None] + torch.arange(x.shape[-1], device=x.device)
            spectrum = spectrum + level * torch.view_as_complex(self.white[places % NOISE_FRAMES].float())
        if self.harmonics is not None:
            log_filter, turn = in_full_precision(self.harmonics, x.transpose(1, 2)).float().chunk(2, dim=-1)
            with torch.no_grad():
                # Detached, for torch's counter of operations (a dry run) wants the history of what it sees, which is not kept here.
                predicted = self.log_pitch(x.detach()).exp()
                chosen = (predicted if pitch is None else torch.where(pitch.isnan(), predicted, pitch)).to(state.phase.dtype)
                quiet = log_filter[..., 1 : self.n_fft // 8].mean(dim=-1) < _QUIET_LOG_HARMONICS
                phases = self._phases(chosen, quiet, state)
                lines = harmonic_lines(chosen.float(), phases.float(), self.n_fft)
                if x.shape[-1]:
                    state = HarmonicsState(phases[:, -1].clone(), chosen[:, -1].clone())
            spectrum = spectrum + torch.polar(log_filter.clamp(max=_MAX_LOG_MAGNITUDE).exp(), turn) * lines
        return torch.fft.irfft(spectrum, n=self.n_fft, dim=-1) * self.window, state

    def _phases(self, pitch: Tensor, quiet: Tensor, state: HarmonicsState) -> Tensor:
        """Phases of the fundamental at the centres of frames of ``pitch`` (B, N), in radians below 2 pi, fp64; between two, their mean.

        They begin anew at frames that are ``quiet`` (B, N), or the rounding of the pitch would be summed up over the whole signal.
        """
        before = torch.cat([state.pitch[:, None], pitch[:, :-1]], dim=1)
        steps = torch.where(before > 0, (before + pitch) / 2, 0.0) * (2 * math.pi * self.hop_length / self.n_fft)
        total = state.phase[:, None] + steps.cumsum(dim=1)
        # The steps are not negative, so the last quiet frame has the largest sum of those before.
        begun = torch.where(quiet, total, -math.inf).cummax(dim=1).values
        return torch.where(begun.isinf(), total, total - begun).remainder(2 * math.pi)

    def overlap_add(self, frames: Tensor) -> Tensor:
        """All that the frames (B, N, n_fft) cover, (B, (N - 1) * hop + n_fft)."""
        length = (frames.shape[1] - 1) * self.hop_length + self.n_fft
        return F.fold(frames.transpose(1, 2), (1, length), (1, self.n_fft), stride=(1, self.hop_length))[:, 0, 0]

    def envelope(self, count: int) -> Tensor:
        """The sum of squared windows under ``count`` overlapped frames, (1, (count - 1) * hop + n_fft)."""
        return self.overlap_add(self.window.square().expand(1, count, -1))


def harmonic_lines(pitch: Tensor, phase: Tensor, n_fft: int) -> Tensor:
    """Spectra of Hann-windowed sums of cosines at all multiples of ``pitch`` (B, N), in bins, below the highest: (B, N, n_fft // 2 + 1).

    ``phase`` (B, N) is the fundamental's at the centre of the window, in radians. The transform of the window is real about its centre,
    sinc(d) / (1 - d^2) at d bins beside a line, taken within its main lobe; 1 at the line.
    """
    bins = torch.arange(n_fft // 2 + 1, device=pitch.device)
    pitch, phase = pitch[..., None], phase[..., None]
    nearest = (bins / pitch).round()
    one = torch.ones_like(phase)
    turn = torch.polar(one, phase)
    line = torch.polar(one.expand_as(nearest), nearest * phase)
    lines = torch.zeros(1, dtype=torch.complex64, device=pitch.device)
    for number, rotated in ((nearest - 1, line * turn.conj()), (nearest, line), (nearest + 1, line * turn)):
        offset = bins - number * pitch
        offset = offset + _BESIDE * ((offset == 0) | (offset.abs() == 1))
        lobe = torch.sinc(offset) / (1 - offset.square())
        audible = (number >= 1) & (number * pitch < n_fft // 2) & (offset.abs() < _LOBE)
        lines = lines + lobe * audible * rotated
    # The centre is half a window after its beginning, to which a transform refers.
    return lines * (1 - 2 * (bins % 2))


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
        self.head = ISTFTHead(config.channels, config.n_fft, config.hop_length_stft, config.noise, config.harmonics)

    def forward(self, z: Tensor, noise_start: int | Tensor = 0, pitch: Tensor | None = None) -> Tensor:
        """``noise_start``, or (B,) of them, is the STFT frame of the noise that the signal begins with, where the decoder has noise.

        ``pitch`` (B, STFT frames), in bins, takes the place of the predicted one where it is not NaN.
        """
        return self.head(self.hidden(z), noise_start, pitch)

    def hidden(self, z: Tensor) -> Tensor:
        """The frames (B, C, N) that the head gets."""
        x = self.widen(self.conv_in(z))
        for block in self.blocks:
            x = block(x)
        return self.normalise(x)

    def widen(self, x: Tensor) -> Tensor:
        """Latent frames after the first convolution to the STFT's rate: (B, C, T) -> (B, C, T * upsample)."""
        x = F.gelu(x).transpose(1, 2)
        batch, frames, channels = x.shape
        return self.spread(x).view(batch, frames * self.upsample, channels).transpose(1, 2)

    def normalise(self, x: Tensor) -> Tensor:
        """The last layer norm, over channels: (B, C, N) -> (B, C, N)."""
        return self.norm(x.transpose(1, 2)).transpose(1, 2)
