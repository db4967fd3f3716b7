"""Long texts, sentence by sentence, in one voice and at one level."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from kalle.audio import Audio, from_pcm16, to_pcm16
from kalle.errors import UserError
from kalle.seeds import sentence_seed
from kalle.synthesis.generate import FloatArray
from kalle.synthesis.options import GenerationOptions, SpeechRequest, cap_frames, fits_one_request, usual_seconds
from kalle.synthesis.speech import Speech, answered, joined
from kalle.synthesis.voice import FLOWVAE_ENCODER, GivenVoice, Voice, check_given_voice
from kalle.text.languages import Sentence, split_sentences, unspoken
from kalle.text.tokenizer import BEFORE_SPEECH, check_text

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle

_PACE_LIMIT = 2.0
"""A sentence so many times as fast or slow as the others is tried once more."""
_PACES_NEEDED = 3
"""Number of sentences that set the pace before one is compared with it."""
_SHORTEST_PACED_S = 1.0
"""A text expected to be shorter than this has no pace to speak of."""
BLOCK_S = 0.4
OVERLAP = 0.75
ABSOLUTE_GATE_DB = -70.0
RELATIVE_GATE_DB = -10.0
LOUDEST_PEAK = 0.99


@dataclass(frozen=True)
class Part:
    """One spoken sentence of a long text."""

    index: int
    """From 0."""
    sentence: Sentence
    """As written, and where."""
    speech: Speech
    """As it is played: its audio (S,) has gain and fades, and its ``text`` is the words that the model got."""
    loudness_db: float
    """Before the gain; minus infinity for silence."""
    gain_db: float
    pace: float
    """Usual length of the text over the actual one; 0 when there is none."""
    rolled: bool
    """Whether the sentence before was part of the prompt."""
    pause_samples: int
    """Silence that follows in the whole."""
    tries: int
    """How often it was spoken before this result was taken, this one included."""
    warnings: tuple[str, ...] = ()
    start_sample: int = 0
    """Where it begins in the whole."""
    kept: bool = False
    """Whether it was spoken by an earlier run."""

    @property
    def audio(self) -> Audio:
        """(S,); nothing when the model said nothing."""
        return self.speech.audio

    @property
    def start_s(self) -> float:
        """Where it begins in the whole, in seconds."""
        return self.start_sample / self.speech.sample_rate

    @property
    def end_s(self) -> float:
        """Where it ends in the whole, in seconds, its pause not included."""
        return (self.start_sample + len(self.audio)) / self.speech.sample_rate

    @property
    def with_pause(self) -> Audio:
        """The audio and the silence after it; all parts in order make the whole."""
        return np.concatenate([self.audio, np.zeros(self.pause_samples, dtype=np.float32)])

    @property
    def short(self) -> str:
        """The beginning of the sentence, in quotes."""
        return shortened(self.sentence.spoken)


class Store(Protocol):
    """Where the parts of an interrupted run are found again."""

    def read(self, index: int, sentence: Sentence) -> Part | None:
        """The part of that index; None when it isn't there."""

    def write(self, part: Part) -> None:
        """Store ``part`` where a later run finds it."""


@dataclass
class _Course:
    """Statistics of the sentences so far."""

    loudness: list[float] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    samples: int = 0

    def add(self, part: Part) -> Part:
        placed = replace(part, start_sample=self.samples)
        self.samples += len(part.audio) + part.pause_samples
        if np.isfinite(part.loudness_db):
            self.loudness.append(part.loudness_db)
        if part.speech.stop_reason == "end" and part.pace > 0 and usual_seconds(part.speech.text) >= _SHORTEST_PACED_S:
            self.paces.append(part.pace)
        return placed

    def strangeness(self, pace: float) -> float:
        """How many times faster or slower than the sentences so far, as a factor of at least 1; 1 where that cannot be said."""
        if len(self.paces) < _PACES_NEEDED or pace <= 0:
            return 1.0
        ratio = pace / statistics.median(self.paces)
        return max(ratio, 1 / ratio)


