"""Time and memory of synthesis, step by step, against the algorithm of the release on the same weights and noise."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kalle.evaluation.memory import PeakMemory
from kalle.models.batch import LMBatch
from kalle.models.flowvae import FlowVAE
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.models.lm import KalleLM
from kalle.synthesis.batching import generate_batch
from kalle.synthesis.request import DEFAULT_CHUNK_FRAMES
from kalle.synthesis.row import Frame, StopRule
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
    weight = next(flowvae.parameters())
    flowvae.decode(torch.zeros(1, request.max_frames, flowvae.config.latent_dim).to(weight))


def _bench_frames(lm: KalleLM, flowvae: FlowVAE, request: Request, uncached: bool, keep: Callable[[Timing], None]) -> Tensor:
    seconds = request.max_frames / flowvae.config.frame_rate_hz
    frames, wall, peak = _timed(lm.device, lambda: _frames(lm, request))
    latents = torch.stack([frame.z for frame in frames])
    means = torch.stack([frame.distribution.mean for frame in frames])
    keep(_timing("frames, cached", seconds, wall, peak, difference=_difference(_forced(lm, request, latents), means)))
    if uncached:
        _, wall, peak = _timed(lm.device, lambda: _frames(UncachedLM(lm), request))
        keep(_timing("frames, no cache (the release's algorithm)", seconds, wall, peak))
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
    requests = [replace(request, seed=index) for index in range(size)]
    budget = size * (len(request.text_ids) + request.max_frames)
    results, wall, peak = _timed(lm.device, lambda: generate_batch(lm, requests, frame_budget=budget))
    seconds = len(results) * request.max_frames / flowvae.config.frame_rate_hz
    keep(_timing(f"frames, batch of {size}", seconds, wall, peak))


def _frames(lm: Any, request: Request) -> list[Frame]:
    return list(generate(lm, request.text_ids, noise=request.noise, stop=request.stop, max_frames=request.max_frames))


def _streamed(lm: KalleLM, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request) -> tuple[Tensor, float]:
    started = time.perf_counter()
    stream = SpeechStream(lm, flowvae, decoder, request, DEFAULT_CHUNK_FRAMES)
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
