"""The inverse-STFT head against torch's own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.istft import NOISE_FRAMES, ISTFTDecoder, ISTFTHead, white_frames


def _head(n_fft: int = 64, hop_length: int = 16) -> ISTFTHead:
    torch.manual_seed(0)
    return ISTFTHead(channels=8, n_fft=n_fft, hop_length=hop_length).double()


@torch.no_grad()
def test_the_head_inverts_an_stft():
    head = _head()
    signal = torch.randn(2, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.1
    frames = signal.unfold(-1, 64, 16) * head.window
    spectrum = torch.fft.rfft(frames, dim=-1)
    head.project = torch.nn.Identity()
    x = torch.cat([spectrum.abs().log(), spectrum.angle()], dim=-1).transpose(1, 2)
    wav = head(x).double()
    count = frames.shape[1]
    assert wav.shape == (2, count * 16)
    # The head keeps the middle of what the frames cover, and works in fp32.
    torch.testing.assert_close(wav, signal[:, 24 : 24 + count * 16], rtol=1e-3, atol=1e-5)


@torch.no_grad()
def test_the_head_equals_torchs_istft_inside():
    head = _head()
    x = torch.randn(1, 8, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    log_magnitude, phase = head.project(x.transpose(1, 2)).chunk(2, dim=-1)
    spectrum = torch.polar(log_magnitude.clamp(max=5.0).exp(), phase).transpose(1, 2)
    reference = torch.istft(spectrum, 64, 16, window=head.window, center=True)  # drops 32 samples of each end, the head 24
    torch.testing.assert_close(head(x)[:, 8 : 8 + reference.shape[1]].double(), reference, rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_a_loud_spectrum_is_limited_and_stays_finite():
    head = _head()
    head.project.bias += 1000
    assert head(torch.zeros(1, 8, 10, dtype=torch.float64)).isfinite().all()


@torch.no_grad()
def test_length_is_frames_times_hop_for_any_count():
    config = ISTFTConfig(channels=8, blocks=1)
    decoder = ISTFTDecoder(config, latent_dim=4)
    for frames in (1, 2, 7):
        wav = decoder(torch.randn(2, 4, frames))
        assert wav.shape == (2, frames * config.hop_length)
        assert wav.isfinite().all()


def test_the_noise_is_white_and_a_loop():
    white = torch.view_as_complex(white_frames(64, 16))
    power = white.abs().square().mean(dim=0)
    assert power.shape == (33,)
    inner = power[2:-2]
    assert inner.mean() == pytest.approx(1.0, abs=0.02)
    assert inner.std() < 0.15
    assert torch.equal(white, torch.view_as_complex(white_frames(64, 16))), "the same in every run"
    # Neighbouring frames share three quarters of their samples, the last and the first too.
    shifted = torch.exp(-2j * math.pi * torch.arange(33) * 16 / 64)
    likeness = [float((white[at] * shifted * white[at - 1].conj()).real.mean().abs()) for at in (0, 100)]
    assert min(likeness) > 0.3, likeness


@torch.no_grad()
def test_noise_has_the_predicted_magnitude_and_nothing_of_a_period():
    """Frames that are all alike give noise, not the same frame again and again."""
    head = ISTFTHead(channels=8, n_fft=64, hop_length=16, noise=True)
    head.project.weight.zero_()
    head.project.bias[:33] = -20.0
    head.noise.bias.fill_(math.log(0.5))
    wav = head(torch.zeros(1, 8, 400))[0]
    single = head.noise.bias.exp()[0] ** 2
    # Frames of bins with a mean square of 1 belong to samples of variance 1 / sum(window ** 2).
    expected = single / head.window.square().sum()
    assert wav[64:-64].var() == pytest.approx(float(expected), rel=0.1)
    centred = wav[64:-64] - wav[64:-64].mean()
    for lag in (16, 32, 64):
        assert abs(float((centred[lag:] * centred[:-lag]).mean() / centred.var())) < 0.1, f"a period of {lag} samples"
    head.noise.bias.fill_(-30.0)
    assert head(torch.zeros(1, 8, 400)).abs().max() < 1e-6


@torch.no_grad()
def test_noise_begins_where_it_is_told_to_in_each_row():
    decoder = ISTFTDecoder(ISTFTConfig(channels=8, blocks=1, noise=True), latent_dim=4)
    decoder.head.noise.bias.fill_(0.0)
    z = torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(0)).repeat(3, 1, 1)
    rows = decoder(z, torch.tensor([0, 7, NOISE_FRAMES]))
    torch.testing.assert_close(rows[0], decoder(z[:1])[0])
    torch.testing.assert_close(rows[0], rows[2])
    assert not torch.allclose(rows[0], rows[1], atol=1e-3)


def test_the_noise_learns():
    decoder = ISTFTDecoder(ISTFTConfig(channels=8, blocks=1, noise=True), latent_dim=4)
    decoder(torch.randn(1, 4, 3)).square().sum().backward()
    assert decoder.head.noise.weight.grad.abs().sum() > 0
    assert decoder.head.noise.bias.grad.abs().sum() > 0


@torch.no_grad()
def test_noise_is_added_to_trained_weights_hardly_heard(toy_flowvae_config: FlowVAEConfig, tmp_path):
    torch.manual_seed(1)
    plain = FlowVAE(toy_flowvae_config).eval()
    noisy = plain.with_noise()
    assert (plain.has_noise, noisy.has_noise) == (False, True)
    assert not noisy.training
    noisy.save_pretrained(tmp_path)
    loaded = FlowVAE.from_pretrained(tmp_path)
    z = torch.randn(1, 30, toy_flowvae_config.latent_dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(noisy.decode(z), loaded.decode(z))
    difference = loaded.decode(z) - plain.decode(z)
    assert 0 < difference.std() < 0.01
    assert torch.equal(noisy.with_noise().decode(z), noisy.decode(z)), "it is kept where it is"
    for name, tensor in plain.state_dict().items():
        assert torch.equal(noisy.state_dict()[name], tensor), name


def test_the_papers_decoder_gets_no_noise(toy_flowvae_config: FlowVAEConfig):
    from kalle.models.flowvae import BigVGANConfig

    decoder = BigVGANConfig(initial_channels=16, strides=(10, 16), block_kernel_sizes=(3,), block_dilations=(1,))
    flowvae = FlowVAE(dataclasses.replace(toy_flowvae_config, decoder=decoder))
    with pytest.raises(UserError, match=r"decoder\.kind istft"):
        flowvae.with_noise()
