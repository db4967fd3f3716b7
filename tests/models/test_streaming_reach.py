"""What a stream's samples depend on, by gradient, and what it computes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.bigvgan import AntiAliasedSnake
from kalle.models.flowvae.inference import REACH, PreparedActivation, PreparedDecoder
from kalle.models.flowvae.streaming import EXACT, BigVGANStream, StreamingDecoder, Window, delay_samples, window_within
from kalle.models.flowvae.streaming_layers import ActivationStream, SymmetricConvStream

ENCODER = EncoderConfig(channels=(2,) * 7, residual_layers=1)
HOP, DIM = 1280, 6
SMALL = BigVGANConfig(initial_channels=64)


def build(decoder: BigVGANConfig | ISTFTConfig) -> FlowVAE:
    torch.manual_seed(0)
    return FlowVAE(FlowVAEConfig(latent_dim=DIM, encoder=ENCODER, flow=None, decoder=decoder)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def bigvgan() -> PreparedDecoder:
    return PreparedDecoder(build(BigVGANConfig(initial_channels=64)).decoder)


def test_the_delay_is_the_look_ahead(bigvgan):
    # 14,135 samples are what test_flowvae measures by gradient; 5,359 for the inverse STFT, whose window begins with a zero.
    assert delay_samples(bigvgan) == 14135
    assert StreamingDecoder(build(ISTFTConfig(channels=8)))._stream.delay_samples == 5360


@pytest.mark.parametrize(
    ("latency", "window"),
    [
        (4, Window(3, 4)),
        (5, Window(3, 9)),
        (6, Window(3, 14)),
        (7, Window(2, 17)),
        (8, Window(2, 22)),
        (9, Window(1, 19)),
        (11, Window(1, 29)),
        (12, EXACT),
    ],
)
def test_windows_use_the_latency_they_are_given(bigvgan, latency, window):
    assert window_within(bigvgan, latency * HOP) == window
    assert latency * HOP - 256 < delay_samples(bigvgan, window) <= latency * HOP or window == EXACT
    assert window_within(bigvgan, 3 * HOP) is None


@pytest.mark.parametrize("window", [EXACT, Window(1, 3), Window(3, 4), Window(6, 9)])
@torch.inference_mode()
def test_the_layers_emit_as_much_as_they_say(bigvgan, window):
    layers = BigVGANStream(bigvgan, window)
    emitted, state = 0, layers.start(1)
    for frames in range(1, 17):
        wav, state = layers.push(torch.randn(1, DIM, 1), state)
        emitted += wav.shape[1]
        assert emitted == max(0, frames * HOP - layers.delay_samples)


@pytest.mark.parametrize(("latency", "config"), [(4, SMALL), (5, SMALL), (12, SMALL), (5, ISTFTConfig(8))])
def test_a_sample_depends_on_the_frames_of_its_latency_only(latency, config):
    decoder = StreamingDecoder(build(config).double(), latency)
    z = torch.randn(1, 18, DIM, dtype=torch.float64, requires_grad=True)
    state, pieces = decoder.start(), []
    for chunk in z.split(1, dim=1):
        wav, state = decoder.push(chunk, state)
        pieces.append(wav)
    wav = torch.cat(pieces, dim=1)
    frame = 18 - latency - 2
    # The frame's last sample is emitted when latency frames have come after it.
    (gradient,) = torch.autograd.grad(wav[0, (frame + 1) * HOP - 1], z)
    reached = gradient[0].abs().sum(-1).nonzero()[:, 0].max()
    assert frame + 3 <= reached <= frame + latency


def test_an_exact_stream_reaches_as_far_as_decode():
    flowvae = build(SMALL).double()
    decoder = StreamingDecoder(flowvae)
    exact = StreamingDecoder(flowvae, 12)
    assert exact.latency_frames == exact.exact_latency_frames > decoder.latency_frames

    def streamed(z: Tensor) -> Tensor:
        wav, state = exact.push(z, exact.start())
        return torch.cat([wav, exact.finish(state)], dim=1)

    z = torch.randn(1, 14, DIM, dtype=torch.float64)
    direction = torch.zeros_like(z)
    direction[:, 12] = 1
    _, tangent = torch.func.jvp(streamed, (z,), (direction,))
    assert 12 * HOP - int(tangent[0].nonzero()[0]) == 14135


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 4, 5, 6, 9, 10, 11, 12, 40])
@pytest.mark.parametrize("chunk", [1, 3, 40])
def test_the_delayed_activation_is_the_activation(length, chunk):
    activation = AntiAliasedSnake(3).double()
    activation.act.alpha.copy_(torch.tensor([0.0, 0.5, -1.0]))
    layer, x = ActivationStream(PreparedActivation(activation), REACH), torch.randn(1, 3, 1, length, dtype=torch.float64)
    state, pieces, nothing = layer.start(1), [], x[..., :0]
    for piece in x.split(chunk, dim=-1):
        y, state = layer.push(piece, state, nothing)
        pieces.append(y)
    assert sum(piece.shape[-1] for piece in pieces) == max(0, length - REACH)
    pieces.append(layer.push(nothing, state, nothing, end=True)[0])
    torch.testing.assert_close(torch.cat(pieces, dim=-1)[:, :, 0], activation(x[:, :, 0]), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("hold", [0, 1, 5, 8])
def test_the_windowed_activation_forgets_what_it_holds(hold):
    activation = AntiAliasedSnake(2).double()
    layer, x = ActivationStream(PreparedActivation(activation), 0), torch.randn(1, 2, 1, 30, dtype=torch.float64)
    nothing, provisional = x[..., :0], torch.randn(1, 2, 1, hold, dtype=torch.float64)
    first, state = layer.push(torch.cat([x[..., :12], provisional], dim=-1), layer.start(1), nothing, hold)
    assert first.shape[-1] == 12 + hold
    rest, _ = layer.push(x[..., 12:], state, nothing)
    torch.testing.assert_close(rest[:, :, 0], activation(x[:, :, 0])[..., 12:], rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dilation", [1, 2])
def test_the_symmetric_convolution_in_pushes(dilation):
    conv = torch.nn.Conv1d(2, 3, 5, padding=2 * dilation, dilation=dilation).double()
    layer = SymmetricConvStream(conv)
    for length in (1, 3, 20):
        x, state, pieces = torch.randn(1, 2, length, dtype=torch.float64), layer.start(1), []
        for piece in x.split(1, dim=-1):
            y, state = layer.push(piece, state)
            pieces.append(y)
        pieces.append(layer.push(x[..., :0], state, end=True)[0])
        torch.testing.assert_close(torch.cat(pieces, dim=-1), conv(x))


@torch.inference_mode()
@pytest.mark.parametrize(
    ("config", "latency", "chunk", "share"),
    [
        (SMALL, None, 4, 1.1),
        (SMALL, None, 8, 1.07),
        (SMALL, 12, 4, 1.02),
        (ISTFTConfig(16), None, 1, 1.001),
    ],
)
def test_what_is_computed_is_within_a_tenth_of_decoding_at_once(config, latency, chunk, share):
    flowvae, z = build(config).prepare_inference(), torch.randn(1, 24, DIM)
    decoder = StreamingDecoder(flowvae, latency)
    with FlopCounterMode(display=False) as whole:
        flowvae.decode(z)
    with FlopCounterMode(display=False) as pushed:
        state = decoder.start()
        for piece in z.split(chunk, dim=1):
            _, state = decoder.push(piece, state)
        decoder.finish(state)
    assert 0.95 < pushed.get_total_flops() / whole.get_total_flops() < share
