"""One utterance on its way: its noise, its stop rule, its length cap. Alone, in a batch and streamed, the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.lm import NextFrame

StopReason = Literal["end", "max_frames", "repetition", "silence"]
Ending = tuple[StopReason, "Frame | None"]
"""Why a row ended, and the end frame where there was one."""
DEFAULT_MAX_FRAMES = 1000
DEFAULT_STOP_PROBABILITY = 0.5
"""The rule of a model with a stop head that stores none (MELLE, arXiv 2407.08551)."""


@dataclass(frozen=True)
class StopRule:
    """When a predicted distribution counts as the end of speech.

    The end is where KL(prediction || N(1, e)), averaged over the dimensions, falls below ``threshold`` (nats) at a
    0-based frame index above ``min_index``. A threshold of 0 never stops, for a divergence is not below it. With ``probability`` the end
    is instead where the model's stop head gives at least that, and ``threshold`` has no say. UserError for a threshold that is negative
    or not a number, or a probability not in (0, 1].
    """

    threshold: float = 0.5
    min_index: int = 3
    probability: float | None = field(default=None, kw_only=True)
    """None, the divergence decides; else the model must have a stop head."""

    def __post_init__(self) -> None:
        if not hasattr(self.threshold, "__float__") or not self.threshold >= 0:
            raise UserError(f"bad stop threshold: got {self.threshold!r}, expected a number of at least 0; 0 never stops")
        if not hasattr(self.min_index, "__index__"):
            raise UserError(f"bad min_index of the stop rule: got {self.min_index!r}, expected an integer; correct it")
        if self.probability is not None and not (hasattr(self.probability, "__float__") and 0 < self.probability <= 1):
            raise UserError(f"bad stop probability: got {self.probability!r}, expected a number above 0, at most 1; correct it")

    @property
    def never(self) -> bool:
        """Whether it stops nothing."""
        return self.probability is None and self.threshold <= 0

    def stops(self, end_kl: float, index: int, stop_probability: float | None = None) -> bool:
        """Whether the frame of 0-based ``index`` is the end, ``end_kl`` nats from the end distribution and with ``stop_probability``."""
        if self.probability is None:
            return end_kl < self.threshold and index > self.min_index
        assert stop_probability is not None, "a stop rule by probability for a model without a stop head"
        return stop_probability >= self.probability and index > self.min_index

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in config.json, without a probability that is not asked for, so that older programs read the rest."""
        values = asdict(self)
        if self.probability is None:
            del values["probability"]
        return values


def default_stop(stop_head: bool) -> StopRule:
    """The rule of a model that stores none, with or without a stop head."""
    return StopRule(probability=DEFAULT_STOP_PROBABILITY) if stop_head else StopRule()


def check_stop(stop: StopRule | None, stop_head: bool) -> None:
    """UserError for a rule that looks at a stop head which is not there."""
    if stop is not None and stop.probability is not None and not stop_head:
        raise UserError(
            f"this model has no stop head: got a stop rule by probability {stop.probability:g}, expected one by threshold; "
            "use StopRule(threshold=…), or train with lm.stop_head=true"
        )


@dataclass(frozen=True, eq=False)
class Frame:
    """One step: ``z`` (D,) fp32 is the sample fed back, ``distribution`` (D,) the fp32 Gaussian it was drawn from,
    ``end_kl`` that Gaussian's divergence from the end distribution in nats per dimension, NaN where ``z`` is not finite,
    ``stop_probability`` what the stop head says of its being the end, None without a head."""

    z: Tensor
    distribution: DiagGaussian
    end_kl: float
    stop_probability: float | None = None


class FrameWatcher(Protocol):
    """Looks at the frames of one row in order and may end it; one object for each row."""

    def see(self, frame: Frame, index: int) -> StopReason | None:
        """Why the row ends with this frame of 0-based ``index``, which is kept; None to go on."""


@dataclass(frozen=True)
class RowStep:
    """What one step of a row gave: a ``frame`` of speech or none, and the ``ending`` where the row is over."""

    frame: Frame | None
    ending: Ending | None