class LongForm:
    """A long text, ready to be spoken: ``sentences`` are known, iterating speaks them one after the other.

    All have one voice: that of ``voice``, else the weight folder's default, else ``Kalle.random_voice`` of the seed, which "random" asks
    for, too. It is the prompt of every sentence, followed by the sentence before if ``rolling`` says so and both are
    short. Sentence i has a seed of its own, made from ``seed`` and i, so the result depends on neither interruptions nor on who reads it.
    Every sentence is given the level of the others (the median so far), and one that is much faster or slower is tried again once.
    A bad ending is in the part's ``warnings`` and the rest is spoken. UserError for a text without words and bad values.
    """

    def __init__(self, kalle: Kalle, text: str, voice: GivenVoice = None, options: GenerationOptions | None = None) -> None:
        check_text(text, "text")
        options = options or GenerationOptions()
        self.kalle, self.text = kalle, text
        self.seed = secrets.randbelow(2**31) if options.seed is None else options.seed
        self.options = options.changed(seed=self.seed, language=kalle.config.language_of(text, options), by_sentences=True)
        self.voice = _anchor_voice(kalle, voice, self.seed)
        self.voice.check_fits(kalle.hashes)
        fits = _request_fits(kalle, self.voice, options.max_seconds)
        if not fits("a"):
            raise UserError(f"the voice leaves no room for a text: {_positions_left(kalle, self.voice)} positions; use a shorter prompt")
        self.sentences = split_sentences(text, self.options.language, lambda piece: fits(self.words(piece)[0]))
        if not self.sentences:
            raise UserError(f"nothing to speak: got {text.strip()[:20]!r} without a letter or number, expected words")
        self.unspoken = unspoken(text, self.sentences)
        """Text between the sentences that is not spoken, with its position."""

    def __len__(self) -> int:
        return len(self.sentences)

    def __iter__(self) -> Iterator[Part]:
        return self.parts()

    def words(self, piece: str) -> tuple[str, tuple[str, ...]]:
        """The spoken form of ``piece`` of the text, on one line, and warnings about it."""
        words, warnings = self.kalle.config.words(piece, self.options)
        return " ".join(words.split()), warnings

    def speech(self) -> Speech:
        """Speak all of it: one result."""
        return answered(self.asking(), self.kalle.speak)

    def asking(self) -> Generator[SpeechRequest, Speech, Speech]:
        """``speech`` for whoever speaks: yields the request to be spoken next, is sent its speech, returns the whole."""
        course, parts = _Course(), list[Part]()
        for index in range(len(self)):
            part = yield from self._part(index, parts[-1] if parts else None, course)
            parts.append(course.add(part))
        return joined(parts, self.seed, self.text, self.unspoken)

    def parts(self, store: Store | None = None) -> Iterator[Part]:
        """Speak the sentences, those that ``store`` holds excepted, and give each new part to it."""
        course, previous = _Course(), None
        for index, sentence in enumerate(self.sentences):
            part = store.read(index, sentence) if store is not None else None
            if part is None:
                part = answered(self._part(index, previous, course), self.kalle.speak)
                if store is not None:
                    store.write(part)
            previous = course.add(part)
            yield previous

    def request(self, index: int, previous: Part | None = None, again: int = 0) -> SpeechRequest:
        """The request of one sentence, after ``previous``; ``again`` counts further tries."""
        words, _ = self.words(self.sentences[index].text)
        options = self.options.changed(seed=sentence_seed(self.seed, index, again), normalise=False, by_sentences=False)
        return SpeechRequest(words, self._prompt(words, previous), options)

    def part(self, index: int, request: SpeechRequest, speech: Speech, level: float = float("-inf"), gain_db: float = 0.0) -> Part:
        """``speech`` of ``request`` as a part of the whole; ``level`` (dB) is its loudness before the gain."""
        sentence, (_, notes) = self.sentences[index], self.words(self.sentences[index].text)
        cut = ("the sentence is too long for one request and was cut after these words",) if sentence.cut else ()
        return Part(
            index=index,
            sentence=sentence,
            speech=speech,
            loudness_db=level,
            gain_db=gain_db,
            pace=_pace(request.text, speech),
            rolled=request.voice is not self.voice,
            pause_samples=self._pause_samples(index, speech.sample_rate),
            tries=max(len(speech.attempts), 1),
            warnings=tuple(dict.fromkeys((*cut, *notes, *speech.warnings))),
        )

    def _part(self, index: int, previous: Part | None, course: _Course) -> Generator[SpeechRequest, Speech, Part]:
        request = self.request(index, previous)
        speech, tries, warnings = yield from self._asked(index, request, previous, course)
        level = loudness_db(speech.audio, speech.sample_rate)
        known = [*course.loudness, level] if np.isfinite(level) else [level]
        peak = float(np.abs(speech.audio).max(initial=0.0))
        gain = even_gain_db(level, statistics.median(known), peak, self.options.max_gain_db)
        # On the 16-bit grid, so that a part read from its file is the same.
        audio = from_pcm16(to_pcm16(faded(speech.audio.astype(np.float64) * 10 ** (gain / 20), self.fade_samples(speech.sample_rate))))
        part = self.part(index, request, replace(speech, audio=audio), level, gain)
        return replace(part, tries=tries, warnings=(*part.warnings, *warnings))

    def _asked(
        self, index: int, request: SpeechRequest, previous: Part | None, course: _Course
    ) -> Generator[SpeechRequest, Speech, tuple[Speech, int, tuple[str, ...]]]:
        first = yield request
        tries = max(len(first.attempts), 1)
        paced = first.stop_reason == "end" and usual_seconds(request.text) >= _SHORTEST_PACED_S
        odd = course.strangeness(_pace(request.text, first))
        if not paced or odd <= _PACE_LIMIT:
            return first, tries, ()
        second = yield self.request(index, previous, again=1)
        again = course.strangeness(_pace(request.text, second)) if second.stop_reason == "end" else float("inf")
        tries += max(len(second.attempts), 1)
        better, left = (second, again) if again < odd else (first, odd)
        note = f"spoken {odd:.1f} times as fast or slow as the others, tried again"
        kept = "still " + f"{left:.1f} times" if left > _PACE_LIMIT else f"now {left:.1f} times"
        return better, tries, (f"{note}: {kept}",)

    def _prompt(self, words: str, previous: Part | None) -> Voice:
        usable = previous is not None and previous.speech.stop_reason == "end" and not previous.sentence.ends_paragraph
        if previous is None or not usable or not self.options.rolling:
            return self.voice
        return rolling_voice(self.kalle, self.voice, previous.speech.latents, previous.speech.text, words, self.options)

    def fade_samples(self, sample_rate: int) -> int:
        """How long a sentence fades in and out."""
        return round(self.options.fade_s * sample_rate)

    def _pause_samples(self, index: int, sample_rate: int) -> int:
        if index + 1 == len(self.sentences):
            return 0
        pause = self.options.paragraph_pause_s if self.sentences[index].ends_paragraph else self.options.pause_s
        return 0 if self.sentences[index].cut else round(pause * sample_rate)


