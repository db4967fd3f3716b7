"""The decoder prepared for inference against the trained module and the library's activation."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowVAE, FlowVAEConfig, ISTFTConfig, inference
from kalle.models.flowvae.bigvgan import AntiAliasedSnake
from kalle.models.flowvae.inference import PreparedActivation, PreparedUpsample, prepared_conv
from kalle.models.flowvae.streaming import DecoderForInference, StreamingDecoder
from kalle.models.layers import CausalConv1d, CausalUpsample1d

DIM = 6


@pytest.fixture(params=[torch.channels_last, torch.contiguous_format], ids=["channels-last", "contiguous"])
def layout(request, monkeypatch):
    monkeypatch.setattr(inference, "channels_last_on", lambda device: request.param)
    return request.param


def build(decoder: BigVGANConfig | ISTFTConfig) -> FlowVAE:
    torch.manual_seed(0)
    encoder = EncoderConfig(channels=(2,) * 7, residual_layers=1)
    flowvae = FlowVAE(FlowVAEConfig(latent_dim=DIM, encoder=encoder, flow=None, decoder=decoder)).eval().requires_grad_(False)
    for name, parameter in flowvae.decoder.named_parameters():
        if name.endswith(("alpha", "beta")):
            parameter.normal_(0, 0.3)
    return flowvae


@pytest.fixture(scope="module")
def flowvae() -> FlowVAE:
    return build(BigVGANConfig(initial_channels=64))


def latents(frames: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, frames, DIM, generator=torch.Generator().manual_seed(frames))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 11, 12, 23, 24, 25, 97])
@pytest.mark.parametrize("block_values", [1, 1 << 16], ids=["many blocks", "one block"])
def test_the_activation_is_that_of_the_library(length, block_values, monkeypatch):
    monkeypatch.setattr(inference, "_BLOCK_VALUES", block_values)
    activation = AntiAliasedSnake(5)
    activation.act.alpha.copy_(torch.linspace(-2, 1.5, 5))
    activation.act.beta.copy_(torch.linspace(1, -1, 5))
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-13)):
        module, x = activation.to(dtype), torch.randn(2, 5, length, dtype=dtype)
        pieces = PreparedActivation(module)([x[:, :, None]], True, True)
        torch.testing.assert_close(torch.cat(pieces, dim=-1)[:, :, 0], module(x), rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_the_activation_takes_a_signal_in_parts():
    prepared, x = PreparedActivation(AntiAliasedSnake(3)), torch.randn(1, 3, 1, 60)
    whole = torch.cat(prepared([x], True, False), dim=-1)
    parts = torch.cat(prepared([x[..., :0], x[..., :7], x[..., 7:8], x[..., 8:]], True, False), dim=-1)
    assert torch.equal(whole, parts)
    torch.testing.assert_close(torch.cat(prepared([x[..., 10:]], False, False), dim=-1), whole[..., 15:])


def test_the_activation_of_a_vanishing_alpha_is_the_two_filters():
    activation = AntiAliasedSnake(1)
    with torch.no_grad():
        activation.act.alpha.fill_(-100.0)
        x = torch.randn(1, 1, 40)
        torch.testing.assert_close(PreparedActivation(activation)([x[:, :, None]], True, True)[0][:, :, 0], activation(x))


@torch.no_grad()
@pytest.mark.parametrize(("channels_out", "kernel", "dilation"), [(4, 3, 1), (16, 7, 3), (1, 7, 1), (80, 3, 2)])
def test_a_prepared_convolution_is_the_layer(layout, channels_out, kernel, dilation):
    layer, x = CausalConv1d(8, channels_out, kernel, dilation), torch.randn(2, 8, 37)
    prepared = prepared_conv(layer)
    y = prepared(torch.cat([prepared.zeros(2, prepared.past), x[:, :, None]], dim=-1))
    torch.testing.assert_close(y[:, :, 0], layer(x), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("stride", [2, 4, 5])
def test_prepared_upsampling_is_the_layer(layout, stride):
    layer, x = CausalUpsample1d(8, 4, stride), torch.randn(2, 8, 9)
    prepared = PreparedUpsample(layer)
    y = prepared(torch.cat([prepared.conv.zeros(2, 1), x[:, :, None]], dim=-1))
    torch.testing.assert_close(y[:, :, 0], layer(x), rtol=1e-5, atol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_it_decodes_what_the_trained_module_does(flowvae, layout, frames):
    prepared, z = copy.deepcopy(flowvae).prepare_inference(), latents(frames, batch=2)
    wav = prepared.decode(z)
    assert wav.std() > 1e-2
    torch.testing.assert_close(wav, flowvae.decode(z), rtol=0, atol=5e-6)
    torch.testing.assert_close(prepared.decode(z[1:]), wav[1:], rtol=0, atol=5e-6)
    double = copy.deepcopy(flowvae).double()
    exact = double.decode(z.double())
    torch.testing.assert_close(double.prepare_inference().decode(z.double()), exact, rtol=0, atol=1e-11)


@torch.inference_mode()
def test_in_bf16_the_waveform_stays_close_and_fp32(flowvae):
    prepared, z = copy.deepcopy(flowvae).prepare_inference(torch.bfloat16), latents(7)
    wav, reference = prepared.decode(z), flowvae.decode(z)
    assert wav.dtype == torch.float32
    error = (wav - reference).std() / reference.std()
    assert 1e-4 < error < 0.05
    state, pieces = StreamingDecoder(prepared).start(), []
    for chunk in z.split(2, dim=1):
        piece, state = StreamingDecoder(prepared).push(chunk, state)
        pieces.append(piece)
    streamed = torch.cat([*pieces, StreamingDecoder(prepared).finish(state)], dim=1)
    assert (streamed - reference).std() / reference.std() < 0.05


def test_a_stream_shares_the_prepared_weights(flowvae):
    prepared = copy.deepcopy(flowvae).prepare_inference()
    assert isinstance(prepared.decoder, DecoderForInference)
    assert not list(prepared.decoder.parameters())
    for latency in (None, 12):
        streaming = StreamingDecoder(prepared, latency)
        assert streaming._stream.stages[0].blocks[0].pairs[0][1].conv is prepared.decoder.layers.stages[0].blocks[0].pairs[0][1]


def test_a_prepared_decoder_is_not_saved(flowvae, tmp_path):
    with pytest.raises(UserError, match="load the Flow-VAE again"):
        copy.deepcopy(flowvae).prepare_inference().save_pretrained(tmp_path / "weights")
    assert not (tmp_path / "weights").exists()


def test_the_inverse_stft_decoder_stays_as_it_is():
    flowvae = build(ISTFTConfig(channels=8, blocks=1))
    decoder = flowvae.decoder
    assert flowvae.prepare_inference().decoder is flowvae.prepare_inference(torch.float32).decoder is decoder
    with pytest.raises(UserError, match="leave the decoder's dtype out"):
        flowvae.prepare_inference(torch.bfloat16)