class RowSampler:
    """The draws of one row, and the decision after each whether the row goes on. D latent dimensions.

    ``advance`` takes one prediction after the other, until a step has an ending. Several rows together: give
    ``draw_frames`` the ``noise`` of each and the frames it makes to ``see``.
    """

    def __init__(
        self,
        dim: int,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        stop: StopRule | None = None,
        max_frames: int | None = None,
        temperature: float = 1.0,
        drop_last_frame_always: bool = False,
        watcher: FrameWatcher | None = None,
    ) -> None:
        """See ``generate`` for the arguments; ``dim`` is D, and without ``stop`` nothing but the cap and ``watcher`` end the row."""
        self.max_frames = _check(noise, generator, max_frames, temperature, dim)
        if noise is None and generator is None:
            generator = torch.Generator()
            generator.seed()
        self.generator = generator
        self.temperature = temperature
        self.index = 0
        self._dim, self._noise = dim, noise
        self._stop = stop or StopRule(threshold=0.0)
        self._drop_last = drop_last_frame_always
        self._watcher = watcher

    def noise(self) -> Tensor:
        """The standard normal values (D,), fp32 on the CPU, of the frame of ``index``: to be called once for each frame."""
        if self._noise is not None:
            return self._noise[self.index].to("cpu", torch.float32)
        return torch.randn(self._dim, generator=self.generator, dtype=torch.float32)

    def see(self, frame: Frame) -> RowStep:
        """Take ``frame``, drawn with ``noise``, as the one of ``index``. UserError unless its sample and distribution are finite."""
        index, self.index = self.index, self.index + 1
        if not math.isfinite(frame.end_kl):
            raise _not_finite(frame, index, self.temperature)
        assert index < self.max_frames, f"frame {index} of a row that ended at its cap of {self.max_frames}"
        if self._stop.stops(frame.end_kl, index, frame.stop_probability):
            return RowStep(None, ("end", frame))
        last = self.index == self.max_frames
        if last and self._drop_last:
            return RowStep(None, ("max_frames", None))
        reason = None if self._watcher is None else self._watcher.see(frame, index)
        if last and reason is None:
            reason = "max_frames"
        return RowStep(frame, None if reason is None else (reason, None))

    def advance(self, prediction: DiagGaussian) -> RowStep:
        """Draw the frame of ``prediction`` (D,) and take it."""
        return self.see(draw_frames(prediction[None], [self])[0])


def draw_frames(prediction: DiagGaussian, rows: Sequence[RowSampler]) -> list[Frame]:
    """One frame for each of ``rows`` from ``prediction`` (B, D): mean + temperature * noise * std, each row with its own noise."""
    distribution = prediction.to(torch.float32)
    noise = torch.stack([row.temperature * row.noise() for row in rows])
    z = distribution.sample(noise)
    divergence = distribution.kl_to(DiagGaussian.end(distribution.mean)).mean(dim=-1)
    logit = distribution.stop_logit if isinstance(distribution, NextFrame) else None
    finite = z.isfinite().all(dim=-1)
    # Marked in the divergence, because reading a second value from an accelerator would cost a second wait.
    if logit is None:
        ends = [(end_kl, None) for end_kl in divergence.where(finite, torch.nan).tolist()]
    else:
        end_kl = divergence.where(finite & logit.isfinite(), torch.nan)
        ends = [tuple(pair) for pair in torch.stack([end_kl, logit.sigmoid()], dim=1).tolist()]
    # A frame that was a view would keep those of every other row in memory as long as itself.
    own = (lambda tensor: tensor) if len(rows) == 1 else Tensor.clone
    return [
        Frame(own(z[row]), DiagGaussian(own(distribution.mean[row]), own(distribution.log_std[row])), *ends[row])
        for row in range(len(rows))
    ]


def _not_finite(frame: Frame, index: int, temperature: float) -> UserError:
    """What to say of a frame whose divergence is not a finite number."""
    if frame.distribution.mean.isfinite().all() and frame.distribution.std.isfinite().all() and not frame.z.isfinite().all():
        return UserError(f"frame {index} overflows: got temperature {temperature}, expected finite samples; lower the temperature")
    cooler = f", lower the temperature of {temperature}" if temperature > 1 else ""
    return UserError(
        f"the model predicts values that are not finite at frame {index}: expected numbers; "
        f"load it with dtype float32{cooler}, or check the weights"
    )


def _check(noise: Tensor | None, generator: torch.Generator | None, max_frames: int | None, temperature: float, dim: int) -> int:
    """Refuse what a row cannot use and return its number of steps."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"bad temperature: got {temperature}, expected a finite number of at least 0; 1 is the model's own spread")
    if generator is not None and generator.device.type != "cpu":
        raise UserError(f"the noise generator is on {generator.device}, expected one on the CPU; make it with torch.Generator()")
    if max_frames is None:
        max_frames = DEFAULT_MAX_FRAMES if noise is None else noise.shape[0]
    if not hasattr(max_frames, "__index__") or max_frames < 1:
        raise UserError(f"bad length cap: got {max_frames} frames, expected at least 1; raise max_frames or max_seconds")
    if noise is not None and (noise.ndim != 2 or noise.shape[0] < max_frames or noise.shape[1] != dim):
        raise UserError(f"noise has shape {tuple(noise.shape)}, expected ({max_frames}, {dim}); pass one row for each frame")
    return max_frames
