"""Streams against ``FlowVAE.decode`` of the same latents."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalle.errors import UserError
from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.streaming import DecoderState, StreamingDecoder

ENCODER = EncoderConfig(channels=(2,) * 7, residual_layers=1)
HOP, DIM = 1280, 6
ROUNDING = 5e-6
"""Of waveforms up to 1 that go through a hundred convolutions in fp32."""
SUMMED_ROUNDING = 1e-3
"""The same where a pitch is summed up to a phase, and its rounding with it."""


def rounding(kind: str) -> float:
    return SUMMED_ROUNDING if kind == "sources" else ROUNDING


@cache
def bigvgan(seed: int = 0, gain: float = 1.7) -> FlowVAE:
    """Weights that make the most of the look-ahead, and speech-like amplitude."""
    torch.manual_seed(seed)
    config = FlowVAEConfig(latent_dim=DIM, encoder=ENCODER, flow=None, decoder=BigVGANConfig(initial_channels=64))
    flowvae = FlowVAE(config).eval().requires_grad_(False)
    for name, parameter in flowvae.decoder.named_parameters():
        if name.endswith("original0"):
            parameter.mul_(gain)
    conv = flowvae.decoder.conv_out.conv
    wav = flowvae.double().decode(latents(20, seed).double()).clamp(-1 + 1e-12, 1 - 1e-12).atanh().float()
    flowvae.float()
    conv.parametrizations.weight.original0.mul_(0.2 / wav.std())
    conv.bias.sub_(wav.mean()).mul_(0.2 / wav.std())
    return flowvae


def istft(seed: int = 0, blocks: int = 8, sources: bool = False) -> FlowVAE:
    torch.manual_seed(seed)
    config = FlowVAEConfig(
        latent_dim=DIM, encoder=ENCODER, flow=None, decoder=ISTFTConfig(channels=16, blocks=blocks, noise=sources, harmonics=sources)
    )
    flowvae = FlowVAE(config).eval().requires_grad_(False)
    # Blocks that matter, so that what they see does.
    for block in flowvae.decoder.blocks:
        block.scale.fill_(1.0)
    project = flowvae.decoder.head.project
    project.weight.mul_(4)
    if sources:
        for layer in (flowvae.decoder.head.noise, flowvae.decoder.head.harmonics, flowvae.decoder.head.pitch):
            layer.weight.normal_(std=0.3)
    project.bias[:321] += torch.log(0.2 / flowvae.decode(latents(20, seed)).std())
    return flowvae


def latents(frames: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randn(batch, frames, DIM, generator=torch.Generator().manual_seed(seed))


def stream(decoder: StreamingDecoder, z: Tensor, chunks: Sequence[int]) -> Tensor:
    """The whole in pushes of ``chunks`` frames (the last one again and again), the emission contract checked on the way."""
    state, pieces, at = decoder.start(z.shape[0]), [], 0
    sizes = list(chunks)
    while at < z.shape[1]:
        size = sizes.pop(0) if len(sizes) > 1 else max(1, sizes[0])
        wav, state = decoder.push(z[:, at : at + size], state)
        at = min(at + size, z.shape[1])
        pieces.append(wav)
        assert sum(piece.shape[1] for piece in pieces) == max(0, at - decoder.latency_frames) * HOP == state.emitted
    pieces.append(decoder.finish(state))
    return torch.cat(pieces, dim=1)


def assert_equal(streamed: Tensor, offline: Tensor, tolerance: float) -> None:
    assert streamed.shape == offline.shape
    assert streamed.dtype == offline.dtype
    torch.testing.assert_close(streamed, offline, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def models() -> dict[str, FlowVAE]:
    return {"bigvgan": bigvgan(), "istft": istft(), "sources": istft(sources=True)}


@pytest.mark.parametrize(("kind", "latency", "exact"), [("bigvgan", 5, 12), ("istft", 5, 5)])
def test_latencies(models, kind, latency, exact):
    decoder = StreamingDecoder(models[kind])
    assert (decoder.latency_frames, decoder.exact_latency_frames) == (latency, exact)


def test_a_smaller_istft_decoder_waits_less():
    assert StreamingDecoder(istft(blocks=2)).latency_frames == 2


@pytest.mark.parametrize(("kind", "shortest"), [("bigvgan", 4), ("istft", 5)])
@pytest.mark.parametrize("too_short", [-1, 0, 3])
def test_a_latency_that_cannot_be_done_is_refused(models, kind, shortest, too_short):
    with pytest.raises(UserError, match=f"got {too_short} frames, expected at least {shortest}"):
        StreamingDecoder(models[kind], too_short)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bigvgan", "istft", "sources"])
@pytest.mark.parametrize(("chunk", "frames"), [(1, 14), (2, 18), (5, 30), (17, 40), (40, 40)])
def test_equals_decode_at_exact_latency(models, kind, chunk, frames):
    z = latents(frames)
    offline = models[kind].decode(z)
    assert offline.std() > 0.1
    assert_equal(stream(StreamingDecoder(models[kind], 12), z, [chunk]), offline, rounding(kind))


@torch.inference_mode()
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("gain", [1.0, 1.7])
def test_the_default_latency_keeps_its_tolerance(seed, gain):
    flowvae, z = bigvgan(seed, gain), latents(16, seed + 100)
    offline = flowvae.decode(z)
    assert offline.std() > 0.1
    assert_equal(stream(StreamingDecoder(flowvae), z, [1]), offline, 1e-4)


@torch.inference_mode()
def test_the_default_latency_keeps_its_tolerance_with_the_reference_weights(golden_flowvae):
    z = torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(0))
    offline = golden_flowvae.decode(z)
    assert offline.std() > 0.1
    assert_equal(stream(StreamingDecoder(golden_flowvae), z, [1]), offline, 1e-4)
    assert_equal(stream(StreamingDecoder(golden_flowvae, 9), z, [2]), offline, 2 * ROUNDING)


@torch.inference_mode()
def test_a_shorter_latency_is_worse_and_a_longer_one_no_better_than_rounding(models):
    z = latents(14)
    offline = models["bigvgan"].decode(z)
    errors = [float((stream(StreamingDecoder(models["bigvgan"], latency), z, [1]) - offline).abs().max()) for latency in (4, 5, 6, 9)]
    assert errors[0] > 1e-4 > errors[1]
    assert max(errors[2:]) < ROUNDING


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bigvgan", "istft", "sources"])
@settings(max_examples=10, deadline=None)
@given(
    frames=st.integers(1, 14),
    chunks=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    latency=st.sampled_from((None, 6, 7, 8, 9, 11, 14)),
)
def test_any_split_of_any_length(models, kind, frames, chunks, latency):
    z = latents(frames, seed=frames)
    decoder = StreamingDecoder(models[kind], latency)
    tolerance = max(1e-4 if latency is None else 0.0, rounding(kind))
    assert_equal(stream(decoder, z, chunks), models[kind].decode(z), tolerance)


@torch.inference_mode()
@pytest.mark.parametrize(("kind", "latency"), [("bigvgan", None), ("bigvgan", 12), ("istft", None)])
def test_signals_shorter_than_the_look_ahead(models, kind, latency):
    decoder = StreamingDecoder(models[kind], latency)
    for frames in (1, 2, 3, 4, 5, 8, 12):
        z = latents(frames)
        assert_equal(stream(decoder, z, [2]), models[kind].decode(z), max(1e-4, rounding(kind)))


@torch.inference_mode()
def test_nothing_in_nothing_out(models):
    for flowvae in models.values():
        decoder = StreamingDecoder(flowvae)
        state = decoder.start()
        wav, state = decoder.push(latents(0), state)
        assert wav.shape == decoder.finish(state).shape == (1, 0)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bigvgan", "istft", "sources"])
def test_in_fp64_the_exact_stream_is_exact(models, kind):
    flowvae, z = copy.deepcopy(models[kind]).double(), latents(20).double()
    tolerance = 1e-12 if kind == "bigvgan" else rounding(kind)  # the inverse-STFT head works in fp32
    assert_equal(stream(StreamingDecoder(flowvae, 12), z, [3]).double(), flowvae.decode(z).double(), tolerance)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bigvgan", "istft", "sources"])
def test_a_state_is_a_value(models, kind):
    flowvae, z = models[kind], latents(30)
    decoder = StreamingDecoder(flowvae)
    _, fork = decoder.push(z[:, :11], decoder.start())
    before = [tensor.clone() for tensor in tensors(fork)]
    early = decoder.finish(fork)
    first, end = decoder.push(z[:, 11:], fork)
    other, _ = decoder.push(2 * z[:, 11:], fork)
    again, end_again = decoder.push(z[:, 11:], fork)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors(fork), strict=True))
    assert torch.equal(first, again)
    assert torch.equal(decoder.finish(end), decoder.finish(end_again))
    assert torch.equal(early, decoder.finish(fork))
    assert not torch.equal(first, other)
    sent = (11 - decoder.latency_frames) * HOP
    assert_equal(torch.cat([first, decoder.finish(end)], dim=1), flowvae.decode(z)[:, sent:], max(1e-4, rounding(kind)))
    assert_equal(early, flowvae.decode(z[:, :11])[:, sent:], max(1e-4, rounding(kind)))


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bigvgan", "istft", "sources"])
def test_a_long_stream_neither_drifts_nor_grows(models, kind):
    flowvae, z = models[kind], latents(150)
    decoder, offline = StreamingDecoder(flowvae), flowvae.decode(z)
    state, pieces, sizes = decoder.start(), [], []
    for chunk in z.split(5, dim=1):
        wav, state = decoder.push(chunk, state)
        pieces.append(wav)
        sizes.append(state.nbytes)
    wav = torch.cat([*pieces, decoder.finish(state)], dim=1)
    assert len(set(sizes[10:])) == 1
    assert sizes[-1] == sum(tensor.numel() * tensor.element_size() for tensor in tensors(state))
    error = (wav - offline).abs()
    assert error[:, -50 * HOP :].max() < max(1e-4, rounding(kind))
    assert error.max() < max(1e-4, rounding(kind))


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bigvgan", "istft", "sources"])
def test_a_big_chunk_leaves_no_more_than_a_small_one(models, kind):
    decoder = StreamingDecoder(models[kind])
    _, small = decoder.push(latents(1), decoder.push(latents(29), decoder.start())[1])
    _, big = decoder.push(latents(30), decoder.start())
    assert big.nbytes == small.nbytes < 200_000


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["bigvgan", "istft", "sources"])
def test_batches_equal_their_rows(models, kind):
    decoder, z = StreamingDecoder(models[kind]), latents(15, batch=3)
    together = stream(decoder, z, [4])
    assert_equal(together, models[kind].decode(z), max(1e-4, rounding(kind)))
    assert_equal(together[1:2], stream(decoder, z[1:2], [4]), rounding(kind))


@torch.inference_mode()
def test_the_waveform_is_clipped_as_decode_does():
    flowvae = istft()
    flowvae.decoder.head.project.bias[:321] += 2.0
    z = latents(12)
    offline = flowvae.decode(z)
    assert offline.abs().max() == 1
    assert_equal(stream(StreamingDecoder(flowvae), z, [3]), offline, 5 * ROUNDING)


@pytest.mark.parametrize("shape", [(1, 3, DIM + 1), (2, 3, DIM), (3, DIM)])
def test_latents_that_do_not_fit_are_refused(models, shape):
    decoder = StreamingDecoder(models["istft"])
    with pytest.raises(UserError):
        decoder.push(torch.zeros(shape), decoder.start())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["bigvgan", "istft", "sources"])
def test_the_module_is_left_as_it_was(models, kind):
    flowvae = copy.deepcopy(models[kind]).train().requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in flowvae.state_dict().items()}
    decoder = StreamingDecoder(flowvae)
    wav, _ = decoder.push(latents(8), decoder.start())
    assert not wav.requires_grad
    assert flowvae.training
    assert all(parameter.requires_grad for parameter in flowvae.parameters())
    assert before.keys() == flowvae.state_dict().keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in flowvae.state_dict().items())


def test_without_inference_mode_no_graph_grows(models):
    for flowvae in map(copy.deepcopy, models.values()):
        decoder = StreamingDecoder(flowvae.requires_grad_(True))
        wav, state = decoder.push(latents(14), decoder.start())
        assert not any(tensor.requires_grad for tensor in (wav, *tensors(state)))


def test_weights_are_computed_once(models, monkeypatch):
    calls: list[object] = []
    decoder = StreamingDecoder(models["bigvgan"])
    original = torch._weight_norm
    monkeypatch.setattr(torch, "_weight_norm", lambda *args, **kwargs: calls.append(args) or original(*args, **kwargs))
    with torch.inference_mode():
        stream(decoder, latents(9), [3])
        assert not calls
        models["bigvgan"].decode(latents(2))
    assert calls, "the module computes its weights in another way now: mend this test"


def tensors(state: object) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    values = (
        state
        if isinstance(state, tuple)
        else [getattr(state, f.name) for f in dataclasses.fields(state)]
        if dataclasses.is_dataclass(state)
        else []
    )
    return [tensor for value in values for tensor in tensors(value)]


def test_states_hold_all_their_tensors():
    flowvae = istft()
    state = StreamingDecoder(flowvae).start()
    assert isinstance(state, DecoderState)
    assert state.nbytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors(state)) > 0
