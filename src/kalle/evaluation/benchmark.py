"""Time and memory of synthesis and of streamed decoding."""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalle.evaluation.limits import Limits, Work, counted_flop, decoder_flop
from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.bigvgan import BigVGANDecoder
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.models.lm import KalleLM, NextFrame
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
RELEASE = "the release's algorithm"
"""Its name as a baseline: no cache, the whole prefix for every frame, and the decoder as it was trained."""
_UNCACHED = f"frames, {RELEASE}"
_WARM_UP_FRAMES = 16
_UNCOUNTED = 2
"""Steps before those that are timed."""


@dataclass(frozen=True)
class Timing:
    """One measured step."""

    step: str
    library: str
    """The library that computes it, with its version."""
    speech_seconds: float
    """Audio that the step made or prepared."""
    wall_seconds: float
    peak_bytes: int
    """Most memory that the process held during the step: the weights, and those of other rows that it has loaded."""
    limit_seconds: float
    """The least time that this machine needs for the step's work (`Limits.seconds`)."""
    limited_by: str
    """ "memory" or "compute"."""
    ratios: dict[str, float] = field(default_factory=dict)
    """Speed over that of baselines of the same run, by their name."""
    first_audio_seconds: float | None = None
    """Until the first piece can be played; only for a stream."""
    difference: float | None = None
    """Largest absolute difference from what it must equal: a stream from decoding at once; the cache's predictions from those of one
    pass without a cache over the same frames. Free-running results are not compared, for feedback amplifies rounding."""
    divergence_mean: float | None = None
    """KL of the predictions from those of the first engine under the same frames, nats a dimension."""
    divergence_99: float | None = None
    """The 99th percentile of the frames."""
    peak_since_start: bool = False
    """Whether ``peak_bytes`` is the most since the process began, where the system tells no other."""

    @property
    def rtf(self) -> float:
        """Wall seconds per second of audio."""
        return self.wall_seconds / self.speech_seconds


@dataclass(frozen=True)
class BackboneForm:
    """One way to compute the language model."""

    name: str
    library: str
    load: Callable[[], KalleLM]
    value_bytes: float
    """Of a weight in the layers."""


@dataclass(frozen=True)
class DecoderForm:
    """One way to compute the decoder; ``dtype`` is that of its convolutions."""

    name: str
    library: str
    load: Callable[[], FlowVAE]
    dtype: str = "float32"


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
    """Also speak so many requests at once, all of the shortest length."""
    minutes: float = math.inf
    """Frames that are not there by then, and rows that have not begun, are left out."""
    seed: int = 0


def timing_row(timing: Timing) -> dict[str, Any]:
    """The fields and the real-time factor, for a JSON file."""
    return asdict(timing) | {"rtf": timing.rtf}


