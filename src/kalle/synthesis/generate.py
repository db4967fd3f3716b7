"""How a text is spoken: the loop that turns text ids into latent frames, one Gaussian after another, and everything that ends it."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kalle.errors import UserError, check_type
from kalle.gaussian import DiagGaussian
from kalle.models.lm import KalleLM, KalleLMConfig, NextFrame
from kalle.models.lm_state import LMState
from kalle.synthesis.adapter import Adapter
from kalle.synthesis.options import NEVER, NO_GUIDANCE, GenerationOptions, StopRule
from kalle.synthesis.release_compat import RELEASED_STEPS, ConvertedModels, UncachedLM
from kalle.text.tokenizer import without_text

StopReason = Literal["end", "max_frames", "repetition", "silence"]
FloatArray = NDArray[np.float32]
DEFAULT_MAX_FRAMES = RELEASED_STEPS
_DEFAULT_STOP = StopRule()
Decoder = Callable[[Tensor], FloatArray]
"""Latents (T, D) to their audio (T * hop,)."""
_FARTHEST = 1e6
"""Cap of one distance, so that a single overflow does not blind the sums."""
_NO_SOUND = 1e-9


class FrameModel(Protocol):
    """A source of frames: a language model with a cache, without one, guided, or any other engine. B rows, D latent dimensions."""

    @property
    def config(self) -> KalleLMConfig:
        """The configuration of the model."""

    @property
    def device(self) -> torch.device:
        """Where it takes its tensors."""

    @property
    def hidden_size(self) -> int:
        """Width of the speaker latent."""

    @property
    def vocab_size(self) -> int:
        """Number of text ids."""

    def prefill(
        self, text_ids: Tensor, prompt_latents: Tensor | None = None, speaker_latent: Tensor | None = None
    ) -> tuple[NextFrame, Any]:
        """Read the context, shapes as in ``KalleLM.prefill``: the distribution (B, D) of the first frame and the state for ``step``."""

    def step(self, z: Tensor, state: Any) -> tuple[NextFrame, Any]:
        """Append the frame ``z`` (B, D): the distribution (B, D) of the next one and the new state."""


@dataclass(frozen=True, eq=False)
class Request:
    """Everything that decides one result, besides the weights. D latent_dim, H hidden size of the language model."""

    text_ids: Tensor
    """(L,) int64, every special token included."""
    max_frames: int
    options: GenerationOptions
    """With seed, temperature and stop filled in: what the weights say where the user says nothing."""
    prompt_latents: Tensor | None = None
    """(P, D)"""
    speaker_latent: Tensor | None = None
    """(H,)"""
    noise: Tensor | None = None
    """(max_frames, D) standard normal, used in order; None draws it with a generator seeded with ``seed``."""
    decode_noise: Tensor | None = None
    """(T, D) standard normal of the second draw, for ``decode="resample"`` only."""
    adapter: Adapter | None = None
    """Applied to the language model for this request alone."""
    text: str = ""
    """The words that ``text_ids`` stand for, the prompt's not included."""
    low_confidence: float | None = None
    """Speech of a lower confidence is doubtful; None where that is not known of the weights."""
    warnings: tuple[str, ...] = ()
    """Warnings about the text, a sentence each."""

    @property
    def seed(self) -> int:
        """Seeds the generator of all noise."""
        assert self.options.seed is not None, "a request without a seed"
        return self.options.seed

    @property
    def temperature(self) -> float:
        """Scale of the standard deviations."""
        return 1.0 if self.options.temperature is None else self.options.temperature

    @property
    def stop(self) -> StopRule:
        """The rule that ends it."""
        return self.options.stop or _DEFAULT_STOP

    @property
    def alone(self) -> bool:
        """Whether no other request can share a batch with it."""
        return self.options.compatibility.changes_model or self.options.guidance != NO_GUIDANCE

    @property
    def positions(self) -> int:
        """Positions of the language model that it takes, its length cap included."""
        ids, prompt, speaker = self.context
        return ids.shape[1] + (0 if prompt is None else prompt.shape[1]) + (speaker is not None) + self.max_frames

    @property
    def context(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The input of the model: text ids (1, L), prompt latents (1, P, D) and speaker latent (1, H), the last two where there are any."""
        prompt, speaker = self.prompt_latents, self.speaker_latent
        if prompt is not None and self.options.compatibility.drop_last_prompt_frame:
            prompt = prompt[:-1]
        prompt = prompt[None] if prompt is not None and len(prompt) else None
        return self.text_ids[None], prompt, None if speaker is None else speaker[None]


@dataclass(frozen=True, eq=False)
class Frame:
    """One step: ``z`` (D,) fp32 is the sample fed back, ``distribution`` (D,) the fp32 Gaussian it was drawn from,
    ``end_kl`` that Gaussian's divergence from the end distribution in nats per dimension, NaN where ``z`` is not finite,
    ``stop_probability`` what the stop head says of its being the end, None without a head."""

    z: Tensor
    distribution: DiagGaussian
    end_kl: float
    stop_probability: float | None = None


Ending = tuple[StopReason, Frame | None]
"""Why a row ended, and the end frame where there was one."""


class FrameWatcher(Protocol):
    """Looks at the frames of one row in order and may end it; one object for each row."""

    def see(self, frame: Frame, index: int) -> StopReason | None:
        """Why the row ends with this frame of 0-based ``index``, which is kept; None to continue."""


class Generation(Iterator[Frame]):
    """Frames as they are made. Once exhausted, ``stop_reason`` says why: "end", "max_frames", or what a watcher said.

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

    def close(self) -> None:
        """End it now and free the model's state; ``stop_reason`` stays as it is."""
        self._frames.close()


def generate(
    lm: FrameModel,
    text_ids: Tensor,
    prompt_latents: Tensor | None = None,
    speaker_latent: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    stop: StopRule | None = _DEFAULT_STOP,
    max_frames: int | None = None,
    temperature: float = 1.0,
    options: GenerationOptions | None = None,
    watcher: FrameWatcher | None = None,
) -> Generation:
    """Yield frames of speech for ``text_ids`` (L,) int64, every special token included (see kalle.text.prompt_ids).

    ``prompt_latents`` (1, P, D) continue from a prompt, ``speaker_latent`` (1, H) goes in front. Frame t is
    mean + temperature * noise_t * std, with ``noise`` (max_frames, D) used in order or, without it, one fp32 draw of D
    values per frame from ``generator``, which must live on the CPU so that a seed means the same on every device;
    without either the sampling differs from call to call. ``stop=None`` never stops. ``max_frames`` defaults to the
    length of ``noise``, or to the 1000 steps of the release. ``options`` give everything else, such as guidance. ``watcher`` sees every
    frame and may end the speech. UserError for a bad value, a stop rule that needs a head ``lm`` lacks, before the first frame, and at a
    frame that is not finite.
    """
    check_type("text ids", text_ids, Tensor, "an int64 tensor (L,)")
    for name, value in (("prompt latents", prompt_latents), ("speaker latent", speaker_latent), ("noise", noise)):
        check_type(name, value, Tensor | None, "a tensor")
    check_type("options", options, GenerationOptions | None, "kalle.synthesis.GenerationOptions")
    check_type("max_frames", max_frames, int | np.integer | None, "a whole number")
    for name, value in (("prompt latents", prompt_latents), ("speaker latent", speaker_latent)):
        if value is not None and (not value.ndim or len(value) != 1):
            raise UserError(f"bad {name}: got shape {tuple(value.shape)}, expected one row (1, ...); make the voice with this model")
    if max_frames is None:
        max_frames = DEFAULT_MAX_FRAMES if noise is None else noise.shape[0]
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    chosen = (options or GenerationOptions()).changed(temperature=temperature, stop=stop or NEVER)
    prompt, speaker = (None if value is None else value[0] for value in (prompt_latents, speaker_latent))
    return run_row(lm, Request(text_ids, max_frames, chosen, prompt, speaker, noise), generator, watcher)


def run_row(lm: FrameModel, request: Request, generator: torch.Generator, watcher: FrameWatcher | None = None) -> Generation:
    """``generate`` for a whole request: the frames, none made yet; ``generator`` is the one of its noise. UserError as there."""
    check_request(lm, request)
    row = RowSampler(request, lm.config.latent_dim, generator, watcher)
    return Generation(_frames(guided(lm, request.options.guidance), request, row))


def _frames(lm: FrameModel, request: Request, row: RowSampler) -> Generator[Frame, None, Ending]:
    """The loop itself; returns how it ended."""
    text_ids, prompt, speaker = (None if part is None else part.to(lm.device) for part in request.context)
    assert text_ids is not None
    with torch.no_grad():
        prediction, state = lm.prefill(text_ids, prompt, speaker)
        frame, ending = row.advance(prediction[0])
    while True:
        if frame is not None:
            yield frame
        if ending is not None:
            return ending
        assert frame is not None
        with torch.no_grad():
            prediction, state = lm.step(frame.z[None], state)
            frame, ending = row.advance(prediction[0])


def model_for(lm: KalleLM, request: Request, converted: ConvertedModels | None = None) -> KalleLM | UncachedLM:
    """The model that speaks ``request``: ``lm`` with its adapter, as the release would run it where that is to be reproduced.

    ``converted`` is that of ``ReleaseCompatibility.language_model``.
    """
    if request.adapter is not None:
        # A model in another precision is kept for ever in ``converted``; one that an adapter made is not to outlive the adapter.
        lm, converted = request.adapter.applied_to(lm), None
    return request.options.compatibility.language_model(lm, converted)


class RowSampler:
    """One utterance in progress, the same alone, in a batch and streamed: its noise, and after each draw whether it continues.

    ``advance`` takes one prediction after the other, until there is an ending. Several rows together: give
    ``draw_frames`` the rows and each frame that it makes to its row's ``see``.
    """

    def __init__(self, request: Request, dim: int, generator: torch.Generator, watcher: FrameWatcher | None = None) -> None:
        """``dim`` is D; ``generator`` gives the noise where ``request`` has none."""
        _check_row(request, dim, generator)
        self.temperature, self.index = request.temperature, 0
        self._request, self._dim, self._generator, self._watcher = request, dim, generator, watcher

    def noise(self) -> Tensor:
        """The standard normal values (D,), fp32 on the CPU, of the frame of ``index``: to be called once for each frame."""
        if self._request.noise is not None:
            return self._request.noise[self.index].to("cpu", torch.float32)
        return torch.randn(self._dim, generator=self._generator, dtype=torch.float32)

    def see(self, frame: Frame) -> tuple[Frame | None, Ending | None]:
        """Take ``frame``, drawn with ``noise``, as the one of ``index``: the frame where it is speech, the ending where the row is over.

        UserError unless its sample and distribution are finite.
        """
        request, index, self.index = self._request, self.index, self.index + 1
        if not math.isfinite(frame.end_kl):
            raise _not_finite(frame, index, self.temperature)
        assert index < request.max_frames, f"frame {index} of a row that ended at its cap of {request.max_frames}"
        if request.stop.stops(frame.end_kl, index, frame.stop_probability):
            return None, ("end", frame)
        last = self.index == request.max_frames
        if last and request.options.compatibility.drop_last_frame_always:
            return None, ("max_frames", None)
        reason = None if self._watcher is None else self._watcher.see(frame, index)
        if last and reason is None:
            reason = "max_frames"
        return frame, None if reason is None else (reason, None)

    def advance(self, prediction: DiagGaussian) -> tuple[Frame | None, Ending | None]:
        """Draw the frame of ``prediction`` (D,) and ``see`` it."""
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
    """The error for a frame whose divergence is not a finite number."""
    if frame.distribution.mean.isfinite().all() and frame.distribution.std.isfinite().all() and not frame.z.isfinite().all():
        return UserError(f"frame {index} overflows: got temperature {temperature}, expected finite samples; lower the temperature")
    cooler = f", lower the temperature of {temperature}" if temperature > 1 else ""
    return UserError(
        f"the model predicts values that are not finite at frame {index}: expected numbers; "
        f"load it with dtype float32{cooler}, or check the weights"
    )


def _check_row(request: Request, dim: int, generator: torch.Generator) -> None:
    """Refuse what a row cannot use."""
    if generator.device.type != "cpu":
        raise UserError(f"the noise generator is on {generator.device}, expected one on the CPU; make it with torch.Generator()")
    noise, steps = request.noise, request.max_frames
    if not hasattr(steps, "__index__") or steps < 1:
        raise UserError(f"bad max_frames: got {steps} frames, expected at least 1; raise max_frames or max_seconds")
    if noise is not None and (noise.ndim != 2 or noise.shape[0] < steps or noise.shape[1] != dim):
        raise UserError(f"noise has shape {tuple(noise.shape)}, expected ({steps}, {dim}); pass one row for each frame")


def check_request(lm: FrameModel, request: Request) -> None:
    """UserError unless ``lm`` can read the context of ``request`` and end it by its stop rule."""
    # Looked up only where it matters, so that anything with ``prefill`` and ``step`` can be sampled from.
    if request.stop.probability is not None:
        request.stop.check(lm.config.stop_head)
    ids = request.text_ids
    if ids.ndim != 1 or not ids.numel() or ids.is_floating_point():
        raise UserError(f"bad text ids: got {ids.dtype} of shape {tuple(ids.shape)}, expected int64 (L,) with at least one id")
    lowest, highest = (int(end) for end in ids.aminmax())
    if lowest < 0 or highest >= lm.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise UserError(f"bad text ids: got {wrong}, expected 0 to {lm.vocab_size - 1}; use the tokenizer of these weights")
    _check_shape("prompt latents", request.prompt_latents, ("P", lm.config.latent_dim))
    _check_shape("speaker latent", request.speaker_latent, (lm.hidden_size,))


def _check_shape(name: str, value: Tensor | None, expected: tuple[str | int, ...]) -> None:
    if value is not None and (value.ndim != len(expected) or value.shape[-1] != expected[-1]):
        wanted = ", ".join(str(size) for size in (1, *expected))
        raise UserError(f"bad {name}: got shape {(1, *value.shape)}, expected ({wanted}); make the voice with this model")


def guided(lm: FrameModel, guidance: float) -> FrameModel:
    """``lm`` guided; at 1 it is ``lm`` itself. UserError for a model that is not a KalleLM with its cache."""
    if guidance == NO_GUIDANCE:
        return lm
    if not isinstance(lm, KalleLM):
        raise UserError(f"guidance needs the cache: got guidance {guidance:g} with no_cache, expected one of them; leave one out")
    return GuidedLM(lm, guidance)


class GuidedLM:
    """A `FrameModel` that predicts from ``h_u + guidance * (h_c - h_u)`` (Ho and Salimans, arXiv 2207.12598; on the hidden state before
    the head as in CALM, arXiv 2509.06926).

    ``h_c`` (H,) is the hidden state after the whole context, ``h_u`` that after the same without the words of the text: ``without_text``,
    and speaker and latents as they are. The state holds both: first the B rows with, then the B without.
    """

    def __init__(self, lm: KalleLM, guidance: float) -> None:
        self._lm, self._guidance = lm, guidance
        self.config, self.device, self.hidden_size, self.vocab_size = lm.config, lm.device, lm.hidden_size, lm.vocab_size

    def prefill(
        self, text_ids: Tensor, prompt_latents: Tensor | None = None, speaker_latent: Tensor | None = None
    ) -> tuple[NextFrame, LMState]:
        """Predict the first new frame; shapes as in ``KalleLM.prefill``."""
        texts = (text_ids, without_text(text_ids))
        hidden, states = zip(*(self._lm.read(ids, prompt_latents, speaker_latent) for ids in texts), strict=True)
        return self._predict(torch.cat(hidden)), LMState.join(states)

    def step(self, z: Tensor, state: LMState) -> tuple[NextFrame, LMState]:
        """Append the frame ``z`` (B, D) and predict the next."""
        hidden, state = self._lm.append(torch.cat([z, z]), state)
        return self._predict(hidden), state

    def _predict(self, hidden: Tensor) -> NextFrame:
        with_text, without = hidden.float().chunk(2)
        return self._lm.predict_from(without + self._guidance * (with_text - without))


@dataclass(frozen=True)
class WatchConfig:
    """Limits beyond which speech counts as stuck.

    Distances are between two predictions p frames apart, (mean - mean')^2 / (std^2 + std'^2) averaged over the dimensions: 1 is a
    difference of about one standard deviation. Speech is far above that for every p: see docs/results for the measured margins.
    """

    seconds: float = 3.0
    """Shortest stretch that is examined; pauses inside speech are shorter."""
    longest_period_seconds: float = 2.0
    """Longest loop that is looked for."""
    repeats: int = 3
    """A loop must recur this often after its first round."""
    repetition_distance: float = 0.3
    """Below it, on average over the stretch, the predictions repeat themselves."""
    quiet_distance: float = 1.0
    """Below it at p = 1 the predictions may be those of silence, and the sound decides."""
    silence_dbfs: float = -60.0
    """RMS of a frame of silence, in dB relative to full scale."""
    silence_below_loudest_db: float = 35.0
    """A frame this far below the loudest one around is silence too."""
    silent_share: float = 0.8
    """Silence must last this share of the stretch: its first frames may still carry the end of a sound."""
    pause_seconds: float = 0.24
    """Silence that is kept after the last sound."""


class Watcher:
    """Ends a row with "silence" or "repetition"; ``kept_frames`` then says how many of its frames are worth hearing.

    The predicted Gaussians are compared at every frame, which costs microseconds; only when they hardly change is a stretch of a few
    seconds decoded, to tell silence from a stuck sound. One object for each row.
    """

    def __init__(self, decode: Decoder, frame_rate_hz: float, config: WatchConfig | None = None) -> None:
        """``decode`` turns latents (T, D) into audio at ``frame_rate_hz`` frames a second."""
        self.config = config or WatchConfig()
        self._decode, self._rate_hz = decode, frame_rate_hz
        self._window = max(1, self._frames(self.config.seconds))
        self._recurrence = _Recurrence(max(1, self._frames(self.config.longest_period_seconds)), self._window, self.config.repeats)
        self._latents: list[Tensor] = []
        self._next_listening = 0
        self.kept_frames: int | None = None

    def see(self, frame: Frame, index: int) -> StopReason | None:
        """Take the frame of 0-based ``index``; "silence" or "repetition" where the row should end with it."""
        assert index == len(self._latents), f"frame {index} after {len(self._latents)} frames"
        self._latents.append(frame.z)
        distances = self._recurrence.add(frame.distribution.mean, frame.distribution.std)
        periods = np.flatnonzero(distances < self.config.repetition_distance)
        if (len(periods) or distances[0] < self.config.quiet_distance) and self._silent():
            return "silence"
        if len(periods):
            self.kept_frames = self._recurrence.onset(int(periods[0]), self.config.quiet_distance)
            return "repetition"
        return None

    def _frames(self, seconds: float) -> int:
        return round(seconds * self._rate_hz)

    def _silent(self) -> bool:
        """Whether the latest stretch is silence all through; if so, ``kept_frames`` is set."""
        count = len(self._latents)
        if count < max(self._window, self._next_listening):
            return False
        quiet, needed = self._quiet_frames(), math.ceil(self.config.silent_share * self._window)
        if quiet < needed:
            self._next_listening = count + needed - quiet
            return False
        self.kept_frames = count - max(0, quiet - self._frames(self.config.pause_seconds))
        if quiet == count:
            self.kept_frames = 0
        return True

    def _quiet_frames(self) -> int:
        """How many of the latest frames sound like nothing, as far as two stretches back."""
        latents = torch.stack(self._latents[-2 * self._window :])
        energy = self._decode(latents).reshape(len(latents), -1).astype(np.float64)
        level_db = 20 * np.log10(np.sqrt((energy**2).mean(axis=1)) + _NO_SOUND)
        audible = level_db > max(self.config.silence_dbfs, float(level_db.max()) - self.config.silence_below_loudest_db)
        return len(latents) if not audible.any() else int(np.argmax(audible[::-1]))


class _Recurrence:
    """Running distances between each prediction and those p = 1 … P frames before it."""

    def __init__(self, longest_period: int, window: int, repeats: int) -> None:
        self._periods = np.arange(1, longest_period + 1)
        self._windows = np.maximum(window, repeats * self._periods)
        self._columns = np.arange(longest_period)
        self._ring: tuple[FloatArray, FloatArray] | None = None
        self._sums = np.zeros((256, longest_period))
        self._count = 0

    def add(self, mean: Tensor, std: Tensor) -> NDArray[np.float64]:
        """Take a prediction (D,); mean distance (P,) over the stretch that belongs to each p, infinite while that is not full."""
        self._count += 1
        if self._count == len(self._sums):
            self._sums = np.concatenate([self._sums, np.zeros_like(self._sums)])
        steps = self._distances(mean.float().cpu().numpy(), std.float().cpu().square().numpy())
        self._sums[self._count] = self._sums[self._count - 1]
        self._sums[self._count, : len(steps)] += steps
        start = self._count - self._windows
        distances = np.full(len(self._periods), np.inf)
        full = start >= self._periods
        columns = self._columns[full]
        distances[full] = (self._sums[self._count, columns] - self._sums[start[full], columns]) / self._windows[full]
        return distances

    def onset(self, column: int, limit: float) -> int:
        """Index of the first frame of the latest run in which every distance of ``column`` is below ``limit``."""
        steps = np.diff(self._sums[: self._count + 1, column])
        steps[: self._periods[column]] = np.inf
        return int(np.flatnonzero(steps >= limit)[-1]) + 1

    def _distances(self, mean: FloatArray, variance: FloatArray) -> NDArray[np.float64]:
        """Distance to the prediction 1, 2, … frames ago, as far as there are any; the newest takes the place of the oldest."""
        longest = len(self._periods)
        if self._ring is None:
            self._ring = np.zeros((longest, len(mean)), mean.dtype), np.zeros((longest, len(mean)), mean.dtype)
        means, variances = self._ring
        newest = self._count - 1
        rows = (newest - self._periods[: min(newest, longest)]) % longest
        squared = (mean - means[rows]).astype(np.float64) ** 2 / (variance + variances[rows])
        means[newest % longest], variances[newest % longest] = mean, variance
        return np.nan_to_num(squared.mean(axis=1), nan=_FARTHEST, posinf=_FARTHEST).clip(max=_FARTHEST)
