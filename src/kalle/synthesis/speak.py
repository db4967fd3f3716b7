"""One request through the whole chain: ids to frames to audio."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kalle.gaussian import DiagGaussian
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.adapter import Adapter
from kalle.synthesis.guidance import NO_GUIDANCE
from kalle.synthesis.quirks import ConvertedModels, ReleaseQuirks
from kalle.synthesis.row import Frame, FrameWatcher, StopRule
from kalle.synthesis.sampling import Generation, generate
from kalle.synthesis.speech import Attempt, FloatArray, Speech, SpeechEnding
from kalle.synthesis.watch import Watcher

PCM16_MAX = 32767


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that decides one result, besides the weights. D latent_dim, H hidden size of the language model."""

    text_ids: Tensor
    """(L,) int64, every special token included."""
    max_frames: int
    seed: int
    """Seeds the generator of all noise; unused where ``noise`` and ``decode_noise`` are given."""
    prompt_latents: Tensor | None = None
    """(P, D)"""
    speaker_latent: Tensor | None = None
    """(H,)"""
    temperature: float = 1.0
    stop: StopRule = field(default_factory=StopRule)
    quirks: ReleaseQuirks = field(default_factory=ReleaseQuirks)
    noise: Tensor | None = None
    """(max_frames, D) standard normal, used in order."""
    decode_noise: Tensor | None = None
    """(T, D) standard normal of the second draw, for ``decode="resample"`` only."""
    adapter: Adapter | None = None
    """Applied to the language model for this request alone."""
    watch: bool = True
    """Stop when the model says the same, or nothing, for seconds; quirks and a threshold of 0 switch it off too."""

    guidance: float = NO_GUIDANCE
    """How far from what the model would say without the words; 1 is its own prediction."""

    @property
    def alone(self) -> bool:
        """Whether no other request can share a batch with it."""
        return self.quirks.changes_model or self.guidance != NO_GUIDANCE

    @property
    def heard_prompt(self) -> Tensor | None:
        """The prompt latents (P, D) that the model reads; None for none."""
        latents = self.prompt_latents
        if latents is not None and self.quirks.drop_last_prompt_frame:
            latents = latents[:-1]
        return latents if latents is not None and len(latents) else None


@torch.no_grad()
def speak(lm: KalleLM, flowvae: FlowVAE, request: Request, converted: ConvertedModels | None = None) -> Speech:
    """Generate the frames of ``request`` once and decode them. UserError for a value the loop cannot use, or frames that are not finite.

    All noise comes from one CPU generator: D values for each frame in order, then, where frames are drawn a second
    time, D values for each of those. ``converted`` is that of ``ReleaseQuirks.language_model``.
    """
    watcher = watcher_of(flowvae, request)
    generation, generator = start(lm, request, watcher, converted)
    frames = list(generation)
    assert generation.stop_reason is not None
    return finish(flowvae, frames, generation.stop_reason, request, generator, watcher)


def watcher_of(flowvae: FlowVAE, request: Request) -> Watcher | None:
    """What ends ``request`` when it is stuck; None where the release is to be reproduced or the caller wants no stop at all."""
    if not request.watch or request.quirks != ReleaseQuirks() or request.stop.never:
        return None
    return Watcher(lambda latents: decode_latents(flowvae, latents), flowvae.config.frame_rate_hz)


def start(
    lm: KalleLM, request: Request, watcher: FrameWatcher | None = None, converted: ConvertedModels | None = None
) -> tuple[Generation, torch.Generator]:
    """The frames of ``request``, none made yet, and the generator of their noise, which a second draw goes on with.

    UserError for a value the loop cannot use. ``converted`` is that of ``ReleaseQuirks.language_model``.
    """
    generator = torch.Generator().manual_seed(request.seed)
    if request.adapter is not None:
        # A model in another precision is kept for ever in ``converted``; one that an adapter made is not to outlive the adapter.
        lm, converted = request.adapter.applied_to(lm), None
    generation = generate(
        request.quirks.language_model(lm, converted),
        request.text_ids,
        _row(request.heard_prompt),
        _row(request.speaker_latent),
        noise=request.noise,
        generator=generator,
        stop=request.stop,
        max_frames=request.max_frames,
        temperature=request.temperature,
        guidance=request.guidance,
        drop_last_frame_always=request.quirks.drop_last_frame_always,
        watcher=watcher,
    )
    return generation, generator


