"""One request through the whole chain: ids to frames to audio."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from kalle.gaussian import DiagGaussian
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.quirks import ReleaseQuirks
from kalle.synthesis.sampling import Frame, StopRule, generate
from kalle.synthesis.speech import FloatArray, Speech

PCM16_MAX = 32767


@dataclass(frozen=True)
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


@torch.no_grad()
def speak(lm: KalleLM, flowvae: FlowVAE, request: Request) -> Speech:
    """Generate the frames of ``request`` and decode them. UserError for a value the loop cannot use.

    All noise comes from one CPU generator: D values for each frame in order, then, where frames are drawn a second
    time, D values for each of those.
    """
    quirks, generator = request.quirks, torch.Generator().manual_seed(request.seed)
    generation = generate(
        lm,
        request.text_ids,
        _prompt(request),
        _row(request.speaker_latent),
        noise=request.noise,
        generator=generator,
        stop=request.stop,
        max_frames=request.max_frames,
        temperature=request.temperature,
        drop_last_frame_always=quirks.drop_last_frame_always,
    )
    frames = list(generation)
    assert generation.stop_reason is not None
    latents = _stack([frame.z for frame in frames], flowvae.config.latent_dim)
    heard = _heard(frames, latents, request, generator)
    audio = _decode(flowvae, heard)
    return Speech(
        audio=truncate_to_int16(audio) if quirks.truncate_int16 else audio,
        sample_rate=flowvae.config.sample_rate,
        stop_reason=generation.stop_reason,
        seed=request.seed,
        latents=latents.cpu().numpy(),
        log_std=_stack([frame.distribution.log_std for frame in frames], flowvae.config.latent_dim).cpu().numpy(),
        end_kl=np.array([frame.end_kl for frame in frames], dtype=np.float32),
        max_frames=request.max_frames,
    )


def _prompt(request: Request) -> Tensor | None:
    latents = request.prompt_latents
    if latents is not None and request.quirks.drop_last_prompt_frame:
        latents = latents[:-1]
    return _row(latents) if latents is not None and len(latents) else None


def _row(value: Tensor | None) -> Tensor | None:
    return None if value is None else value[None]


def _stack(rows: list[Tensor], dim: int) -> Tensor:
    return torch.stack(rows) if rows else torch.zeros(0, dim)


def _heard(frames: list[Frame], latents: Tensor, request: Request, generator: torch.Generator) -> Tensor:
    """The latents (T, D) that go to the decoder."""
    if not frames or request.quirks.decode == "sampled":
        return latents
    distribution = DiagGaussian(
        torch.stack([frame.distribution.mean for frame in frames]), torch.stack([frame.distribution.log_std for frame in frames])
    )
    if request.quirks.decode == "mean":
        return distribution.mean
    return distribution.sample(request.decode_noise, request.temperature, generator)


def _decode(flowvae: FlowVAE, latents: Tensor) -> FloatArray:
    """Audio (S,) of ``latents`` (T, D); nothing for no frames."""
    if not len(latents):
        return np.zeros(0, dtype=np.float32)
    weight = next(flowvae.parameters())
    return flowvae.decode(latents[None].to(weight.device, weight.dtype))[0].float().cpu().numpy()


def truncate_to_int16(audio: FloatArray) -> FloatArray:
    """Samples (S,) cut towards zero to the 16-bit grid, so that the writer's rounding keeps them; the release cuts so."""
    return np.trunc(audio * np.float32(PCM16_MAX)) / np.float32(PCM16_MAX)
