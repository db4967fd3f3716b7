"""The inverse-STFT head against torch's own."""

from __future__ import annotations

import torch

from kalle.models.flowvae import ISTFTConfig
from kalle.models.flowvae.istft import ISTFTDecoder, ISTFTHead


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
