"""The pitch tracker on signals whose pitch is known."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kalle.audio import load_mono
from kalle.data.corpus.lists import embedded_folder
from kalle.losses.pitch import track_pitch

RATE, SAMPLES = 16000, 16000


def pulses(hertz: Tensor, harmonics: int = 15) -> Tensor:
    phase = 2 * math.pi * torch.cumsum(hertz.double(), 0) / RATE
    return sum(0.05 * torch.cos(number * phase) for number in range(1, harmonics)).float()[None]


@pytest.mark.parametrize("hertz", [75.0, 118.0, 182.5, 277.0, 450.0])
def test_a_steady_pitch_is_found_without_octaves(hertz: float) -> None:
    found = track_pitch(pulses(torch.full((SAMPLES,), hertz)))[0, 3:-3]
    torch.testing.assert_close(found, torch.full_like(found, hertz), rtol=0.01, atol=0)


def test_frames_are_centred_in_their_hop() -> None:
    hertz = torch.linspace(120.0, 260.0, SAMPLES)
    found = track_pitch(pulses(hertz))[0]
    assert found.shape == (100,)
    torch.testing.assert_close(found[3:-3], hertz[80::160][3:-3], rtol=0.01, atol=0)


def test_noise_and_silence_have_none() -> None:
    noise = 0.1 * torch.randn(2, SAMPLES, generator=torch.Generator().manual_seed(0))
    assert track_pitch(noise).isnan().float().mean() > 0.95
    assert track_pitch(torch.zeros(1, SAMPLES)).isnan().all()
    assert track_pitch(1e-5 * pulses(torch.full((SAMPLES,), 200.0))).isnan().all(), "too quiet"


def test_rows_and_other_rates() -> None:
    both = torch.cat([pulses(torch.full((SAMPLES,), hertz)) for hertz in (100.0, 200.0)])
    found = track_pitch(both)
    assert torch.equal(found[1:], track_pitch(both[1:]))
    slower = track_pitch(both, hop=240, sample_rate=24000)[0, 3:-3]
    torch.testing.assert_close(slower, torch.full_like(slower, 150.0), rtol=0.01, atol=0)


def test_a_few_frames_of_period_doubling_are_no_octave_down() -> None:
    seconds = torch.arange(SAMPLES, dtype=torch.float64) / RATE
    doubled = ((seconds - 0.5).abs() < 0.025).double()
    beside = sum(torch.cos(2 * math.pi * (200 * number + 100) * seconds) for number in range(14))
    found = track_pitch(pulses(torch.full((SAMPLES,), 200.0)) + (0.01 * doubled * beside).float())[0, 3:-3]
    torch.testing.assert_close(found, torch.full_like(found, 200.0), rtol=0.02, atol=0)


def test_the_pitch_of_speech_seldom_leaps() -> None:
    shares, leaps = [], []
    for path in sorted((embedded_folder() / "audio").glob("*.opus"))[::40]:
        wav, rate = load_mono(path)
        found = track_pitch(torch.from_numpy(wav)[None], sample_rate=rate)[0]
        voiced = ~found.isnan()
        shares.append(voiced.float().mean())
        leaps.append((found[1:] / found[:-1]).log2().abs()[voiced[1:] & voiced[:-1]])
    assert 0.3 < torch.stack(shares).mean() < 0.8
    assert (torch.cat(leaps) > 0.5).float().mean() < 0.008
