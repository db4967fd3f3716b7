"""What streaming the decoder costs and what it deviates: plain functions that return rows."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.bigvgan import BigVGANDecoder
from kalle.models.flowvae.streaming import StreamingDecoder


@dataclass(frozen=True)
class LatencyError:
    """How far a stream is from ``FlowVAE.decode`` of the same latents."""

    latency_frames: int
    chunk_frames: int
    max_error: float
    """Largest absolute difference of two samples."""
    level: float
    """Standard deviation of the waveform."""


@dataclass(frozen=True)
class StreamCost:
    """A streamed utterance against decoding it at once."""

    latency_frames: int
    chunk_frames: int
    time_ratio: float
    flop_ratio: float
    """Of the convolutions and matrix products."""
    state_bytes: int
    """Held between two pushes."""


def stream_decode(decoder: StreamingDecoder, z: Tensor, chunk_frames: int) -> tuple[Tensor, int]:
    """The waveform (B, T * hop) of ``z`` (B, T, D) in pushes of ``chunk_frames``, and the largest state in bytes."""
    state, pieces, size = decoder.start(z.shape[0]), [], 0
    for chunk in z.split(chunk_frames, dim=1):
        wav, state = decoder.push(chunk, state)
        pieces.append(wav)
        size = max(size, state.nbytes)
    return torch.cat([*pieces, decoder.finish(state)], dim=-1), size


@torch.inference_mode()
def latency_errors(flowvae: FlowVAE, z: Tensor, latencies_frames: Sequence[int], chunk_frames: int = 1) -> list[LatencyError]:
    """One row a latency, for the latents ``z`` (B, T, D). Small chunks are the hardest: they have the most edges."""
    offline = flowvae.decode(z)
    rows = []
    for latency in latencies_frames:
        wav, _ = stream_decode(StreamingDecoder(flowvae, latency), z, chunk_frames)
        rows.append(LatencyError(latency, chunk_frames, float((wav - offline).abs().max()), float(offline.std())))
    return rows


@torch.inference_mode()
def stream_costs(
    flowvae: FlowVAE,
    z: Tensor,
    chunks_frames: Sequence[int] = (1, 2, 4, 8, 16),
    latencies_frames: Sequence[int | None] = (None,),
    repeats: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> list[StreamCost]:
    """One row for each latency (None: the default) and chunk, for the latents ``z`` (B, T, D).

    Times are the best of ``repeats``, offline and streamed taking turns, in seconds of ``clock``: ``time.process_time`` tells
    more where other programs compete for the processor.
    """
    rows = []
    for latency in latencies_frames:
        decoder = StreamingDecoder(flowvae, latency)
        for chunk in chunks_frames:
            offline, streamed = (lambda: flowvae.decode(z)), (lambda d=decoder, c=chunk: stream_decode(d, z, c))
            flops = [_flops(run) for run in (offline, streamed)]
            times = [[_seconds(run, clock) for run in (offline, streamed)] for _ in range(repeats)]
            best = [min(column) for column in zip(*times, strict=True)]
            _, size = streamed()
            rows.append(StreamCost(decoder.latency_frames, chunk, best[1] / best[0], flops[1] / flops[0], size))
    return rows


@torch.no_grad()
def random_flowvae(
    decoder: BigVGANConfig | ISTFTConfig, latent_dim: int, seed: int = 0, gain: float = 1.0, spread: float = 0.0, level: float = 0.15
) -> FlowVAE:
    """A Flow-VAE with random weights and next to no encoder.

    The paper's decoder gives noise of standard deviation ``level`` for normal latents, and can be made harder on its look-ahead:
    ``gain`` scales every convolution, ``spread`` is the standard deviation of the activations' logarithmic parameters.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        encoder = EncoderConfig(channels=(2,) * 7, residual_layers=1)
        flowvae = FlowVAE(FlowVAEConfig(latent_dim=latent_dim, encoder=encoder, flow=None, decoder=decoder)).eval().requires_grad_(False)
    if not isinstance(flowvae.decoder, BigVGANDecoder):
        return flowvae
    for name, parameter in flowvae.decoder.named_parameters():
        if name.endswith(("alpha", "beta")):
            parameter.copy_(spread * torch.randn(parameter.shape, generator=generator))
        elif name.endswith("original0") and not name.startswith("conv_out"):
            parameter.mul_(gain)
    set_level(flowvae, torch.randn(1, 40, latent_dim, generator=generator), level)
    return flowvae


@torch.no_grad()
def set_level(flowvae: FlowVAE, z: Tensor, level: float) -> None:
    """Scale and centre the paper's decoder's last convolution, so that errors are those at a voice's level.

    Before its tanh the waveform of ``z`` (B, T, D) then has the standard deviation ``level`` and no offset.
    """
    decoder = flowvae.decoder
    assert isinstance(decoder, BigVGANDecoder), type(decoder)
    conv = decoder.conv_out.conv
    before: list[Tensor] = []
    hook = conv.register_forward_hook(lambda module, inputs, output: before.append(output))
    decoder(z.transpose(1, 2))
    hook.remove()
    factor = level / before[0].std()
    conv.parametrizations.weight.original0.mul_(factor)
    conv.bias.sub_(before[0].mean()).mul_(factor)


def _seconds(run: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return clock() - start


def _flops(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