class SynthesisBench:
    """Measures ``engines`` and ``decoders`` by turns on one request a length. Lengths are fixed: nothing stops early.

    The first of each is the baseline of the others, so its weights should be fp32 and its decoder the trained one. Streams are decoded by
    the last form.
    """

    def __init__(
        self,
        engines: Sequence[BackboneForm],
        decoders: Sequence[DecoderForm],
        plan: BenchPlan,
        limits: Limits,
        report: Callable[[Timing], None],
    ) -> None:
        """``report`` gets each row as it is measured."""
        self._engines, self._decoders, self._plan, self._limits, self._report = engines, decoders, plan, limits, report
        self._ends = time.perf_counter() + 60 * plan.minutes
        self._latents: dict[float, Tensor] = {}
        self._expected: dict[float, NextFrame] = {}
        self._found: dict[tuple[str, float], Timing] = {}
        self._decoder_flop: dict[int, int] = {}
        self.left_out: list[str] = []
        """Names of rows for which the time was too short."""

    @torch.no_grad()
    def run(self) -> None:
        """Measure every engine and keep the rows."""
        flowvae = self._decoders[-1].load()
        for engine in self._engines:
            lm = engine.load()
            self._warm_up(lm, flowvae)
            for seconds in self._plan.seconds:
                self._bench_frames(engine, lm, flowvae, seconds)
                self._bench_stream(engine, lm, flowvae, seconds)
            for size in self._plan.batch_sizes:
                self._bench_batch(engine, lm, flowvae, size)
            del lm
        for form in self._decoders:
            flowvae = form.load()
            for seconds in self._plan.seconds:
                self._bench_decoding(form, flowvae, seconds)
        for seconds in self._plan.seconds:
            self._add_up(seconds)

    def _keep(self, timing: Timing, seconds: float, ratios: Mapping[str, str]) -> None:
        """Keep and report the row of a length, with its ``ratios``: the names of baselines, and of their rows of that length."""
        against = {name: self._found[step, seconds] for name, step in ratios.items() if (step, seconds) in self._found}
        timing = replace(timing, ratios={name: row.rtf / timing.rtf for name, row in against.items()})
        self._found[timing.step, seconds] = timing
        self._report(timing)

    @property
    def rows(self) -> list[Timing]:
        """The rows measured so far."""
        return list(self._found.values())

    def _left(self, step: str, seconds: float) -> float:
        """Seconds that are left for ``step``; 0 where it is left out."""
        left = max(0.0, self._ends - time.perf_counter())
        if not left:
            self.left_out.append(f"{step}, {seconds:g} s of speech")
        return left

    def _request(self, lm: KalleLM, frames: int) -> Request:
        generator = torch.Generator().manual_seed(self._plan.seed)
        ids = torch.randint(lm.vocab_size, (self._plan.text_length,), generator=generator)
        noise = torch.randn(frames, lm.config.latent_dim, generator=generator)
        return Request(ids, frames, GenerationOptions(seed=self._plan.seed, stop=NEVER), noise=noise)

    def _warm_up(self, lm: KalleLM, flowvae: FlowVAE) -> None:
        for _ in RequestStream(lm, flowvae, StreamingDecoder(flowvae), self._request(lm, _WARM_UP_FRAMES)):
            pass

    def _bench_frames(self, engine: BackboneForm, lm: KalleLM, flowvae: FlowVAE, seconds: float) -> None:
        request, rate = self._request(lm, max(1, round(seconds * flowvae.config.frame_rate_hz))), flowvae.config.frame_rate_hz
        first, step = engine is self._engines[0], f"frames, {engine.name}"
        if first and self._plan.uncached and (left := self._left(_UNCACHED, seconds)):
            frames, wall, peak = _timed(lm.device, lambda: _frames(UncachedLM(lm), request, min(left, LONGEST_UNCACHED_S)))
            works = [self._reading(engine, lm, len(request.text_ids) + index) for index in range(len(frames))]
            self._keep(self._timing(_UNCACHED, engine.library, len(frames) / rate, wall, peak, works), seconds, {})
        if not (left := self._left(step, seconds)):
            return
        frames, wall, peak = _timed(lm.device, lambda: _frames(lm, request, left))
        works = [self._reading(engine, lm, len(request.text_ids)), *self._stepping(engine, lm, len(frames), 1)]
        timing = self._timing(step, engine.library, len(frames) / rate, wall, peak, works)
        if first:
            self._latents[seconds] = torch.stack([frame.z for frame in frames])
            self._expected[seconds] = self._forced(lm, request, seconds)
            means = torch.stack([frame.distribution.mean for frame in frames])
            timing = replace(timing, difference=_difference(self._expected[seconds].mean[: len(means)], means))
        elif seconds in self._expected:
            expected = self._expected[seconds]
            divergence = self._forced(lm, request, seconds).to(expected.mean.device).kl_to(expected).mean(dim=-1)
            timing = replace(timing, divergence_mean=float(divergence.mean()), divergence_99=float(divergence.quantile(0.99)))
        self._keep(timing, seconds, {self._engines[0].name: f"frames, {self._engines[0].name}", RELEASE: _UNCACHED})

    def _forced(self, lm: KalleLM, request: Request, seconds: float) -> NextFrame:
        """The predictions (T + 1, D) for the first engine's frames, in one pass without a cache."""
        return lm.predict_all(request.text_ids[None].to(lm.device), self._latents[seconds][None].to(lm.device))[0]

    def _bench_stream(self, engine: BackboneForm, lm: KalleLM, flowvae: FlowVAE, seconds: float) -> None:
        step, config = f"stream, {engine.name}", flowvae.config
        if not self._left(step, seconds):
            return
        request, decoder = self._request(lm, max(1, round(seconds * config.frame_rate_hz))), StreamingDecoder(flowvae)
        (wav, z, first), wall, peak = _timed(lm.device, lambda: _streamed(lm, flowvae, decoder, request))
        works = [self._reading(engine, lm, len(request.text_ids)), *self._stepping(engine, lm, len(z), 1)]
        works.append(self._decoding(self._decoders[-1], flowvae, len(z)))
        library = f"{engine.library}, {self._decoders[-1].library}"
        difference = _difference(wav, _decoded(flowvae, z))
        timing = self._timing(step, library, len(z) / config.frame_rate_hz, wall, peak, works)
        timing = replace(timing, first_audio_seconds=first, difference=difference)
        self._keep(timing, seconds, {self._engines[0].name: f"stream, {self._engines[0].name}"})

    def _bench_batch(self, engine: BackboneForm, lm: KalleLM, flowvae: FlowVAE, size: int) -> None:
        seconds, step = min(self._plan.seconds), f"batch of {size}, {engine.name}"
        if not self._left(step, seconds):
            return
        request = self._request(lm, max(1, round(seconds * flowvae.config.frame_rate_hz)))
        requests = [replace(request, options=request.options.changed(seed=index)) for index in range(size)]
        budget = size * (len(request.text_ids) + request.max_frames)
        results, wall, peak = _timed(lm.device, lambda: generate_batch(lm, requests, frame_budget=budget))
        works = [self._reading(engine, lm, len(request.text_ids))] * size + self._stepping(engine, lm, request.max_frames, size)
        spoken = len(results) * request.max_frames / flowvae.config.frame_rate_hz
        timing = self._timing(step, engine.library, spoken, wall, peak, works)
        self._keep(
            timing, seconds, {"one row": f"frames, {engine.name}", self._engines[0].name: f"batch of {size}, {self._engines[0].name}"}
        )

    def _bench_decoding(self, form: DecoderForm, flowvae: FlowVAE, seconds: float) -> None:
        step = f"decoding, {form.name}"
        if seconds not in self._latents or not self._left(step, seconds):
            return
        z = self._latents[seconds]
        _decoded(flowvae, z[:_WARM_UP_FRAMES])
        wav, wall, peak = _timed(z.device, lambda: _decoded(flowvae, z))
        works = [self._decoding(form, flowvae, len(z))]
        self._keep(
            self._timing(step, form.library, len(wav) / flowvae.config.sample_rate, wall, peak, works),
            seconds,
            {self._decoders[0].name: f"decoding, {self._decoders[0].name}"},
        )

    def _add_up(self, seconds: float) -> None:
        """Speaking as a whole, of each engine with the first and the last form of the decoder: frames, then decoding, each as measured."""
        forms = dict.fromkeys((self._decoders[0].name, self._decoders[-1].name))
        baselines = {
            f"{self._engines[0].name} + {self._decoders[0].name}": f"speaking, {self._engines[0].name} + {self._decoders[0].name}",
            RELEASE: f"speaking, {RELEASE}",
        }
        pairs = [(_UNCACHED, self._decoders[0].name, RELEASE)]
        pairs += [(f"frames, {engine.name}", form, f"{engine.name} + {form}") for engine in self._engines for form in forms]
        for frames, form, name in pairs:
            first, second = (self._found.get((step, seconds)) for step in (frames, f"decoding, {form}"))
            if first is None or second is None:
                continue
            spoken = second.speech_seconds
            whole = replace(
                first,
                step=f"speaking, {name}",
                library=", ".join(dict.fromkeys((first.library, second.library))),
                speech_seconds=spoken,
                wall_seconds=spoken * (first.rtf + second.rtf),
                peak_bytes=max(first.peak_bytes, second.peak_bytes),
                limit_seconds=first.limit_seconds / first.speech_seconds * spoken + second.limit_seconds,
                limited_by=first.limited_by if first.limit_seconds >= second.limit_seconds else second.limited_by,
                difference=None,
            )
            self._keep(whole, seconds, baselines)

    def _reading(self, engine: BackboneForm, lm: KalleLM, positions: int) -> Work:
        """Reading ``positions`` at once."""
        weights: int = lm.backbone.config.layer_parameters
        return Work(weights * engine.value_bytes, 2.0 * weights * positions, engine.name)

    def _stepping(self, engine: BackboneForm, lm: KalleLM, frames: int, rows: int) -> list[Work]:
        """``frames`` steps of ``rows`` behind the text, with the cache that each reads."""
        config = lm.backbone.config
        one, width = self._reading(engine, lm, rows), 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        cached = rows * width * lm.backbone.dtype.itemsize
        begin = self._plan.text_length
        return [replace(one, bytes_read=one.bytes_read + cached * (begin + index)) for index in range(frames)]

    def _decoding(self, form: DecoderForm, flowvae: FlowVAE, frames: int) -> Work:
        if frames not in self._decoder_flop:
            self._decoder_flop[frames] = decoder_flop(flowvae.config, frames)
        return Work(0.0, self._decoder_flop[frames], form.dtype)

    def _timing(self, step: str, library: str, seconds: float, wall: float, peak: PeakMemory, works: Sequence[Work]) -> Timing:
        limit, limited_by = self._limits.seconds(works)
        return Timing(step, library, seconds, wall, peak.bytes, limit, limited_by, peak_since_start=peak.since_start)


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


