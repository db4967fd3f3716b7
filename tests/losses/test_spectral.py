"""The log-mel front end and the reconstruction losses."""

from __future__ import annotations

import logging
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kalle.errors import UserError
from kalle.losses.waveform import LogMel, MelConfig, MelL1, MultiScaleMel, mel_l1, multi_scale_configs

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(REFERENCE / "discriminators_tiny_io.safetensors")


@pytest.mark.parametrize("name", ["real", "fake"])
def test_log_mel_equals_the_reference(golden, name):
    mel = LogMel(MelConfig())(golden[name][:, 0])
    torch.testing.assert_close(mel, golden[f"mel_{name}"], rtol=1e-4, atol=1e-5)


def test_l1_equals_the_reference(golden):
    assert mel_l1(golden["mel_real"], golden["mel_fake"]).item() == pytest.approx(golden["mel_l1"].item(), rel=1e-6)
    loss = MelL1(MelConfig())(golden["real"][:, 0], golden["fake"][:, 0])
    assert loss.item() == pytest.approx(golden["mel_l1"].item(), rel=1e-4)


def test_mel_l1_does_not_broadcast():
    with pytest.raises(AssertionError, match="agree in shape"):
        mel_l1(torch.zeros(2, 10, 4), torch.zeros(1, 10, 4))


def test_frames_are_samples_over_hop():
    mel = LogMel(MelConfig())
    for samples in (1280 * 3, 240 * 10, 3001):
        assert mel(torch.zeros(1, samples)).shape[2] == mel.frames(samples)
    assert mel.frames(51200 - 51200 % 240) == 51200 // 240


def test_a_tone_peaks_in_its_filter():
    mel = LogMel(MelConfig())
    tone = torch.sin(2 * math.pi * 1000 * torch.arange(16000) / 16000)[None]
    frequencies = torch.linspace(0, 8000, 513)
    filter_at_tone = int(mel.filters[:, (frequencies - 1000).abs().argmin()].argmax())
    peak = int(mel(tone)[0, :, 30].argmax())
    assert abs(peak - filter_at_tone) <= 1


def test_silence_is_the_floor_and_has_a_finite_gradient():
    wav = torch.zeros(1, 2560, requires_grad=True)
    mel = LogMel(MelConfig())(wav)
    by_hand = torch.log((LogMel(MelConfig()).filters.sum(1) * math.sqrt(1e-9)).clamp(min=1e-5))
    torch.testing.assert_close(mel[0, :, 3], by_hand)
    mel.sum().backward()
    assert wav.grad is not None
    assert torch.isfinite(wav.grad).all()


def test_the_floor_and_the_epsilon():
    mel = LogMel(MelConfig())
    magnitudes = mel.magnitudes(torch.zeros(1, 2560))
    torch.testing.assert_close(magnitudes, torch.full_like(magnitudes, math.sqrt(1e-9)))
    mel.filters *= 1e-3
    assert mel(torch.zeros(1, 2560)).unique().tolist() == pytest.approx([math.log(1e-5)])


def test_fp32_under_autocast():
    torch.manual_seed(0)
    wav = 0.1 * torch.randn(1, 4800)
    mel = LogMel(MelConfig())
    expected = mel(wav)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = mel(wav)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def test_buffers_stay_out_of_the_state():
    assert not LogMel(MelConfig()).state_dict()


def test_two_configurations_do_not_share_filters():
    narrow, wide = LogMel(MelConfig(fmax=4000)), LogMel(MelConfig(fmax=8000))
    assert not torch.equal(narrow.filters, wide.filters)
    assert float(narrow.filters[:, 300:].abs().max()) == 0.0


def test_too_short_audio_is_a_user_error():
    with pytest.raises(UserError, match="expected"):
        LogMel(MelConfig())(torch.zeros(1, 300))


@pytest.mark.parametrize("values", [{"fmax": 12000.0}, {"hop": 0}, {"win": 2048}, {"n_mels": 0}, {"fmin": 9000.0}])
def test_impossible_configurations_are_user_errors(values):
    with pytest.raises(UserError, match="expected"):
        MelConfig(**values)


def test_empty_filters_are_counted_and_reported(caplog):
    with caplog.at_level(logging.WARNING):
        mel = LogMel(MelConfig(n_fft=64, hop=16, win=64, n_mels=80))
    assert 0 < mel.empty_filters < 80
    assert f"{mel.empty_filters} of 80" in caplog.text
    assert torch.isfinite(mel(torch.randn(1, 640))).all()


def test_multi_scale_has_no_empty_filter_at_its_defaults():
    assert MultiScaleMel(multi_scale_configs()).empty_filters == 0


def test_multi_scale_is_zero_for_equal_and_grows_with_distance():
    torch.manual_seed(0)
    loss = MultiScaleMel(multi_scale_configs())
    real = 0.1 * torch.randn(2, 3840)
    near, far = loss(real, real + 0.001 * torch.randn_like(real)), loss(real, torch.randn_like(real))
    assert loss(real, real).item() == 0.0
    assert 0 < near < far


def test_multi_scale_unit_is_the_base_of_the_logarithm():
    torch.manual_seed(0)
    configs = multi_scale_configs(windows=(32, 256), n_mels=(5, 40))
    real, fake = 0.1 * torch.randn(1, 2000), 0.1 * torch.randn(1, 2000)
    natural = MultiScaleMel(configs, log10=False)(real, fake)
    by_hand = sum(mel_l1(LogMel(config)(real), LogMel(config)(fake)) for config in configs)
    assert natural.item() == pytest.approx(float(by_hand), rel=1e-6)
    assert MultiScaleMel(configs)(real, fake).item() == pytest.approx(natural.item() / math.log(10), rel=1e-6)


def test_multi_scale_gradient_reaches_the_fake_only():
    torch.manual_seed(0)
    real = torch.zeros(1, 2560, requires_grad=True)
    fake = torch.zeros(1, 2560, requires_grad=True)
    (MultiScaleMel(multi_scale_configs())(real, fake + 0.1 * torch.randn(1, 2560))).backward()
    assert real.grad is None
    assert fake.grad is not None
    assert torch.isfinite(fake.grad).all()
    assert fake.grad.abs().max() > 0


def test_multi_scale_averages_over_filters_that_can_differ():
    torch.manual_seed(0)
    config = MelConfig(n_fft=64, hop=16, win=64, n_mels=80)
    real, fake = 0.1 * torch.randn(1, 1000), 0.1 * torch.randn(1, 1000)
    mel = LogMel(config)
    used = mel.filters.amax(dim=1) > 0
    expected = (mel(real) - mel(fake))[:, used].abs().mean()
    assert MultiScaleMel([config], log10=False)(real, fake).item() == pytest.approx(expected.item(), rel=1e-5)


def test_multi_scale_lists_must_agree():
    with pytest.raises(UserError, match="equally long"):
        multi_scale_configs(windows=(32, 64), n_mels=(5,))
    with pytest.raises(UserError, match="at least one"):
        MultiScaleMel([])
