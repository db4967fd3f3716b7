"""Time and memory of synthesis and of streamed decoding."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.bigvgan import BigVGANDecoder
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.models.lm import KalleLM
from kalle.models.lm_batch import LMBatch
from kalle.synthesis.batch import generate_batch
from kalle.synthesis.generate import Frame, FrameModel, Request, generate
from kalle.synthesis.options import NEVER, GenerationOptions
from kalle.synthesis.release_compat import UncachedLM
from kalle.synthesis.stream import RequestStream

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""Restarts the peak of the resident set on Linux (proc(5), clear_refs)."""


class PeakMemory:
    """Context manager: ``bytes`` afterwards is the most resident memory the process held inside, weights included.

    On CUDA it is that of torch's allocator. Where the system can't start its peak anew, ``bytes`` is the peak since the
    process began, and ``since_start`` says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0
        self.since_start = False

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self.since_start = not _restart_peak()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _peak_bytes()


def _restart_peak() -> bool:
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


LONGEST_UNCACHED_S = 60.0
"""Without a cache a frame costs more the later it comes; what is not there by then is left out, so that a full-size model ends."""


@dataclass(frozen=True)
class Timing:
    """One measured step."""

    step: str
    speech_seconds: float
    """Audio that the step made or prepared."""
    wall_seconds: float
    peak_bytes: int
    """Most memory held during the step, the weights included."""
    first_audio_seconds: float | None = None
    """Until the first piece can be played; only for a stream."""
    difference: float | None = None
    """Largest absolute difference from what it must equal: a stream from decoding at once; the cache's predictions from those of one
    pass without a cache over the same frames. Free-running results are not compared, for feedback amplifies rounding."""
    peak_since_start: bool = False
    """Whether ``peak_bytes`` is the most since the process began, where the system tells no other."""

    @property
    def rtf(self) -> float:
        """Wall seconds per second of audio."""
        return self.wall_seconds / self.speech_seconds


@dataclass(frozen=True)
class BenchPlan:
    """The measurements to take."""

    seconds: Sequence[float] = (4.0, 10.0)
    """Lengths of speech."""
    text_length: int = 32
    """Positions of text in front."""
    uncached: bool = True
    """Also run the release's algorithm, which recomputes the whole prefix for every frame."""
    batch_sizes: Sequence[int] = ()
    """Also speak so many requests at once, all of the longest length."""
    seed: int = 0


@torch.no_grad()
def bench_synthesis(lm: KalleLM, flowvae: FlowVAE, plan: BenchPlan, report: Callable[[Timing], None]) -> list[Timing]:
    """Measure every step of ``plan`` and call ``report`` for each as it is done. Lengths are fixed: nothing stops early."""
    rows: list[Timing] = []

    def keep(row: Timing) -> None:
        rows.append(row)
        report(row)

    _warm_up(lm, flowvae, plan)
    for seconds in plan.seconds:
        request = _request(lm, flowvae, plan, seconds)
        latents = _bench_frames(lm, flowvae, request, plan.uncached, keep)
        _bench_audio(lm, flowvae, request, latents, keep)
    for size in plan.batch_sizes:
        _bench_batch(lm, flowvae, _request(lm, flowvae, plan, max(plan.seconds)), size, keep)
    return rows


def timing_row(timing: Timing) -> dict[str, Any]:
    """The fields and the real-time factor, for a JSON file."""
    return asdict(timing) | {"rtf": timing.rtf}


def _request(lm: KalleLM, flowvae: FlowVAE, plan: BenchPlan, seconds: float) -> Request:
    frames = max(1, round(seconds * flowvae.config.frame_rate_hz))
    generator = torch.Generator().manual_seed(plan.seed)
    ids = torch.randint(lm.vocab_size, (plan.text_length,), generator=generator)
    noise = torch.randn(frames, lm.config.latent_dim, generator=generator)
    return Request(ids, frames, GenerationOptions(seed=plan.seed, stop=NEVER), noise=noise)


def _warm_up(lm: KalleLM, flowvae: FlowVAE, plan: BenchPlan) -> None:
    request = _request(lm, flowvae, plan, 8 / flowvae.config.frame_rate_hz)
    for _ in RequestStream(lm, flowvae, StreamingDecoder(flowvae), request):
        pass
    weight = next(flowvae.parameters())
    flowvae.decode(torch.zeros(1, request.max_frames, flowvae.config.latent_dim).to(weight))