@torch.no_grad()
def finish(
    flowvae: FlowVAE,
    frames: Sequence[Frame],
    stop_reason: SpeechEnding,
    request: Request,
    generator: torch.Generator | None = None,
    watcher: Watcher | None = None,
) -> Speech:
    """Decode ``frames``, all that ``request`` gave, into a result; what ``watcher`` found to be stuck is cut from their tail.

    ``generator`` is the one of the frames' noise, needed for a second draw.
    """
    kept = len(frames) if watcher is None or watcher.kept_frames is None else watcher.kept_frames
    spoken, config = frames[:kept], flowvae.config
    audio = decode_latents(flowvae, _heard(spoken, request, generator, config.latent_dim))
    if request.quirks.truncate_int16:
        audio = truncate_to_int16(audio)
    return assemble(spoken, audio, stop_reason, request, config.sample_rate, config.latent_dim, len(frames) - kept, config.frame_rate_hz)


def assemble(
    frames: Sequence[Frame],
    audio: FloatArray,
    stop_reason: SpeechEnding,
    request: Request,
    sample_rate: int,
    dim: int,
    trimmed_frames: int = 0,
    frame_rate_hz: float = 12.5,
    stuck_frames: int = 0,
) -> Speech:
    """The result of one attempt: ``audio`` (S,) of ``frames``, after which ``trimmed_frames`` were left out.

    The last ``stuck_frames`` of ``frames`` should have been left out too, and were heard already.
    """
    z, distribution = _stack([frame.z for frame in frames], dim), _gaussian(frames, dim)
    trimmed_seconds, stuck_seconds = trimmed_frames / frame_rate_hz, stuck_frames / frame_rate_hz
    return Speech(
        audio=audio,
        sample_rate=sample_rate,
        stop_reason=stop_reason,
        seed=request.seed,
        latents=z.cpu().numpy(),
        log_std=distribution.log_std.cpu().numpy(),
        end_kl=np.array([frame.end_kl for frame in frames], dtype=np.float32),
        stop_probability=np.array([f.stop_probability for f in frames if f.stop_probability is not None], dtype=np.float32),
        max_frames=request.max_frames,
        means=distribution.mean.cpu().numpy(),
        log_likelihood=distribution.log_prob(z).mean(dim=-1).cpu().numpy(),
        stop=request.stop,
        attempts=(Attempt(request.seed, stop_reason, len(frames) - stuck_frames),),
        trimmed_seconds=trimmed_seconds,
        stuck_seconds=stuck_seconds,
        warnings=_warnings(stop_reason, len(audio) / sample_rate, trimmed_seconds, stuck_seconds),
    )


def _warnings(stop_reason: SpeechEnding, seconds: float, trimmed_seconds: float, stuck_seconds: float) -> tuple[str, ...]:
    heard = f"; {stuck_seconds:.1f} s of it were heard" if stuck_seconds else ""
    cut = heard + (f"; {trimmed_seconds:.1f} s of it were cut from the end" if trimmed_seconds else "")
    good = seconds - stuck_seconds
    texts = {
        "max_frames": f"the speech did not end by itself and was cut at {seconds:.1f} s: words may be missing",
        "repetition": f"the speech got stuck in a repetition after {good:.1f} s{cut}: words may be missing",
        "silence": f"the speech fell silent after {good:.1f} s without an end{cut}: words may be missing",
        "interrupted": f"the speech was interrupted after {seconds:.1f} s: words are missing",
    }
    nothing = () if seconds else ("nothing was spoken",)
    return (*nothing, *([texts[stop_reason]] if stop_reason in texts else []))


def _row(value: Tensor | None) -> Tensor | None:
    return None if value is None else value[None]


def _stack(rows: Sequence[Tensor], dim: int) -> Tensor:
    return torch.stack(list(rows)) if rows else torch.zeros(0, dim)


def _gaussian(frames: Sequence[Frame], dim: int) -> DiagGaussian:
    """The distributions (T, D) of ``frames``."""
    distributions = [frame.distribution for frame in frames]
    return DiagGaussian(_stack([d.mean for d in distributions], dim), _stack([d.log_std for d in distributions], dim))


def _heard(frames: Sequence[Frame], request: Request, generator: torch.Generator | None, dim: int) -> Tensor:
    """The latents (T, D) that go to the decoder."""
    if not frames or request.quirks.decode == "sampled":
        return _stack([frame.z for frame in frames], dim)
    if request.quirks.decode == "mean":
        return _gaussian(frames, dim).mean
    return _gaussian(frames, dim).sample(request.decode_noise, request.temperature, generator)


@torch.no_grad()
def decode_latents(flowvae: FlowVAE, latents: Tensor) -> FloatArray:
    """Audio (S,) of ``latents`` (T, D); nothing for no frames."""
    if not len(latents):
        return np.zeros(0, dtype=np.float32)
    weight = next(flowvae.parameters())
    return flowvae.decode(latents[None].to(weight.device, weight.dtype))[0].float().cpu().numpy()


def truncate_to_int16(audio: FloatArray) -> FloatArray:
    """Samples (S,) cut towards zero to the 16-bit grid, so that the writer's rounding keeps them; the release cuts so."""
    return np.trunc(audio * np.float32(PCM16_MAX)) / np.float32(PCM16_MAX)
