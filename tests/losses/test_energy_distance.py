"""The spectral energy distance: the lowest for a generator that varies as recordings do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kalle.losses.waveform import SpectralEnergyDistance, log_magnitude

SAMPLES = 8192


@pytest.fixture(scope="module")
def distance() -> SpectralEnergyDistance:
    return SpectralEnergyDistance(windows=(256, 1024), mel_windows=(512,), n_mels=(40,))


def noise(seed: int, rms: float = 0.1) -> Tensor:
    return rms * torch.randn(4, SAMPLES, generator=torch.Generator().manual_seed(seed))


def tone(hertz: float = 440.0) -> Tensor:
    return 0.1 * torch.sin(2 * torch.pi * hertz * torch.arange(SAMPLES) / 16000).expand(4, -1)


def test_noise_is_best_matched_by_noise_that_varies(distance: SpectralEnergyDistance) -> None:
    real = noise(0)
    varies = distance(real, noise(1), noise(2))
    assert varies < 0.6 * distance(real, noise(1), noise(1)), "always the same noise"
    smooth = tone(1000.0) * 0 + 0.1 * torch.sign(torch.sin(torch.arange(SAMPLES) * 0.7)).expand(4, -1)
    assert varies < distance(real, smooth, smooth), "something regular"
    for rms in (0.05, 0.2):
        assert varies < distance(real, noise(1, rms), noise(2, rms)), "another level"


def test_a_tone_is_best_matched_by_itself(distance: SpectralEnergyDistance) -> None:
    itself = distance(tone(), tone(), tone())
    assert abs(float(itself)) < 1e-3
    assert itself < distance(tone(), tone() + noise(1, 0.02), tone() + noise(2, 0.02))
    assert itself < distance(tone(), tone(460.0), tone(460.0))


def test_it_is_symmetric_in_what_was_generated_and_teaches_it_alone(distance: SpectralEnergyDistance) -> None:
    real, fake, other = (noise(seed).requires_grad_() for seed in range(3))
    loss = distance(real, fake, other)
    torch.testing.assert_close(loss, distance(real, other, fake))
    loss.backward()
    assert real.grad is None
    assert fake.grad.abs().sum() > 0
    assert other.grad.abs().sum() > 0


def test_silence_has_finite_gradients(distance: SpectralEnergyDistance) -> None:
    fake = torch.zeros(4, SAMPLES, requires_grad=True)
    distance(torch.zeros(4, SAMPLES), fake, fake * 1.0).backward()
    assert fake.grad.isfinite().all()


def test_white_noise_has_bins_of_its_own_level() -> None:
    for window in (128, 1024):
        power = (2 * log_magnitude(noise(3), window)).exp()
        assert power[:, 2:-2].mean().sqrt() == pytest.approx(0.1, rel=0.05)
