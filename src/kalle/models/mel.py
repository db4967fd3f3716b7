"""The one log-mel front end: the reconstruction losses and the speaker encoder differ only in its numbers."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalle.checkpoint import check_fields
from kalle.errors import UserError
from kalle.models.layers import without_autocast

logger = logging.getLogger(__name__)

MAGNITUDE_EPSILON = 1e-9
"""Added under the square root, so that the gradient of a silent bin is finite."""
LOG_FLOOR = 1e-5
"""Smallest mel magnitude before the logarithm."""


@dataclass(frozen=True)
class MelConfig:
    """A mel spectrogram: sizes in samples, frequencies in Hz. The defaults are the Flow-VAE's reconstruction loss."""

    sample_rate: int = 16000
    """Sampling rate of the waveform in Hz."""
    n_fft: int = 1024
    """Length of the Fourier transform."""
    hop: int = 240
    """Samples between frames."""
    win: int = 960
    """Length of the Hann window, centred in the transform."""
    n_mels: int = 100
    """Number of mel filters."""
    fmin: float = 0.0
    """Lower edge of the first filter."""
    fmax: float | None = None
    """Upper edge of the last filter; None is the Nyquist frequency."""

    def __post_init__(self) -> None:
        check_fields(self, "mel")
        nyquist = self.sample_rate / 2
        if not 0 < self.hop <= self.n_fft or not 0 < self.win <= self.n_fft or self.n_mels < 1:
            raise UserError(
                f"mel sizes: got {self}, expected 0 < hop <= n_fft, 0 < win <= n_fft and n_mels >= 1; correct the configuration"
            )
        if not 0 <= self.fmin < self.upper_edge_hz <= nyquist:
            raise UserError(
                f"mel band: got {self.fmin}..{self.fmax} Hz, expected 0 <= fmin < fmax <= {nyquist} Hz; set fmax: null for Nyquist"
            )

    @property
    def upper_edge_hz(self) -> float:
        """Upper edge of the last filter in Hz, with None resolved."""
        return self.sample_rate / 2 if self.fmax is None else self.fmax


def mel_filters(config: MelConfig) -> Tensor:
    """Slaney-scale, slaney-normalised triangular filters, (n_mels, n_fft // 2 + 1), fp32."""
    # Imported here because speaking needs no mel, and torchaudio takes its time.
    from torchaudio.functional import melscale_fbanks

    with warnings.catch_warnings():
        # Empty filters are counted and reported by LogMel; torchaudio's warning names neither the count nor the configuration.
        warnings.filterwarnings("ignore", message="At least one mel filterbank")
        filters = melscale_fbanks(
            config.n_fft // 2 + 1, config.fmin, config.upper_edge_hz, config.n_mels, config.sample_rate, norm="slaney", mel_scale="slaney"
        )
    return filters.T.contiguous()


class LogMel(nn.Module):
    """Natural-log mel magnitudes, ``ln(max(filters @ sqrt(re^2 + im^2 + 1e-9), 1e-5))``.

    The waveform is reflect-padded by (n_fft - hop) / 2 on both sides and framed without centring, so S samples give
    S / hop frames when hop divides S. Computed in fp32, also under autocast. A filter narrower than a Fourier bin can be
    empty: it then holds the constant ln(1e-5) without a gradient; ``empty_filters`` counts them and a warning is logged.
    """

    filters: Tensor
    window: Tensor

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        if not isinstance(config, MelConfig):
            raise UserError(f"mel: got {config!r}, expected a MelConfig, an object {{...}} in a configuration; set one key in it")
        self.config = config
        filters = mel_filters(config)
        self.register_buffer("filters", filters, persistent=False)
        self.register_buffer("window", torch.hann_window(config.win), persistent=False)
        self.empty_filters = int((filters.amax(dim=1) <= 0).sum())
        if self.empty_filters:
            logger.warning("%d of %d mel filters are empty (constant) in %s", self.empty_filters, config.n_mels, config)

    @property
    def padding_samples(self) -> int:
        """Samples of reflection added on either side."""
        return (self.config.n_fft - self.config.hop) // 2

    def frames(self, samples: int) -> int:
        """Number of frames that ``samples`` samples give."""
        return (samples + 2 * self.padding_samples - self.config.n_fft) // self.config.hop + 1

    def magnitudes(self, wav: Tensor) -> Tensor:
        """Fourier magnitudes of ``wav`` (B, S): (B, n_fft // 2 + 1, frames), fp32."""
        config, padding = self.config, self.padding_samples
        if wav.dim() != 2 or wav.shape[1] <= padding or wav.shape[1] + 2 * padding < config.n_fft:
            raise UserError(
                f"audio for a mel spectrogram: got shape {tuple(wav.shape)}, "
                f"expected (batch, samples) with over {max(padding, config.n_fft - 2 * padding - 1)} samples; "
                "use longer audio or a smaller transform"
            )
        padded = F.pad(wav.float().unsqueeze(1), (padding, padding), mode="reflect").squeeze(1)
        window = self.window.float()
        spectrum = torch.stft(padded, config.n_fft, config.hop, config.win, window, center=False, return_complex=True)
        return torch.sqrt(spectrum.real.square() + spectrum.imag.square() + MAGNITUDE_EPSILON)

    def forward(self, wav: Tensor) -> Tensor:
        """``wav`` (B, S) in [-1, 1] to log-mel magnitudes (B, n_mels, frames), fp32; UserError when S is too short to reflect."""
        with without_autocast(wav.device):
            mel = self.filters.float() @ self.magnitudes(wav)
            return torch.log(mel.clamp(min=LOG_FLOOR))
