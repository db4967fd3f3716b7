"""From a request to its speech: tries, which one is kept, the audio, and what the model thought at every frame."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kalle.audio import to_pcm16, write_audio
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM
from kalle.seeds import purpose_seed
from kalle.synthesis.generate import FloatArray, Frame, FrameWatcher, Generation, Request, Watcher, model_for, run_row
from kalle.synthesis.options import StopRule, cap_seconds, usual_seconds
from kalle.synthesis.release_compat import OURS, ConvertedModels

if TYPE_CHECKING:
    from kalle.synthesis.longform import Part

LOGGER = logging.getLogger(__name__)
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")
Outcome = TypeVar("Outcome")
FRAME_ARRAYS = ("latents", "log_std", "end_kl", "means", "log_likelihood", "stop_probability")
"""Fields of ``Speech`` with a row for each frame."""
PCM16_MAX = 32767
SpeechEnding = Literal["end", "max_frames", "repetition", "silence", "too_short", "interrupted"]
_BEST_FIRST = ("end", "silence", "repetition", "max_frames", "too_short", "interrupted")
"""Silence usually follows the last word, a repetition its first round; at the cap there is no telling what was said."""
TOO_SHORT_SHARE = 0.4
"""Speech that takes less than this share of the usual time lacks words: no one speaks more than twice as fast."""
SHORTEST_JUDGED_S = 1.0
"""A text that usually takes less time has no pace to speak of."""


@dataclass(frozen=True)
class Attempt:
    """One try at a text."""

    seed: int
    """The seed of its noise."""
    stop_reason: SpeechEnding
    frames: int
    """Frames that were worth keeping."""
    kept: bool = True
    """Whether the result is this try."""


def _unknown() -> FloatArray:
    return np.zeros(0, dtype=np.float32)


@dataclass(frozen=True, eq=False)
class Speech:
    """One spoken text. T frames of D latent dimensions, S samples. Two are equal when they are the same object."""

    audio: FloatArray
    """(S,) in [-1, 1]."""
    sample_rate: int
    """Samples per second."""
    stop_reason: SpeechEnding
    """"end", the model ended the speech; "max_frames", the length cap cut it; "repetition" or "silence", the model said the same or
    nothing for seconds and was stopped; "too_short", the model ended speech that is far too short for its text; "interrupted", a stream was
    closed before its end."""
    seed: int
    """The seed that, with the same request, gives this result again."""
    latents: FloatArray
    """(T, D): the frames that were fed back."""
    log_std: FloatArray
    """(T, D): natural log of the standard deviation of each frame's distribution."""
    end_kl: FloatArray
    """(T,): divergence from the end distribution in nats per dimension."""
    max_frames: int
    """The length cap that held."""
    means: FloatArray = field(default_factory=_unknown)
    """(T, D): mean of each frame's distribution."""
    log_likelihood: FloatArray = field(default_factory=_unknown)
    """(T,): log density of each frame under its own distribution, in nats per dimension.

    The frame was drawn from that distribution, so this says how narrow the distribution was and how far out the draw fell, and not
    whether the frame is good speech or fits the text: a confident mistake scores high.
    """
    stop: StopRule = field(default_factory=StopRule)
    """The stop rule that held; ``end_kl`` is to be read against its threshold, or ``stop_probability`` against its probability."""
    attempts: tuple[Attempt, ...] = ()
    """Every try, in order; one of them is the result."""
    trimmed_seconds: float = 0.0
    """Seconds cut from the end because they were repetition or silence."""
    stuck_seconds: float = 0.0
    """Repetition or silence that ``audio`` still ends with, because a stream had yielded it before that could be known."""
    warnings: tuple[str, ...] = ()
    """Warnings about the result, a sentence each."""
    stop_probability: FloatArray = field(default_factory=_unknown)
    """(T,): what the stop head said of each frame's being the end; (0,) without a head."""
    end_frame_kl: float | None = None
    """``end_kl`` of the frame that ended the speech, which is not among the frames; None where the model did not end it."""
    end_frame_probability: float | None = None
    """The stop head's output for that frame; None without a head."""
    low_confidence: float | None = None
    """The ``confidence`` below which speech of these weights is doubtful (`kalle calibrate`); None where that is not known."""
    text: str = ""
    """The words that the model got, numbers in words where that was wanted; of a text spoken by sentences, the text as it was given."""
    parts: tuple[Part, ...] = ()
    """Of a text spoken by sentences, each of them; frames and attempts are theirs in order, and only the audio has the pauses."""

    @property
    def frames(self) -> int:
        """Number of latent frames T."""
        return len(self.latents)

    @property
    def seconds(self) -> float:
        """Length of the audio."""
        return len(self.audio) / self.sample_rate

    @property
    def frame_confidence(self) -> FloatArray:
        """(T,) in (0, 1): 1 / (1 + s), s the geometric mean of the frame's standard deviations.

        It says how narrow the predictions are, compares results of one model only, and is not a probability.
        """
        spread = np.exp(self.log_std.mean(axis=1))
        return np.asarray(1.0 / (1.0 + spread), dtype=np.float32)

    @property
    def confidence(self) -> float:
        """Mean of ``frame_confidence``; NaN without frames."""
        return float(self.frame_confidence.mean()) if self.frames else float("nan")

    @property
    def doubtful(self) -> bool:
        """Whether ``confidence`` is low for these weights: the speech is probably no words, or the wrong ones."""
        return self.low_confidence is not None and self.frames > 0 and self.confidence < self.low_confidence

    def pcm16(self) -> NDArray[np.int16]:
        """The audio (S,) as 16-bit integers, rounded and clipped: the samples that ``save`` writes."""
        return to_pcm16(self.audio)

    def save(self, path: str | Path) -> None:
        """Write the audio in the format of the suffix (``kalle.audio.WRITABLE``); a UserError, and no partial file, when that fails."""
        write_audio(path, self.audio, self.sample_rate)


