"""Long texts, sentence by sentence, in one voice."""

from __future__ import annotations

import hashlib
import secrets
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from kalle.audio import Audio, from_pcm16, to_pcm16
from kalle.errors import UserError
from kalle.synthesis.longform_part import LongFormOptions, Part, Store
from kalle.synthesis.longform_prompt import anchor_voice, expected_seconds, positions_left, request_fits, rolling_voice
from kalle.synthesis.loudness import even_gain_db, loudness_db
from kalle.synthesis.seeds import check_seed
from kalle.synthesis.speech import FloatArray, Speech
from kalle.synthesis.voice import GivenVoice, Voice
from kalle.text.normalise import normalise
from kalle.text.prompt import check_text
from kalle.text.sentences import Sentence, split_sentences, unspoken

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle

_PACE_LIMITS = (0.5, 2.0)
"""A sentence whose pace, relative to the others', lies outside is tried once more."""
_PACES_NEEDED = 3
"""So many sentences set the pace before one is judged by it."""
_SHORTEST_PACED_S = 1.0
"""A text expected to be shorter than this has no pace to speak of."""


@dataclass
class _Course:
    """What the sentences so far were like."""

    loudness: list[float] = field(default_factory=list)
    paces: list[float] = field(default_factory=list)
    samples: int = 0
    previous: Part | None = None

    def add(self, part: Part) -> Part:
        placed = replace(part, start_sample=self.samples)
        self.samples += len(part.audio) + part.pause_samples
        if np.isfinite(part.loudness_db):
            self.loudness.append(part.loudness_db)
        if part.stop_reason == "end" and part.pace > 0 and expected_seconds(part.spoken) >= _SHORTEST_PACED_S:
            self.paces.append(part.pace)
        self.previous = placed
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
    for, too. It is the prompt of every sentence, followed by the sentence before if ``LongFormOptions.rolling`` says so and both are
    short. Sentence i has a seed of its own, made from ``seed`` and i, so the result depends on neither interruptions nor on who reads it.
    Every sentence is given the level of the others (the median so far), and one that is much faster or slower is tried again once.
    A bad ending is in the part's ``warnings`` and the rest goes on. UserError for a text without words and bad values.
    """

    def __init__(
        self,
        kalle: Kalle,
        text: str,
        voice: GivenVoice = None,
        *,
        seed: int | None = None,
        options: LongFormOptions | None = None,
    ) -> None:
        check_text(text, "text")
        self.kalle, self.text, self.options = kalle, text, options or LongFormOptions()
        self.seed = secrets.randbelow(2**31) if seed is None else check_seed(seed)
        self.voice = anchor_voice(kalle, voice, self.seed)
        self.voice.check_fits(kalle.hashes)
        self._fits = request_fits(kalle, self.voice, self.options.max_seconds)
        if not self._fits("a"):
            raise UserError(f"the voice leaves no room for a text: {positions_left(kalle, self.voice)} positions; use a shorter prompt")
        self.sentences = split_sentences(text, self.options.language, lambda piece: self._fits(self.words(piece)[0]))
        if not self.sentences:
            raise UserError(f"nothing to speak: got {text.strip()[:20]!r} without a letter or number, expected words")
        self.unspoken = unspoken(text, self.sentences)
        """What stands between the sentences and is not spoken, with its place."""

    def __len__(self) -> int:
        return len(self.sentences)

    def __iter__(self) -> Iterator[Part]:
        return self.parts()

    def words(self, piece: str) -> tuple[str, tuple[str, ...]]:
        """What is spoken for ``piece`` of the text, on one line, and the warnings of its normalisation."""
        if not self.options.normalise:
            return " ".join(piece.split()), ()
        normalised = normalise(piece, self.options.language)
        return normalised.text, normalised.warnings

    def parts(self, store: Store | None = None) -> Iterator[Part]:
        """Speak the sentences, those that ``store`` holds excepted, and give each new part to it."""
        course = _Course()
        for index, sentence in enumerate(self.sentences):
            part = store.read(index, sentence) if store is not None else None
            if part is None:
                part = self._part(index, sentence, course)
                if store is not None:
                    store.write(part)
            yield course.add(part)

    def _part(self, index: int, sentence: Sentence, course: _Course) -> Part:
        words, notes = self.words(sentence.text)
        voice = self._prompt(words, course.previous)
        speech, tries, warnings = self._speak(index, words, voice, course)
        level = loudness_db(speech.audio, speech.sample_rate)
        known = [*course.loudness, level] if np.isfinite(level) else [level]
        peak = float(np.abs(speech.audio).max(initial=0.0))
        gain = even_gain_db(level, statistics.median(known), peak, self.options.max_gain_db)
        cut = ("the sentence is too long for one request and was cut after these words",) if sentence.cut else ()
        return Part(
            index=index,
            sentence=sentence,
            spoken=words,
            audio=self._finish(speech.audio, gain, speech.sample_rate),
            sample_rate=speech.sample_rate,
            latents=speech.latents,
            stop_reason=speech.stop_reason,
            seed=speech.seed,
            tries=tries,
            confidence=speech.confidence if speech.frames else 0.0,
            loudness_db=level,
            gain_db=gain,
            pace=_pace(words, speech),
            rolled=voice is not self.voice,
            pause_samples=self._pause_samples(index, speech.sample_rate),
            warnings=(*cut, *notes, *speech.warnings, *warnings),
        )

    def _prompt(self, words: str, previous: Part | None) -> Voice:
        usable = previous is not None and previous.stop_reason == "end" and not previous.sentence.ends_paragraph
        if previous is None or not usable or not self.options.rolling:
            return self.voice
        return rolling_voice(
            self.kalle, self.voice, previous.latents, previous.spoken, words, self.options.max_prompt_s, self.options.max_seconds
        )

    def _speak(self, index: int, words: str, voice: Voice, course: _Course) -> tuple[Speech, int, tuple[str, ...]]:
        first = self._synthesize(words, voice, sentence_seed(self.seed, index))
        tries = max(len(first.attempts), 1)
        paced = first.stop_reason == "end" and expected_seconds(words) >= _SHORTEST_PACED_S
        odd = course.strangeness(_pace(words, first))
        if not paced or odd <= _PACE_LIMITS[1]:
            return first, tries, ()
        second = self._synthesize(words, voice, sentence_seed(self.seed, index, 1))
        again = course.strangeness(_pace(words, second)) if second.stop_reason == "end" else float("inf")
        tries += max(len(second.attempts), 1)
        better, left = (second, again) if again < odd else (first, odd)
        note = f"spoken {odd:.1f} times as fast or slow as the others, tried again"
        kept = "still " + f"{left:.1f} times" if left > _PACE_LIMITS[1] else f"now {left:.1f} times"
        return better, tries, (f"{note}: {kept}",)

    def _synthesize(self, words: str, voice: Voice, seed: int) -> Speech:
        options = self.options
        return self.kalle.synthesize(
            words,
            voice,
            seed=seed,
            temperature=options.temperature,
            guidance=options.guidance,
            max_seconds=options.max_seconds,
            quirks=options.quirks,
            retries=options.retries,
        )

    def _finish(self, audio: FloatArray, gain_db: float, sample_rate: int) -> Audio:
        """``audio`` (S,) with gain and fades, on the 16-bit grid, so that a part read from its file is the same."""
        fade = min(round(self.options.fade_s * sample_rate), len(audio) // 2)
        ramp = 0.5 - 0.5 * np.cos(np.pi * (np.arange(fade) + 0.5) / max(fade, 1))
        louder = np.asarray(audio, dtype=np.float64) * 10 ** (gain_db / 20)
        louder[:fade] *= ramp
        louder[len(louder) - fade :] *= ramp[::-1]
        return from_pcm16(to_pcm16(louder))

    def _pause_samples(self, index: int, sample_rate: int) -> int:
        if index + 1 == len(self.sentences):
            return 0
        pause = self.options.paragraph_pause_s if self.sentences[index].ends_paragraph else self.options.pause_s
        return 0 if self.sentences[index].cut else round(pause * sample_rate)


def speak_long(
    kalle: Kalle, text: str, voice: GivenVoice = None, *, seed: int | None = None, options: LongFormOptions | None = None
) -> Iterator[Part]:
    """Speak a long ``text``: the parts of its sentences as they are done. See ``LongForm``."""
    return LongForm(kalle, text, voice, seed=seed, options=options).parts()


def sentence_seed(seed: int, index: int, again: int = 0) -> int:
    """The seed of sentence ``index`` of a text spoken with ``seed``; ``again`` counts further tries."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{index}/{again}".encode()).digest()[:7], "big")


def _pace(words: str, speech: Speech) -> float:
    return expected_seconds(words) / speech.seconds if speech.frames else 0.0