def speak_long(kalle: Kalle, text: str, voice: GivenVoice = None, options: GenerationOptions | None = None) -> Iterator[Part]:
    """Speak a long ``text``: the parts of its sentences as they are done. See ``LongForm``."""
    return LongForm(kalle, text, voice, options).parts()


def why_by_sentences(words: str, options: GenerationOptions, longest_seconds: float | None = None) -> str | None:
    """Why ``words`` are to be spoken sentence by sentence; None when they are not.

    ``longest_seconds`` of speech at the usual pace are what the weights keep up; None for any length that one request allows.
    """
    if options.by_sentences is not None:
        return "that was asked for" if options.by_sentences else None
    if not fits_one_request(words):
        return "it is too long for one request"
    return None if fits_one_request(words, longest_seconds) else f"these weights keep up {longest_seconds:g} s in one request"


def shortened(text: str, longest: int = 30) -> str:
    """``text`` on one line in quotes, cut after ``longest`` characters."""
    line = " ".join(text.split())
    return repr(line if len(line) <= longest else line[: longest - 1] + "…")


def _pace(words: str, speech: Speech) -> float:
    return usual_seconds(words) / speech.seconds if speech.frames else 0.0


def _anchor_voice(kalle: Kalle, voice: GivenVoice, seed: int) -> Voice:
    """The voice of all sentences: ``voice``, else the weight folder's default, else (or for "random") the random voice of ``seed``."""
    check_given_voice(voice)
    if isinstance(voice, str):
        return kalle.random_voice(seed)
    voice = voice or kalle.default_voice
    return kalle.random_voice(seed) if voice is None else voice


def _request_fits(kalle: Kalle, anchor: Voice, max_seconds: float | None) -> Callable[[str], bool]:
    """Whether a text, with the anchor before it and all that its cap allows behind it, fits one request to ``kalle``."""
    limit = _positions_left(kalle, anchor)
    rate_hz = kalle.flowvae.config.frame_rate_hz

    @lru_cache(maxsize=4096)
    def fits(text: str) -> bool:
        # The text after the transcript may split into tokens otherwise than alone; a few positions cover that.
        needed = len(kalle.tokenizer.encode(text)) + 4 + cap_frames(text, rate_hz, max_seconds)
        return fits_one_request(text, kalle.config.longest_seconds) and needed <= limit

    return fits


def _positions_left(kalle: Kalle, voice: Voice) -> int:
    """Positions of the language model that ``voice`` leaves for a text and its speech."""
    used = len(BEFORE_SPEECH) + (0 if voice.speaker_latent is None else 1)
    if voice.prompt_latents is not None:
        used += len(voice.prompt_latents) + len(kalle.tokenizer.encode(voice.text or ""))
    return int(kalle.lm.backbone.config.max_position_embeddings) - used


