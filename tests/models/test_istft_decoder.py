"""The inverse-STFT head against torch's own."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from kalle.errors import UserError
from kalle.losses.pitch import track_pitch
from kalle.models.flowvae import FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.istft import NOISE_FRAMES, ISTFTDecoder, ISTFTHead, harmonic_lines, white_frames


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
def test_trained_weights_get_sources(toy_flowvae_config: FlowVAEConfig, tmp_path):
    torch.manual_seed(1)
    plain = FlowVAE(toy_flowvae_config).eval()
    fuller = plain.with_sources()
    assert (plain.config.has_noise, plain.config.has_harmonics) == (False, False)
    assert (fuller.config.has_noise, fuller.config.has_harmonics) == (True, True)
    assert not fuller.training
    fuller.save_pretrained(tmp_path)
    loaded = FlowVAE.from_pretrained(tmp_path)
    z = torch.randn(1, 30, toy_flowvae_config.latent_dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fuller.decode(z), loaded.decode(z))
    assert not torch.allclose(loaded.decode(z), plain.decode(z), atol=1e-3)
    assert torch.equal(fuller.with_sources().decode(z), fuller.decode(z)), "they are kept where they are"
    project = "decoder.head.project.bias"
    for name, tensor in plain.state_dict().items():
        assert torch.equal(fuller.state_dict()[name], tensor) == (name != project), name


def test_the_papers_decoder_gets_no_sources(toy_flowvae_config: FlowVAEConfig):
    from kalle.models.flowvae import BigVGANConfig

    decoder = BigVGANConfig(initial_channels=16, strides=(10, 16), block_kernel_sizes=(3,), block_dilations=(1,))
    flowvae = FlowVAE(dataclasses.replace(toy_flowvae_config, decoder=decoder))
    with pytest.raises(UserError, match=r"decoder\.kind istft"):
        flowvae.with_sources()


def test_lines_are_the_transform_of_windowed_cosines():
    n_fft, pitch, phase = 640, 7.3, 1.1
    time = torch.arange(n_fft, dtype=torch.float64) - n_fft / 2
    numbers = torch.arange(1, int(n_fft / 2 / pitch) + 1, dtype=torch.float64)[:, None]
    signal = torch.cos(numbers * (2 * math.pi * pitch / n_fft * time + phase)).sum(dim=0)
    expected = torch.fft.rfft(signal * torch.hann_window(n_fft, dtype=torch.float64)) / (n_fft / 4)
    lines = harmonic_lines(torch.tensor([[pitch]]), torch.tensor([[phase]]), n_fft)[0, 0]
    inside = slice(8, int(numbers[-1] * pitch) - 2)
    torch.testing.assert_close(lines[inside].to(torch.complex128), expected[inside], rtol=0, atol=0.04)


def voice(pitch: torch.Tensor) -> torch.Tensor:
    """What a head with harmonics alone makes of ``pitch`` (1, frames)."""
    head = ISTFTHead(channels=8, n_fft=640, hop_length=160, harmonics=True)
    with torch.no_grad():
        head.project.weight.zero_()
        head.project.bias[:321] = -20.0
        head.harmonics.bias[:321] = 0.0
        return head(torch.zeros(1, 8, pitch.shape[1]), pitch=pitch)


@pytest.mark.parametrize("pitch", [4.0, 7.3, 12.0])
def test_a_steady_pitch_gives_a_steady_tone(pitch: float):
    """Its phases go on from frame to frame: the tone is as loud as its frames, without a trace of their rate."""
    wav = voice(torch.full((1, 120), pitch))[0, 640:-640]
    spectrum = torch.fft.rfft(wav * torch.hann_window(len(wav))).abs()
    hertz = torch.arange(len(spectrum)) * 16000 / len(wav)
    distance = (hertz / (25 * pitch) - (hertz / (25 * pitch)).round()).abs() * 25 * pitch
    lines, between = spectrum[(distance < 2) & (hertz > 40) & (hertz < 7500)], spectrum[(distance > 20) & (hertz > 40) & (hertz < 7500)]
    assert between.max() < 0.02 * lines.max()


def test_a_glide_is_followed():
    pitch = torch.linspace(5.0, 9.0, 150)[None]
    found = track_pitch(voice(pitch)) / 25
    inner = slice(5, -5)
    torch.testing.assert_close(found[0, inner], pitch[0, inner], rtol=0.02, atol=0)


@torch.no_grad()
def test_phases_begin_anew_where_the_harmonics_are_quiet():
    """After a quiet frame a signal is the one that begins there, however long it was before."""
    head = ISTFTHead(channels=8, n_fft=64, hop_length=16, harmonics=True)
    head.harmonics.bias[:33] = 0.0
    head.harmonics.weight[:33, 0] = -10.0
    x = torch.zeros(2, 8, 40)
    x[:, 0, 20] = 1.0  # one frame at -10
    pitch = torch.full((2, 40), 5.3)
    pitch[1, :20] = 4.1
    frames, state = head.frames(x, pitch=pitch)
    torch.testing.assert_close(frames[0, 21:], frames[1, 21:])
    assert not torch.allclose(frames[0, :20], frames[1, :20], atol=1e-3)
    again, after = head.frames(x[:1, :, 20:], pitch=pitch[:1, 20:])
    torch.testing.assert_close(frames[:1, 20:], again)
    torch.testing.assert_close(state.phase[:1], after.phase)


@torch.no_grad()
def test_a_pitch_that_is_given_replaces_the_predicted_one_where_it_is_known():
    head = ISTFTHead(channels=8, n_fft=64, hop_length=16, harmonics=True)
    head.harmonics.bias.fill_(0.0)
    x = torch.zeros(1, 8, 20)
    predicted = head.log_pitch(x).exp()
    unknown = torch.full((1, 20), math.nan)
    assert torch.equal(head(x), head(x, pitch=unknown))
    torch.testing.assert_close(head(x), head(x, pitch=predicted))
    assert not torch.allclose(head(x), head(x, pitch=predicted * 1.3), atol=1e-3)


def test_harmonics_learn():
    decoder = ISTFTDecoder(ISTFTConfig(channels=8, blocks=1, harmonics=True), latent_dim=4)
    decoder(torch.randn(1, 4, 3)).square().sum().backward()
    assert decoder.head.harmonics.weight.grad.abs().sum() > 0
    assert decoder.head.pitch.weight.grad is None, "the pitch learns from the recordings' own"
    decoder.head.log_pitch(decoder.hidden(torch.randn(1, 4, 3))).sum().backward()
    assert decoder.head.pitch.weight.grad.abs().sum() > 0
