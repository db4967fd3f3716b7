"""Losses of waveforms: L1 distances between log-mel spectrograms, and least-squares adversarial losses with feature matching."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalle.errors import UserError
from kalle.models.mel import MAGNITUDE_EPSILON, LogMel, MelConfig

__all__ = ["LogMel", "MelConfig", "MelL1", "MultiScaleMel", "SpectralEnergyDistance", "mel_l1", "multi_scale_configs"]
ENERGY_WINDOWS = (128, 256, 512, 1024, 2048)
_ENERGY_FLOOR = 3e-4


def mel_l1(real: Tensor, fake: Tensor) -> Tensor:
    """Mean absolute difference of two log-mel spectrograms (B, n_mels, frames) of one shape; scalar, fp32, in nepers.

    One shape is demanded, because broadcasting would hide a length mismatch.
    """
    assert real.shape == fake.shape, f"log-mels must agree in shape: {tuple(real.shape)} and {tuple(fake.shape)}"
    return F.l1_loss(fake.float(), real.float())


class MelL1(nn.Module):
    """Single-scale reconstruction loss of two waveforms: ``mel_l1`` of their ``LogMel``."""

    def __init__(self, config: MelConfig) -> None:
        super().__init__()
        self.mel = LogMel(config)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """``real``, ``fake`` (B, S) in [-1, 1] to a scalar, fp32; no gradient flows into ``real``."""
        with torch.no_grad():
            target = self.mel(real)
        return mel_l1(target, self.mel(fake))


def multi_scale_configs(
    sample_rate: int = 16000,
    windows: Sequence[int] = (32, 64, 128, 256, 512, 1024, 2048),
    n_mels: Sequence[int] = (5, 10, 20, 40, 80, 160, 320),
) -> tuple[MelConfig, ...]:
    """One ``MelConfig`` per window length in samples, hop a quarter of the window (the scales of BigVGAN v2, arXiv 2206.04658's code).

    UserError when the two lists differ in length.
    """
    if len(windows) != len(n_mels):
        raise UserError(
            f"mel scales: got {len(windows)} windows and {len(n_mels)} mel counts, expected as many; make the lists equally long"
        )
    return tuple(
        MelConfig(sample_rate=sample_rate, n_fft=window, hop=max(window // 4, 1), win=window, n_mels=mels)
        for window, mels in zip(windows, n_mels, strict=True)
    )


class MultiScaleMel(nn.Module):
    """Sum over scales of the L1 distance of log-mels, after BigVGAN v2's multi-scale mel loss.

    ``log10`` keeps that loss' unit: its weight (15) belongs to base-10 logarithms, which are 1 / ln 10 = 0.434 of the natural
    ones of ``LogMel``; with ``log10=False`` the sum is in nepers. BigVGAN v2 centres its frames and this class does not, so
    the frames lie half a hop apart; the filters, the floor and the sum over scales are the same.
    A scale whose filters are partly empty is averaged over its other filters.
    """

    scales: nn.ModuleList

    def __init__(self, configs: Sequence[MelConfig], log10: bool = True) -> None:
        super().__init__()
        if not configs:
            raise UserError("mel scales: got none, expected at least one MelConfig; see multi_scale_configs")
        self.scales = nn.ModuleList(LogMel(config) for config in configs)
        self.unit = 1 / math.log(10) if log10 else 1.0

    @property
    def empty_filters(self) -> int:
        """Number of filters without a Fourier bin, over all scales."""
        return sum(self._log_mel(index).empty_filters for index in range(len(self.scales)))

    def _log_mel(self, index: int) -> LogMel:
        scale = self.scales[index]
        assert isinstance(scale, LogMel)
        return scale

    def _distance(self, index: int, real: Tensor, fake: Tensor) -> Tensor:
        """The L1 of one scale over its non-empty filters, which alone can differ."""
        scale = self._log_mel(index)
        with torch.no_grad():
            target = scale(real)
        used = scale.config.n_mels - scale.empty_filters
        assert used > 0, f"every mel filter is empty in {scale.config}"
        return mel_l1(target, scale(fake)) * (scale.config.n_mels / used)

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """``real``, ``fake`` (B, S) in [-1, 1] to a scalar, fp32; no gradient flows into ``real``."""
        distances = [self._distance(index, real, fake) for index in range(len(self.scales))]
        return self.unit * torch.stack(distances).sum()


class SpectralEnergyDistance(nn.Module):
    """How far the distribution of two generated waveforms is from a recording: d(x, y) + d(x, y') - d(y, y').

    The spectral energy distance of arXiv 2008.01160. y and y' are of the same latents with independent noise, so the last term rewards that
    they differ as much as recordings would: where speech is noise, a waveform that is always the same can't be the best, as it is under an
    L1 distance. d is the sum over ``windows`` (in samples, hop a quarter) of the mean over frames of the root mean square difference of
    log-magnitudes, of Fourier bins and of as many mel bands as ``n_mels`` says; the paper's has a linear term besides, and other windows.
    """

    scales: nn.ModuleList

    def __init__(
        self,
        sample_rate: int = 16000,
        windows: Sequence[int] = ENERGY_WINDOWS,
        mel_windows: Sequence[int] = (256, 512, 1024),
        n_mels: Sequence[int] = (40, 80, 100),
    ) -> None:
        super().__init__()
        self.windows = tuple(windows)
        self.scales = nn.ModuleList(LogMel(config) for config in multi_scale_configs(sample_rate, mel_windows, n_mels))

    def spectra(self, wav: Tensor) -> list[Tensor]:
        """Log-magnitudes of ``wav`` (B, S) at each scale, (B, bins or bands, frames), fp32, in nepers."""
        wav = wav.float()
        return [log_magnitude(wav, window) for window in self.windows] + [scale(wav) for scale in self.scales]

    def forward(self, real: Tensor, fake: Tensor, other: Tensor) -> Tensor:
        """``real``, ``fake`` and ``other`` (B, S) to a scalar, fp32; negative where the two generated ones differ too much."""
        with torch.no_grad():
            truth = self.spectra(real)
        first, second = self.spectra(fake), self.spectra(other)
        parts = [_frame_rms(x, y) + _frame_rms(x, z) - _frame_rms(y, z) for x, y, z in zip(truth, first, second, strict=True)]
        return torch.stack(parts).sum()


def log_magnitude(wav: Tensor, window: int) -> Tensor:
    """Natural logarithms of magnitudes of ``wav`` (B, S), in Hann windows of ``window`` samples with a hop of a quarter: (B, bins, frames).

    White noise of a standard deviation s has bins whose mean square is s^2; what is more than 70 dB below full scale counts little.
    """
    hann = torch.hann_window(window, device=wav.device)
    spectrum = torch.stft(wav, window, window // 4, window, hann / hann.square().sum().sqrt(), center=False, return_complex=True)
    power = torch.view_as_real(spectrum).square().sum(-1)
    return 0.5 * torch.log(power + _ENERGY_FLOOR**2)


def _frame_rms(one: Tensor, other: Tensor) -> Tensor:
    return ((one - other).square().mean(dim=1) + MAGNITUDE_EPSILON).sqrt().mean()


OverParts = Literal["sum", "mean"]
"""How the losses of sub-discriminators, or of feature maps, become one: their sum (BigVGAN) or their mean."""
FEATURE_MATCHING_FACTOR = 2.0
"""BigVGAN's (and HiFi-GAN's, arXiv 2010.05646 eq. 6) factor inside the term, beside any weight from a configuration."""


def _over_parts(losses: Sequence[Tensor], reduction: OverParts) -> Tensor:
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: got {reduction!r}, expected 'sum' or 'mean'")
    stacked = torch.stack(list(losses))
    return stacked.sum() if reduction == "sum" else stacked.mean()


def discriminator_loss(real_scores: Sequence[Tensor], fake_scores: Sequence[Tensor], reduction: OverParts = "sum") -> Tensor:
    """``sum_i mean((1 - D_i(y))^2) + mean(D_i(y_hat)^2)`` over sub-discriminators (HiFi-GAN eq. 1); scalar, fp32.

    The scores are (B, N_i); the caller detaches the generator's audio before it scores it.
    """
    pairs = zip(real_scores, fake_scores, strict=True)
    return _over_parts([(1 - real.float()).square().mean() + fake.float().square().mean() for real, fake in pairs], reduction)


def generator_loss(fake_scores: Sequence[Tensor], reduction: OverParts = "sum") -> Tensor:
    """``sum_i mean((1 - D_i(y_hat))^2)`` over sub-discriminators (HiFi-GAN eq. 2); scores (B, N_i), scalar, fp32."""
    return _over_parts([(1 - fake.float()).square().mean() for fake in fake_scores], reduction)


def feature_matching_loss(
    real_features: Sequence[Sequence[Tensor]],
    fake_features: Sequence[Sequence[Tensor]],
    factor: float = FEATURE_MATCHING_FACTOR,
    reduction: OverParts = "sum",
) -> Tensor:
    """``factor * sum_i sum_l mean|F_il(y) - F_il(y_hat)|`` over sub-discriminators i and feature maps l; scalar, fp32.

    No gradient flows into the real features.
    """
    distances = [
        (real.detach().float() - fake.float()).abs().mean()
        for real_maps, fake_maps in zip(real_features, fake_features, strict=True)
        for real, fake in zip(real_maps, fake_maps, strict=True)
    ]
    return factor * _over_parts(distances, reduction)
