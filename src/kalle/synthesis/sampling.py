"""The loop that turns text ids into latent frames, one Gaussian after another."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM

StopReason = Literal["end", "max_frames"]
Ending = tuple[StopReason, "Frame | None"]
"""Why the loop ended, and the end frame where there was one."""
DEFAULT_MAX_FRAMES = 1000


@dataclass(frozen=True)
class StopRule:
    """When a predicted distribution counts as the end of speech.

    The end is where KL(prediction || N(1, e)), averaged over the dimensions, falls below ``threshold`` (nats) at a
    0-based frame index above ``min_index``. A threshold of 0 never stops, for a divergence is not below it.
    """

    threshold: float = 0.5
    min_index: int = 3

    def stops(self, end_kl: float, index: int) -> bool:
        """Whether the frame of 0-based ``index`` at ``end_kl`` nats from the end distribution is the end."""
        return end_kl < self.threshold and index > self.min_index


@dataclass(frozen=True)
class Frame:
    """One step: ``z`` (D,) fp32 is the sample fed back, ``distribution`` (D,) the fp32 Gaussian it was drawn from,
    ``end_kl`` that Gaussian's divergence from the end distribution in nats per dimension."""

    z: Tensor
    distribution: DiagGaussian
    end_kl: float


class Generation(Iterator[Frame]):
    """Frames as they are made. Once exhausted, ``stop_reason`` says why: "end" or "max_frames".

    The end frame is not speech and is not among the frames; ``end_frame`` keeps it.
    """

    def __init__(self, frames: Generator[Frame, None, Ending]) -> None:
        self._frames = frames
        self.stop_reason: StopReason | None = None
        self.end_frame: Frame | None = None

    def __next__(self) -> Frame:
        """The next frame of speech."""
        try:
            return next(self._frames)
        except StopIteration as stop:
            if stop.value is not None:
                self.stop_reason, self.end_frame = stop.value
            raise StopIteration from None


def generate(
    lm: KalleLM,
    text_ids: Tensor,
    prompt_latents: Tensor | None = None,
    speaker_latent: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    stop: StopRule | None = StopRule(),
    max_frames: int | None = None,
    temperature: float = 1.0,
    drop_last_frame_always: bool = False,
) -> Generation:
    """Yield frames of speech for ``text_ids`` (L,) int64, every special token included (see kalle.text.prompt_ids).

    ``prompt_latents`` (1, P, D) continue from a prompt, ``speaker_latent`` (1, H) goes in front. Frame t is
    mean + temperature * noise_t * std, with ``noise`` (max_frames, D) used in order or, without it, one fp32 draw of D
    values per frame from ``generator``, which must live on the CPU so that a seed means the same on every device;
    without either the sampling differs from call to call. ``stop=None`` never stops. ``max_frames`` defaults to the
    length of ``noise``, or to the 1000 steps of the release. With ``drop_last_frame_always`` the frame at the
    length cap is dropped too, as the release does. UserError for a bad value.
    """
    max_frames = _check(noise, generator, max_frames, temperature, lm.config.latent_dim)
    if noise is None and generator is None:
        generator = torch.Generator()
        generator.seed()
    draws = _Draws(noise, generator, lm.config.latent_dim)
    rule = stop or StopRule(threshold=0.0)
    return Generation(_frames(lm, text_ids, prompt_latents, speaker_latent, draws, rule, max_frames, temperature, drop_last_frame_always))


class _Draws:
    """Standard normal values, frame by frame, from a given tensor or a generator."""

    def __init__(self, noise: Tensor | None, generator: torch.Generator | None, dim: int) -> None:
        self._noise, self._generator, self._dim = noise, generator, dim

    def __call__(self, index: int) -> Tensor:
        if self._noise is not None:
            return self._noise[index]
        return torch.randn(self._dim, generator=self._generator, dtype=torch.float32)


@torch.no_grad()
def _frames(
    lm: KalleLM,
    text_ids: Tensor,
    prompt_latents: Tensor | None,
    speaker_latent: Tensor | None,
    draws: _Draws,
    stop: StopRule,
    max_frames: int,
    temperature: float,
    drop_last_frame_always: bool,
) -> Generator[Frame, None, Ending]:
    """The loop itself; returns how it ended."""
    device = lm.device
    prompt = None if prompt_latents is None else prompt_latents.to(device)
    speaker = None if speaker_latent is None else speaker_latent.to(device)
    prediction, state = lm.prefill(text_ids.to(device)[None], prompt, speaker)
    for index in range(max_frames):
        frame = _draw(prediction[0], draws(index), temperature)
        if stop.stops(frame.end_kl, index):
            return "end", frame
        last = index == max_frames - 1
        if not (last and drop_last_frame_always):
            yield frame
        if not last:
            prediction, state = lm.step(frame.z[None], state)
    return "max_frames", None


def _draw(prediction: DiagGaussian, noise: Tensor, temperature: float) -> Frame:
    distribution = prediction.to(torch.float32)
    end_kl = distribution.kl_to(DiagGaussian.end(distribution.mean)).mean()
    return Frame(distribution.sample(noise, temperature), distribution, float(end_kl))


def _check(noise: Tensor | None, generator: torch.Generator | None, max_frames: int | None, temperature: float, dim: int) -> int:
    """Refuse what the loop cannot use and return the number of steps."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"bad temperature: got {temperature}, expected a finite number of at least 0; 1 is the model's own spread")
    if generator is not None and generator.device.type != "cpu":
        raise UserError(f"the noise generator is on {generator.device}, expected one on the CPU; make it with torch.Generator()")
    if max_frames is None:
        max_frames = DEFAULT_MAX_FRAMES if noise is None else noise.shape[0]
    if max_frames < 1:
        raise UserError(f"bad length cap: got {max_frames} frames, expected at least 1; raise max_frames or max_seconds")
    if noise is not None and (noise.ndim != 2 or noise.shape[0] < max_frames or noise.shape[1] != dim):
        raise UserError(f"noise has shape {tuple(noise.shape)}, expected ({max_frames}, {dim}); pass one row for each frame")
    return max_frames