def speak_with_retries(lm: KalleLM, flowvae: FlowVAE, request: Request, converted: ConvertedModels | None = None) -> Speech:
    """``speak``, and up to ``retries`` times again with another seed while the ending is bad: ``keep_best`` of all tries.

    See ``allowed_retries`` for when there are none. ``converted`` is that of ``ReleaseCompatibility.language_model``.
    """
    return answered(attempts(request), lambda each: speak(lm, flowvae, each, converted))


def attempts(request: Request) -> Generator[Request, Speech, Speech]:
    """The tries of ``speak_with_retries`` for whoever speaks: yields what to speak next, is sent its speech, returns the best of all."""
    allowed = allowed_retries(request)
    tries = [(yield request)]
    while needs_retry(tries[-1]) and len(tries) <= allowed:
        again = retry_request(request, len(tries))
        log_retry(tries[-1], again, len(tries), allowed)
        tries.append((yield again))
    return keep_best(tries)


def answered(asking: Generator[Asked, Answer, Outcome], answer: Callable[[Asked], Answer]) -> Outcome:
    """The outcome of ``asking`` when ``answer`` answers it."""
    try:
        asked = next(asking)
        while True:
            asked = asking.send(answer(asked))
    except StopIteration as end:
        return cast("Outcome", end.value)


@torch.no_grad()
def speak(lm: KalleLM, flowvae: FlowVAE, request: Request, converted: ConvertedModels | None = None) -> Speech:
    """Generate the frames of ``request`` once and decode them. UserError for a value the loop cannot use, or frames that are not finite.

    All noise comes from one CPU generator: D values for each frame in order, then, where frames are drawn a second
    time, D values for each of those. ``converted`` is that of ``ReleaseCompatibility.language_model``.
    """
    watcher = watcher_of(flowvae, request)
    generation, generator = start(lm, request, watcher, converted)
    frames = list(generation)
    assert generation.stop_reason is not None
    return finish(flowvae, frames, generation.stop_reason, request, generator, watcher, generation.end_frame)


