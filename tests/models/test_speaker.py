"""Speaker encoder against the published computation, its full-size tensor names, and its mel input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.speaker import PEAK, SPEAKER_MEL, AttentiveStatistics, SpeakerEncoder, SpeakerEncoderConfig, SpeakerMel

REFERENCE = Path(__file__).parents[1] / "reference"
TINY = SpeakerEncoderConfig(channels=16, embedding_dim=64)
PREFIX = "speaker_encoder."


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return torch.load(REFERENCE / "lm_speaker_tiny.pt", weights_only=True)


@pytest.fixture(scope="module")
def encoder(weights) -> SpeakerEncoder:
    module = SpeakerEncoder(TINY).eval()
    module.load_state_dict({name.removeprefix(PREFIX): value for name, value in weights.items() if name.startswith(PREFIX)})
    return module


@torch.no_grad()
def test_embedding_equals_the_reference(encoder):
    io = load_file(REFERENCE / "lm_speaker_tiny_io.safetensors")
    torch.testing.assert_close(encoder(io["mels"]), io["speaker_embedding"], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_latent_equals_the_reference(encoder, weights):
    io = load_file(REFERENCE / "speaker_tiny_io.safetensors")
    projected = F.linear(encoder(io["mels"]), weights["speaker_cond_disp_linear.weight"], weights["speaker_cond_disp_linear.bias"])
    latent = DiagGaussian.from_parameters(projected)
    torch.testing.assert_close(latent.mean, io["speaker_mean"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latent.log_std, io["speaker_log_std"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(latent.sample(io["speaker_noise"]), io["speaker_latent"], rtol=1e-4, atol=1e-5)


def test_full_size_tensors_equal_the_published_list():
    listed = json.loads((REFERENCE / "released_tensors.json").read_text())
    (expected,) = (tensors for name, tensors in listed.items() if name.startswith("speaker_encoder"))
    with torch.device("meta"):
        module = SpeakerEncoder(SpeakerEncoderConfig())
    assert {name: list(tensor.shape) for name, tensor in module.state_dict().items()} == expected


@torch.no_grad()
def test_a_batch_equals_its_items(encoder):
    torch.manual_seed(0)
    mels = torch.randn(3, 80, 40)
    torch.testing.assert_close(encoder(mels), torch.cat([encoder(item[None]) for item in mels]), rtol=1e-4, atol=1e-5)


def test_every_parameter_learns():
    torch.manual_seed(0)
    module = SpeakerEncoder(TINY).train()
    module(torch.randn(4, 80, 30)).square().sum().backward()
    without = [name for name, parameter in module.named_parameters() if parameter.grad is None or not torch.isfinite(parameter.grad).all()]
    assert without == []


def test_one_utterance_trains_on_running_statistics(encoder):
    torch.manual_seed(0)
    module = SpeakerEncoder(TINY)
    module.load_state_dict(encoder.state_dict())
    before = module.train().bn2.running_mean.clone()
    module(torch.randn(1, 80, 30)).sum().backward()
    assert torch.equal(module.bn2.running_mean, before)
    module(torch.randn(2, 80, 30))
    assert not torch.equal(module.bn2.running_mean, before)


def test_pooling_of_a_constant_has_a_finite_value_and_gradient():
    torch.manual_seed(0)
    pooling = AttentiveStatistics(16, 8)
    x = (1000 * torch.rand(4, 16, 1)).expand(4, 16, 50).clone().requires_grad_(True)
    pooled = pooling(x)
    pooled.sum().backward()
    assert x.grad is not None
    assert torch.isfinite(pooled).all()
    assert torch.isfinite(x.grad).all()


def test_pooling_is_a_weighted_mean_and_deviation():
    pooling = AttentiveStatistics(3, 4)
    torch.nn.init.zeros_(pooling.linear2.weight)  # then the weights are uniform: the bias is constant in time
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(0))
    expected = torch.cat([x.mean(2), x.std(2, unbiased=False)], dim=1)
    torch.testing.assert_close(pooling(x), expected, rtol=1e-4, atol=1e-5)


def test_wrong_mels_and_configurations_are_reported(encoder):
    with pytest.raises(ValueError, match=r"expected \(batch, 80, frames\)"):
        encoder(torch.zeros(1, 40, 100))
    with pytest.raises(UserError, match="multiple"):
        SpeakerEncoderConfig(channels=20)
    with pytest.raises(UserError, match="dilations"):
        SpeakerEncoderConfig(dilations=(2, 3))  # type: ignore[arg-type]


def test_speaker_mel_crop_shape_and_reproducibility():
    torch.manual_seed(0)
    wav, mel = torch.randn(80000), SpeakerMel()
    first, second = (mel.crop(wav, torch.Generator().manual_seed(3)) for _ in range(2))
    assert first.shape == (80, 200)
    assert torch.equal(first, second)
    assert not torch.equal(first, mel.crop(wav, torch.Generator().manual_seed(4)))


def test_speaker_mel_ignores_level():
    torch.manual_seed(0)
    wav, mel = 0.1 * torch.randn(60000), SpeakerMel()
    assert mel.prepare(wav).abs().max().item() == pytest.approx(PEAK, rel=1e-6)
    torch.testing.assert_close(mel(wav), mel(wav / 7), rtol=1e-4, atol=1e-4)


def test_speaker_mel_tiles_short_audio():
    torch.manual_seed(0)
    wav, mel = torch.randn(20000), SpeakerMel()
    prepared = mel.prepare(wav)
    assert prepared.shape == (200 * SPEAKER_MEL.hop,)
    torch.testing.assert_close(prepared[20000:40000], prepared[:20000])
    assert mel(wav).shape == mel.crop(wav).shape == (80, 200)
    assert mel(torch.randn(64000)).shape == (80, 250)


def test_speaker_mel_keeps_silence_and_refuses_nonsense():
    mel = SpeakerMel()
    assert torch.isfinite(mel(torch.zeros(5000))).all()
    for wrong, message in ((torch.zeros(0), "at least one"), (torch.zeros(1, 5000), "mono"), (torch.tensor([float("nan")] * 9), "finite")):
        with pytest.raises(UserError, match=message):
            mel(wrong)