def rolling_voice(kalle: Kalle, anchor: Voice, latents: NDArray[np.float32], said: str, text: str, options: GenerationOptions) -> Voice:
    """``anchor`` followed by the sentence ``said``, whose frames are ``latents`` (T, D), as the prompt of ``text``.

    The anchor alone when both take more than ``max_prompt_s`` seconds of ``options``, or leave no room for ``text`` and its speech.
    """
    frames = len(latents) + (0 if anchor.prompt_latents is None else len(anchor.prompt_latents))
    if not len(latents) or frames > options.max_prompt_s * kalle.flowvae.config.frame_rate_hz:
        return anchor
    last = torch.from_numpy(latents)
    prompt = last if anchor.prompt_latents is None else torch.cat([anchor.prompt_latents, last])
    words = said if anchor.prompt_latents is None else f"{(anchor.text or '').strip()} {said}"
    bound = {**anchor.bound_to, FLOWVAE_ENCODER: kalle.hashes[FLOWVAE_ENCODER]}
    rolled = replace(anchor, bound_to=bound, prompt_latents=prompt, text=words)
    return rolled if _request_fits(kalle, rolled, options.max_seconds)(text) else anchor


def faded(audio: NDArray[np.floating], fade: int) -> NDArray[np.floating]:
    """``audio`` (S,), whose first and last ``fade`` samples rise from and fall to silence."""
    fade = min(fade, len(audio) // 2)
    ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(fade) + 0.5) / max(fade, 1))
    result = np.array(audio)
    result[:fade] *= ramp
    result[len(result) - fade :] *= ramp[::-1]
    return result


class Fader:
    """``faded`` for audio that comes in pieces: holds back what may still have to fall to silence."""

    def __init__(self, fade: int) -> None:
        self._fade, self._held, self._begun = fade, np.zeros(0, dtype=np.float32), False

    def push(self, piece: FloatArray) -> FloatArray:
        """Take (n,) more samples; returns those that are final."""
        self._held = np.concatenate([self._held, piece])
        ready = len(self._held) - self._fade
        if ready <= self._fade:
            return self._held[:0]
        out, self._held = self._held[:ready], self._held[ready:]
        if not self._begun:
            out = faded(np.concatenate([out, out[::-1]]), self._fade)[: len(out)]
        self._begun = True
        return out

    def finish(self) -> FloatArray:
        """The last samples."""
        if not self._begun:
            return faded(self._held, self._fade)
        return faded(np.concatenate([self._held[::-1], self._held]), self._fade)[len(self._held) :]


def loudness_db(audio: Audio, sample_rate_hz: int) -> float:
    """Level of the spoken part of (S,) in dB relative to full scale: the mean power of its blocks above two gates.

    Blocks, gates and their order are those of ITU-R BS.1770-4, without its frequency weighting: the same voice is compared
    with itself, so the weighting would shift all values alike. Minus infinity for silence.
    """
    powers = _block_powers(np.asarray(audio, dtype=np.float64), round(BLOCK_S * sample_rate_hz))
    heard = powers[powers > 10 ** (ABSOLUTE_GATE_DB / 10)]
    if not heard.size:
        return float("-inf")
    heard = heard[heard > heard.mean() * 10 ** (RELATIVE_GATE_DB / 10)]
    return float(10 * np.log10(heard.mean()))


def even_gain_db(loudness: float, target: float, peak: float, max_gain_db: float) -> float:
    """Gain that brings ``loudness`` to ``target``, at most ``max_gain_db`` either way and never up to clipping; 0 for silence.

    ``peak`` is the largest absolute sample.
    """
    if not np.isfinite(loudness) or not np.isfinite(target) or peak <= 0:
        return 0.0
    wanted = float(np.clip(target - loudness, -max_gain_db, max_gain_db))
    headroom = 20 * float(np.log10(LOUDEST_PEAK / peak))
    return min(wanted, max(headroom, 0.0)) if wanted > 0 else wanted


def _block_powers(samples: NDArray[np.float64], block: int) -> NDArray[np.float64]:
    if samples.size <= block:
        return np.array([np.mean(samples**2)]) if samples.size else np.zeros(0)
    squares = np.concatenate(([0.0], np.cumsum(samples**2)))
    starts = np.arange(0, samples.size - block + 1, max(round(block * (1 - OVERLAP)), 1))
    return (squares[starts + block] - squares[starts]) / block