def _bench_frames(lm: KalleLM, flowvae: FlowVAE, request: Request, uncached: bool, keep: Callable[[Timing], None]) -> Tensor:
    seconds = request.max_frames / flowvae.config.frame_rate_hz
    frames, wall, peak = _timed(lm.device, lambda: _frames(lm, request))
    latents = torch.stack([frame.z for frame in frames])
    means = torch.stack([frame.distribution.mean for frame in frames])
    keep(_timing("frames, cached", seconds, wall, peak, difference=_difference(_forced(lm, request, latents), means)))
    if uncached:
        frames, wall, peak = _timed(lm.device, lambda: _frames(UncachedLM(lm), request, LONGEST_UNCACHED_S))
        spoken = len(frames) / flowvae.config.frame_rate_hz
        keep(_timing("frames, no cache (the release's algorithm)", spoken, wall, peak))
    return latents


def _forced(lm: KalleLM, request: Request, latents: Tensor) -> Tensor:
    """Means (T, D) of the predictions for ``latents`` (T, D), in one pass without a cache."""
    counts = [torch.tensor([count], device=lm.device) for count in (len(request.text_ids), len(latents))]
    batch = LMBatch(request.text_ids[None].to(lm.device), counts[0], latents[None].to(lm.device), counts[1])
    return lm(batch).mean[0, :-1]


def _bench_audio(lm: KalleLM, flowvae: FlowVAE, request: Request, latents: Tensor, keep: Callable[[Timing], None]) -> None:
    seconds = request.max_frames / flowvae.config.frame_rate_hz
    weight = next(flowvae.parameters())
    wav, wall, peak = _timed(lm.device, lambda: flowvae.decode(latents[None].to(weight.device, weight.dtype))[0])
    keep(_timing("decoding", seconds, wall, peak))
    decoder = StreamingDecoder(flowvae)
    (streamed, first), wall, peak = _timed(lm.device, lambda: _streamed(lm, flowvae, decoder, request))
    keep(_timing("stream: frames and decoding", seconds, wall, peak, first, _difference(streamed, wav)))


def _bench_batch(lm: KalleLM, flowvae: FlowVAE, request: Request, size: int, keep: Callable[[Timing], None]) -> None:
    requests = [replace(request, options=request.options.changed(seed=index)) for index in range(size)]
    budget = size * (len(request.text_ids) + request.max_frames)
    results, wall, peak = _timed(lm.device, lambda: generate_batch(lm, requests, frame_budget=budget))
    seconds = len(results) * request.max_frames / flowvae.config.frame_rate_hz
    keep(_timing(f"frames, batch of {size}", seconds, wall, peak))


def _frames(lm: FrameModel, request: Request, longest_s: float = math.inf) -> list[Frame]:
    """The frames of ``request``, those only that are there after ``longest_s`` of wall time."""
    frames, started = [], time.perf_counter()
    generation = generate(lm, request.text_ids, noise=request.noise, stop=request.stop, max_frames=request.max_frames)
    for frame in generation:
        frames.append(frame)
        if time.perf_counter() - started > longest_s:
            generation.close()
            break
    return frames


def _streamed(lm: KalleLM, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request) -> tuple[Tensor, float]:
    started = time.perf_counter()
    stream = RequestStream(lm, flowvae, decoder, request)
    pieces = [torch.from_numpy(next(stream))]
    first = time.perf_counter() - started
    pieces += [torch.from_numpy(piece) for piece in stream]
    return torch.cat(pieces), first


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float, PeakMemory]:
    _synchronise(device)
    with PeakMemory(device) as memory:
        started = time.perf_counter()
        result = work()
        _synchronise(device)
        wall = time.perf_counter() - started
    return result, wall, memory


def _timing(
    step: str, seconds: float, wall: float, peak: PeakMemory, first: float | None = None, difference: float | None = None
) -> Timing:
    return Timing(step, seconds, wall, peak.bytes, first, difference, peak.since_start)


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first.cpu() - second.cpu()).abs().max())


@dataclass(frozen=True)
class LatencyError:
    """The deviation of a stream from ``FlowVAE.decode`` of the same latents."""

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
