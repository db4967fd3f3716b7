"""Time and memory of synthesis, step by step, against the algorithm of the release on the same weights and noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kalle.evaluation.memory import PeakMemory
from kalle.models.flowvae import FlowVAE
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.models.lm import KalleLM
from kalle.synthesis.batching import generate_batch
from kalle.synthesis.request import DEFAULT_CHUNK_FRAMES
from kalle.synthesis.row import StopRule
from kalle.synthesis.sampling import generate
from kalle.synthesis.speak import Request
from kalle.synthesis.stream import SpeechStream
from kalle.synthesis.uncached import UncachedLM

NEVER = StopRule(threshold=0.0)


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
    """Until the first piece could be heard; only for a stream."""
    difference: float | None = None
    """Largest absolute difference from the step it must equal."""

    @property
    def rtf(self) -> float:
        """Wall seconds per second of audio."""
        return self.wall_seconds / self.speech_seconds


@dataclass(frozen=True)
class BenchPlan:
    """What to measure."""

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
    return Request(ids, frames, plan.seed, stop=NEVER, noise=noise)


def _warm_up(lm: KalleLM, flowvae: FlowVAE, plan: BenchPlan) -> None:
    request = _request(lm, flowvae, plan, 8 / flowvae.config.frame_rate_hz)
    for _ in SpeechStream(lm, flowvae, StreamingDecoder(flowvae), request, DEFAULT_CHUNK_FRAMES):
        pass


def _bench_frames(lm: KalleLM, flowvae: FlowVAE, request: Request, uncached: bool, keep: Callable[[Timing], None]) -> Tensor:
    seconds = request.max_frames / flowvae.config.frame_rate_hz
    latents, wall, peak = _timed(lm.device, lambda: _latents(lm, request))
    keep(Timing("frames, cached", seconds, wall, peak))
    if uncached:
        theirs, wall, peak = _timed(lm.device, lambda: _latents(UncachedLM(lm), request))
        keep(Timing("frames, no cache (the release's algorithm)", seconds, wall, peak, difference=_difference(theirs, latents)))
    return latents


def _bench_audio(lm: KalleLM, flowvae: FlowVAE, request: Request, latents: Tensor, keep: Callable[[Timing], None]) -> None:
    seconds = request.max_frames / flowvae.config.frame_rate_hz
    weight = next(flowvae.parameters())
    wav, wall, peak = _timed(lm.device, lambda: flowvae.decode(latents[None].to(weight.device, weight.dtype))[0])
    keep(Timing("decoding", seconds, wall, peak))
    decoder = StreamingDecoder(flowvae)
    (streamed, first), wall, peak = _timed(lm.device, lambda: _streamed(lm, flowvae, decoder, request))
    keep(Timing("stream: frames and decoding", seconds, wall, peak, first, _difference(streamed, wav)))


def _bench_batch(lm: KalleLM, flowvae: FlowVAE, request: Request, size: int, keep: Callable[[Timing], None]) -> None:
    requests = [replace(request, seed=index) for index in range(size)]
    budget = size * (len(request.text_ids) + request.max_frames)
    results, wall, peak = _timed(lm.device, lambda: generate_batch(lm, requests, frame_budget=budget))
    seconds = len(results) * request.max_frames / flowvae.config.frame_rate_hz
    keep(Timing(f"frames, batch of {size}", seconds, wall, peak))


def _latents(lm: Any, request: Request) -> Tensor:
    frames = generate(lm, request.text_ids, noise=request.noise, stop=request.stop, max_frames=request.max_frames)
    return torch.stack([frame.z for frame in frames])


def _streamed(lm: KalleLM, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request) -> tuple[Tensor, float]:
    started = time.perf_counter()
    stream = SpeechStream(lm, flowvae, decoder, request, DEFAULT_CHUNK_FRAMES)
    pieces = [torch.from_numpy(next(stream))]
    first = time.perf_counter() - started
    pieces += [torch.from_numpy(piece) for piece in stream]
    return torch.cat(pieces), first


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float, int]:
    _synchronise(device)
    with PeakMemory(device) as memory:
        started = time.perf_counter()
        result = work()
        _synchronise(device)
        wall = time.perf_counter() - started
    return result, wall, memory.bytes


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _difference(first: Tensor, second: Tensor) -> float:
    return float((first.cpu() - second.cpu()).abs().max())
