"""Properties of the Flow-VAE that hold for any weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

from kalle.checkpoint import read_tensors, write_json, write_tensors
from kalle.errors import UserError
from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.model import CouplingFlow

ENCODER = EncoderConfig(channels=(4, 4, 6, 6, 8, 8, 8), residual_layers=2)
BIGVGAN = FlowVAEConfig(latent_dim=6, encoder=ENCODER, flow=FlowConfig(hidden_channels=8), decoder=BigVGANConfig(initial_channels=64))
ISTFT = dataclasses.replace(BIGVGAN, decoder=ISTFTConfig(channels=16, blocks=2))
HOP = 1280


def _build(config: FlowVAEConfig, seed: int = 0) -> FlowVAE:
    torch.manual_seed(seed)
    return FlowVAE(config).eval()


def _trained_flow(latent_dim: int = 6) -> CouplingFlow:
    """A flow whose couplings are no identity any more."""
    torch.manual_seed(0)
    flow = CouplingFlow(FlowConfig(hidden_channels=8), latent_dim).double()
    for coupling in flow.couplings:
        nn.init.normal_(coupling.post.weight)
    return flow


@pytest.mark.parametrize("config", [BIGVGAN, ISTFT, dataclasses.replace(ISTFT, flow=None)], ids=["bigvgan", "istft", "no flow"])
@torch.no_grad()
def test_shapes_and_ranges(config):
    flowvae = _build(config)
    wav = torch.randn(2, 5 * HOP, generator=torch.Generator().manual_seed(1))
    output = flowvae(wav, noise=torch.zeros(2, 5, 6))
    assert output.posterior.mean.shape == output.z.shape == output.z_prior.shape == (2, 5, 6)
    assert output.wav.shape == (2, 5 * HOP)
    decoded = flowvae.decode(100 * output.z)
    assert decoded.shape == (2, 5 * HOP)
    assert decoded.abs().max() <= 1


@torch.no_grad()
def test_the_frame_count_follows_from_the_convolutions(golden_flowvae):
    assert [golden_flowvae.encode(torch.zeros(1, samples)).mean.shape[1] for samples in (5 * HOP, 5 * HOP + 1, 6 * HOP)] == [5, 5, 6]


@torch.no_grad()
def test_a_batch_of_equal_lengths_equals_its_items(golden_flowvae):
    wav = torch.randn(3, 4 * HOP + 77, generator=torch.Generator().manual_seed(0)) * 0.1
    together = golden_flowvae.encode(wav)
    for row, single in enumerate(golden_flowvae.encode(item[None]) for item in wav):
        torch.testing.assert_close(together.mean[row], single.mean[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.log_std[row], single.log_std[0], rtol=1e-4, atol=1e-5)
    z = together.mean
    torch.testing.assert_close(golden_flowvae.decode(z)[1:2], golden_flowvae.decode(z[1:2]), rtol=1e-4, atol=1e-5)


def test_a_new_flow_is_the_identity():
    flowvae = _build(BIGVGAN)
    z = torch.randn(2, 7, 6)
    # Four flips of the channels cancel.
    assert torch.equal(flowvae.to_prior(z), z)
    assert torch.equal(flowvae.from_prior(z), z)


def test_without_a_flow_the_prior_space_is_the_posteriors():
    flowvae = _build(dataclasses.replace(ISTFT, flow=None))
    z = torch.randn(2, 7, 6)
    assert torch.equal(flowvae.to_prior(z), z)
    assert torch.equal(flowvae.from_prior(z), z)


@torch.no_grad()
def test_flow_inverts_exactly():
    flow = _trained_flow()
    z = torch.randn(2, 6, 11, dtype=torch.float64)
    assert not torch.allclose(flow(z), z)
    torch.testing.assert_close(flow.inverse(flow(z)), z)
    torch.testing.assert_close(flow(flow.inverse(z)), z)


def test_flow_has_unit_jacobian_determinant():
    flow = _trained_flow()
    z = torch.randn(1, 6, 3, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(flow, z).reshape(18, 18)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet) < 1e-9


def test_flow_is_causal_by_gradient():
    flow = _trained_flow()
    z = torch.randn(1, 6, 40, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(flow(z)[:, :, 30].sum(), z)
    assert not gradient[:, :, 31:].any()
    assert gradient[:, :, 29].any()


def _look_ahead_samples(flowvae: FlowVAE, frames: int, frame: int) -> int:
    """How many samples before its own first one latent ``frame`` is heard, by forward-mode gradient in fp64."""
    decoder = flowvae.double().requires_grad_(False).decoder
    z = torch.randn(1, flowvae.config.latent_dim, frames, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction = torch.zeros_like(z)
    direction[..., frame] = 1
    _, tangent = torch.func.jvp(decoder, (z,), (direction,))
    first = int(tangent[0].nonzero()[0])
    assert first > 0, "the look-ahead reaches the beginning: measure with more frames"
    return frame * HOP - first


def test_bigvgan_look_ahead_is_what_its_kernels_add_up_to():
    # 11.04 frames: three of the first convolution, the rest are anti-aliasing filters. What the outermost add is below the
    # resolution of fp32, so a change of one frame is seen about six frames ahead in practice.
    assert _look_ahead_samples(_build(BIGVGAN), frames=14, frame=12) == 14135


@pytest.mark.parametrize(("blocks", "expected"), [(2, 2479), (8, 5359)])
def test_istft_look_ahead(blocks, expected):
    config = dataclasses.replace(ISTFT, decoder=ISTFTConfig(channels=16, blocks=blocks))
    samples = _look_ahead_samples(_build(config), frames=10, frame=6)
    assert samples == expected
    # One latent frame, three STFT frames a block, half a window.
    assert samples == HOP + 160 * 3 * blocks + (640 - 160) // 2 - 1


@pytest.mark.parametrize("config", [BIGVGAN, ISTFT], ids=["bigvgan", "istft"])
@torch.no_grad()
def test_save_and_load_give_the_same_numbers(config, tmp_path):
    flowvae = _build(config)
    flowvae.save_pretrained(tmp_path / "name")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()) == [
        "name/flowvae/config.json",
        "name/flowvae/model.safetensors",
    ]
    state = flowvae.state_dict()
    wav = torch.randn(1, 3 * HOP, generator=torch.Generator().manual_seed(2))
    for folder in (tmp_path / "name", tmp_path / "name" / "flowvae"):
        loaded = FlowVAE.from_pretrained(folder)
        assert loaded.config == config
        assert not loaded.training
        assert {name: tensor.dtype for name, tensor in loaded.state_dict().items()} == {
            name: tensor.dtype for name, tensor in state.items()
        }
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(loaded.decode(loaded.encode(wav).mean), flowvae.decode(flowvae.encode(wav).mean))


def test_loading_lists_every_tensor_that_does_not_fit(tmp_path):
    _build(ISTFT).save_pretrained(tmp_path)
    weights = tmp_path / "flowvae" / "model.safetensors"
    tensors = read_tensors(weights)
    del tensors["encoder.conv_in.bias"], tensors["decoder.conv_in.weight"]
    tensors["decoder.norm.bias"] = torch.zeros(3)
    tensors["surplus"] = torch.zeros(2)
    write_tensors(weights, tensors)
    with pytest.raises(UserError) as caught:
        FlowVAE.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "4 tensors" in message
    assert "missing: encoder.conv_in.bias (4,)" in message
    assert "decoder.conv_in.weight (16, 6, 3)" in message
    assert "superfluous: surplus (2,)" in message
    assert "misshapen: decoder.norm.bias is (3,), expected (16,)" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent_dims": 6}, ["latent_dims", "latent_dim"]),
        ({"decoder": {"kind": "istft", "blok": 2}}, ["blok", "blocks"]),
        ({"decoder": {"kind": "hifigan"}}, ["hifigan", "bigvgan", "istft"]),
        ({"encoder": {"width": 2}}, ["width", "channels"]),
        ({"flow": {"depth": 2}}, ["depth", "couplings"]),
    ],
)
def test_unknown_configuration_keys_list_the_valid_ones(tmp_path, change, words):
    _build(ISTFT).save_pretrained(tmp_path)
    write_json(tmp_path / "flowvae" / "config.json", {**ISTFT.to_dict(), **change})
    with pytest.raises(UserError) as caught:
        FlowVAE.from_pretrained(tmp_path)
    assert all(word in str(caught.value) for word in words)


def test_configurations_that_cannot_work_are_refused():
    with pytest.raises(UserError, match="got 1280 and 640"):
        dataclasses.replace(ISTFT, decoder=ISTFTConfig(upsample=4))
    with pytest.raises(UserError, match="even"):
        dataclasses.replace(ISTFT, latent_dim=7)
    with pytest.raises(UserError, match="got 3 and 6"):
        EncoderConfig(channels=(1, 2, 3))


def test_configuration_round_trip():
    for config in (FlowVAEConfig(), BIGVGAN, ISTFT, dataclasses.replace(ISTFT, flow=None)):
        assert FlowVAEConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize("config", [BIGVGAN, ISTFT], ids=["bigvgan", "istft"])
def test_every_parameter_learns(config):
    flowvae = _build(config).train()
    for coupling in flowvae.flow.couplings:
        nn.init.normal_(coupling.post.weight, std=0.1)  # at zero the layers below it get no gradient yet
    output = flowvae(torch.randn(2, 3 * HOP, generator=torch.Generator().manual_seed(0)), noise=torch.ones(2, 3, 6))
    (output.wav.square().mean() + output.z_prior.square().mean() + output.posterior.log_std.mean()).backward()
    silent = [name for name, parameter in flowvae.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    assert silent == []


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"latent_dim": 10**9}, "latent_dim"),
        ({"latent_dim": 0}, "latent_dim"),
        ({"sample_rate": -1}, "sample_rate"),
        ({"encoder": {"residual_layers": 10**6}}, "encoder.residual_layers"),
        ({"encoder": {"channels": [1] * 1001, "strides": [1] * 1000}}, "encoder.channels"),
        ({"flow": {"couplings": 10**9}}, "flow.couplings"),
        ({"decoder": {"initial_channels": 2**40}}, "decoder.initial_channels"),
        ({"decoder": {"kind": "istft", "blocks": 10**7}}, "decoder.blocks"),
    ],
)
def test_sizes_beyond_all_measure_are_refused_before_anything_is_built(values, field):
    with pytest.raises(UserError, match=rf"{field}: got .* expected whole numbers from 1 to "):
        FlowVAEConfig.from_dict(values, "x")