def start(
    lm: KalleLM, request: Request, watcher: FrameWatcher | None = None, converted: ConvertedModels | None = None
) -> tuple[Generation, torch.Generator]:
    """The frames of ``request``, none made yet, and the generator of their noise, which a second draw continues."""
    generator = torch.Generator().manual_seed(request.seed)
    return run_row(model_for(lm, request, converted), request, generator, watcher), generator


def watcher_of(flowvae: FlowVAE, request: Request) -> Watcher | None:
    """The watcher that ends ``request`` when it is stuck; None where the release is to be reproduced or the caller wants no stop at all."""
    if not request.options.watch or request.options.compatibility != OURS or request.stop.never:
        return None
    return Watcher(lambda latents: decode_latents(flowvae, latents), flowvae.config.frame_rate_hz)


def allowed_retries(request: Request) -> int:
    """The retries of ``request``, or 0 where another try makes no sense.

    That is where the release is reproduced, noise is given or there is none (temperature 0), nothing stops but the cap, or the cap was
    given and is shorter than the text's own, so that a cut was requested.
    """
    options = request.options
    reproduces = options.compatibility != OURS or request.noise is not None or request.temperature == 0 or request.stop.never
    cut_is_wanted = options.max_seconds is not None and options.max_seconds < cap_seconds(request.text)
    return 0 if reproduces or cut_is_wanted else options.retries


def log_retry(speech: Speech, again: Request, number: int, allowed: int) -> None:
    """Say that ``speech`` ended badly and that ``again`` is retry ``number`` of ``allowed``."""
    LOGGER.warning("%s; trying again with seed %d (%d of %d)", "; ".join(speech.warnings), again.seed, number, allowed)


def needs_retry(speech: Speech) -> bool:
    """Whether the ending is bad (not by the model itself, or before the first frame), or the speech is doubtful."""
    return speech.stop_reason not in ("end", "interrupted") or not speech.frames or speech.doubtful


def next_seed(seed: int, attempt: int) -> int:
    """The seed of try number ``attempt``, which is ``seed`` itself for 0 and else a number below 2**31 that both decide."""
    return seed if attempt == 0 else purpose_seed(f"kalle retry {seed} {attempt}")


def retry_request(request: Request, attempt: int) -> Request:
    """``request`` as try number ``attempt``, counted from 0, speaks it."""
    return dataclasses.replace(request, options=request.options.changed(seed=next_seed(request.seed, attempt)))


def keep_best(tries: Sequence[Speech]) -> Speech:
    """The best of all ``tries`` of one request, in order: its ``attempts`` list every one, its ``seed`` is the request's.

    One that ended by itself wins, then silence, repetition, the length cap, too short; speech wins over no speech at all, of doubtful
    ones the more confident, and otherwise the earlier try over the later one.
    """

    def badness(index: int) -> tuple[bool, int, float]:
        speech = tries[index]
        return not speech.frames, _BEST_FIRST.index(speech.stop_reason), 1 - speech.confidence if speech.doubtful else 0.0

    best = min(range(len(tries)), key=badness)
    attempts = tuple(dataclasses.replace(tries[i].attempts[0], kept=i == best) for i in range(len(tries)))
    warnings = tries[best].warnings
    if len(tries) > 1:
        warnings += (f"{len(tries)} attempts were made and number {best + 1} was kept",)
    return dataclasses.replace(tries[best], seed=tries[0].seed, attempts=attempts, warnings=warnings)