def _decoded(flowvae: FlowVAE, z: Tensor) -> Tensor:
    """The audio (S,) of ``z`` (T, D)."""
    weight = next(flowvae.parameters())
    return flowvae.decode(z[None].to(weight.device, weight.dtype))[0]


def _streamed(lm: KalleLM, flowvae: FlowVAE, decoder: StreamingDecoder, request: Request) -> tuple[Tensor, Tensor, float]:
    """The audio (S,), the latents (T, D) that it was made of, and the seconds until the first piece."""
    started = time.perf_counter()
    stream = RequestStream(lm, flowvae, decoder, request)
    pieces = [torch.from_numpy(next(stream))]
    first = time.perf_counter() - started
    pieces += [torch.from_numpy(piece) for piece in stream]
    return torch.cat(pieces), torch.from_numpy(stream.speech.latents), first


def _timed(device: torch.device, work: Callable[[], Any]) -> tuple[Any, float, PeakMemory]:
    _synchronise(device)
    with PeakMemory(device) as memory:
        started = time.perf_counter()
        result = work()
        _synchronise(device)
        wall = time.perf_counter() - started
    return result, wall, memory


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
            flops = [counted_flop(run) for run in (offline, streamed)]
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


@torch.no_grad()
def step_seconds(backbone: Any, rows: int, steps: int, past: int = 100) -> float:
    """Median CPU time of a step of ``rows`` behind ``past`` positions, of any backbone; other programs disturb it less than wall time."""
    width = backbone.config.hidden_size
    _, state = backbone.advance(torch.randn(rows, past, width), backbone.new_state())
    x, times = torch.randn(rows, 1, width), []
    for _ in range(_UNCOUNTED + steps):
        started = time.process_time()
        _, state = backbone.advance(x, state)
        times.append(time.process_time() - started)
    return statistics.median(times[_UNCOUNTED:])