@torch.no_grad()
def finish(
    flowvae: FlowVAE,
    frames: Sequence[Frame],
    stop_reason: SpeechEnding,
    request: Request,
    generator: torch.Generator | None = None,
    watcher: Watcher | None = None,
    end_frame: Frame | None = None,
) -> Speech:
    """Decode ``frames``, all that ``request`` gave, into a result; what ``watcher`` found to be stuck is cut from their tail.

    ``generator`` is the one of the frames' noise, needed for a second draw.
    """
    kept = len(frames) if watcher is None or watcher.kept_frames is None else watcher.kept_frames
    audio = decode_latents(flowvae, _decoder_input(frames[:kept], request, generator, flowvae.config.latent_dim))
    if request.options.compatibility.truncate_int16:
        audio = truncate_to_int16(audio)
    return assemble(frames[:kept], audio, stop_reason, request, flowvae.config, len(frames) - kept, end_frame=end_frame)


def assemble(
    frames: Sequence[Frame],
    audio: FloatArray,
    stop_reason: SpeechEnding,
    request: Request,
    config: FlowVAEConfig,
    trimmed_frames: int = 0,
    stuck_frames: int = 0,
    end_frame: Frame | None = None,
) -> Speech:
    """The result of one attempt: ``audio`` (S,) of ``frames``, after which ``trimmed_frames`` were left out.

    The last ``stuck_frames`` of ``frames`` should have been left out too, and were heard already.
    """
    if stop_reason == "end" and _too_short(len(audio) / config.sample_rate, request):
        stop_reason = "too_short"
    z, distribution = _stack([frame.z for frame in frames], config.latent_dim), _gaussian(frames, config.latent_dim)
    trimmed_seconds, stuck_seconds = trimmed_frames / config.frame_rate_hz, stuck_frames / config.frame_rate_hz
    told = _ending_warnings(stop_reason, len(audio) / config.sample_rate, trimmed_seconds, stuck_seconds, request)
    speech = Speech(
        audio=audio,
        sample_rate=config.sample_rate,
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
        warnings=(*request.warnings, *told),
        end_frame_kl=None if end_frame is None else end_frame.end_kl,
        end_frame_probability=None if end_frame is None else end_frame.stop_probability,
        low_confidence=request.low_confidence,
        text=request.text,
    )
    if not speech.doubtful:
        return speech
    low = f"the confidence is low ({speech.confidence:.3f}, good speech of these weights has at least {speech.low_confidence:.3f})"
    return dataclasses.replace(speech, warnings=(*speech.warnings, f"{low}: words may be wrong"))


def _too_short(seconds: float, request: Request) -> bool:
    """Whether speech of so many ``seconds`` that the model ended by itself lacks words of its text."""
    if not request.options.watch or request.options.compatibility != OURS:
        return False
    usual = _usual_seconds(request.text)
    return usual >= SHORTEST_JUDGED_S and 0 < seconds < TOO_SHORT_SHARE * usual


def _usual_seconds(text: str) -> float:
    """How long the words of ``text`` take at the usual pace: marks between them, which there may be any number of, take none."""
    return usual_seconds(" ".join("".join(character if character.isalnum() else " " for character in text).split()))


def _ending_warnings(
    stop_reason: SpeechEnding, seconds: float, trimmed_seconds: float, stuck_seconds: float, request: Request
) -> tuple[str, ...]:
    heard = f"; {stuck_seconds:.1f} s of it were heard" if stuck_seconds else ""
    cut = heard + (f"; {trimmed_seconds:.1f} s of it were cut from the end" if trimmed_seconds else "")
    good, usual = seconds - stuck_seconds, _usual_seconds(request.text)
    prompted = "" if request.prompt_latents is None else "; a transcript that lacks words of its recording does this, too"
    texts = {
        "max_frames": f"the speech did not end by itself and was cut at {seconds:.1f} s: words may be missing",
        "repetition": f"the speech got stuck in a repetition after {good:.1f} s{cut}: words may be missing",
        "silence": f"the speech fell silent after {good:.1f} s without an end{cut}: words may be missing",
        "too_short": f"the speech ended after {seconds:.1f} s, where its text usually takes {usual:.1f} s: words are missing{prompted}",
        "interrupted": f"the speech was interrupted after {seconds:.1f} s: words are missing",
    }
    nothing = () if seconds else ("nothing was spoken",)
    return (*nothing, *([texts[stop_reason]] if stop_reason in texts else []))


def joined(parts: Sequence[Part], seed: int, text: str, unspoken: Sequence[tuple[int, str]] = (), interrupted: bool = False) -> Speech:
    """One result of all ``parts``, in order, of ``text``: their pauses are in the audio, and their frames follow one another.

    It ended as badly as the worst of them. ``unspoken`` is what of the text is no word, with its place.
    """
    speeches = [part.speech for part in parts]
    worst = max(speeches, key=lambda speech: _BEST_FIRST.index(speech.stop_reason))
    named = [f"sentence {part.index + 1} ({part.short}): {warning}" for part in parts for warning in part.warnings]
    left = [f"not spoken: {gap!r} at character {place + 1}, without a letter or number" for place, gap in unspoken]

    arrays: dict[str, Any] = {name: np.concatenate([getattr(speech, name) for speech in speeches]) for name in FRAME_ARRAYS}
    return Speech(
        audio=np.concatenate([part.with_pause for part in parts]),
        sample_rate=worst.sample_rate,
        stop_reason="interrupted" if interrupted else worst.stop_reason,
        seed=seed,
        max_frames=sum(speech.max_frames for speech in speeches),
        stop=worst.stop,
        attempts=tuple(attempt for speech in speeches for attempt in speech.attempts),
        trimmed_seconds=sum(speech.trimmed_seconds for speech in speeches),
        stuck_seconds=sum(speech.stuck_seconds for speech in speeches),
        warnings=(*named, *left),
        text=text,
        low_confidence=worst.low_confidence,
        parts=tuple(parts),
        **arrays,
    )


def _stack(rows: Sequence[Tensor], dim: int) -> Tensor:
    return torch.stack(list(rows)) if rows else torch.zeros(0, dim)


def _gaussian(frames: Sequence[Frame], dim: int) -> DiagGaussian:
    """The distributions (T, D) of ``frames``."""
    distributions = [frame.distribution for frame in frames]
    return DiagGaussian(_stack([d.mean for d in distributions], dim), _stack([d.log_std for d in distributions], dim))


def _decoder_input(frames: Sequence[Frame], request: Request, generator: torch.Generator | None, dim: int) -> Tensor:
    """The latents (T, D) that go to the decoder."""
    decode = request.options.compatibility.decode
    if not frames or decode == "sampled":
        return _stack([frame.z for frame in frames], dim)
    if decode == "mean":
        return _gaussian(frames, dim).mean
    return _gaussian(frames, dim).sample(request.decode_noise, request.temperature, generator)


@torch.no_grad()
def decode_latents(flowvae: FlowVAE, latents: Tensor) -> FloatArray:
    """Audio (S,) of ``latents`` (T, D); nothing for no frames."""
    if not len(latents):
        return np.zeros(0, dtype=np.float32)
    weight = next(flowvae.parameters())
    return check_finite(flowvae.decode(latents[None].to(weight.device, weight.dtype))[0].float().cpu().numpy())


def check_finite(audio: FloatArray) -> FloatArray:
    """``audio`` itself; a UserError for NaN or infinity, which must not be returned."""
    bad = int((~np.isfinite(audio)).sum())
    if bad:
        raise UserError(
            f"the Flow-VAE gives {bad} of {audio.size} samples that are not finite, expected numbers; check its weights, or load them again"
        )
    return audio


def truncate_to_int16(audio: FloatArray) -> FloatArray:
    """Samples (S,) cut towards zero to the 16-bit grid, so that the writer's rounding keeps them; the release cuts so."""
    return np.trunc(audio * np.float32(PCM16_MAX)) / np.float32(PCM16_MAX)
