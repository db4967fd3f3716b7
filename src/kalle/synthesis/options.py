"""How a text is to be spoken: every choice of a request in one value, and what these choices may be."""

from __future__ import annotations

import contextlib
import math
import operator
import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from numbers import Real
from typing import Any

import numpy as np

from kalle.errors import UserError, check_type
from kalle.synthesis.release_compat import OURS, RELEASED_MIN_INDEX, RELEASED_THRESHOLD, ReleaseCompatibility
from kalle.synthesis.voice import GivenVoice, check_given_voice
from kalle.text.languages import language_code

NO_GUIDANCE = 1.0
DEFAULT_STOP_PROBABILITY = 0.5
"""The rule of a model with a stop head that stores none (MELLE, arXiv 2407.08551)."""
SEED_LIMIT = 2**63
BASE_SECONDS = 3.0
LONGEST_SECONDS = 80.0
"""The release's own cap."""
CAP_PER_USUAL = 3.0
"""Seconds that the length cap allows for each second of speech at the usual pace."""
_MOST_FRAMES = 2.0**31
"""More than any model has positions; a cap above it means the same."""
_IDEOGRAPH_SECONDS, _DIGIT_SECONDS, _OTHER_SECONDS = 0.6, 0.9, 0.2


def _is_number(value: object) -> bool:
    """Whether it is a real number that a float can hold; True and False are none."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    with contextlib.suppress(OverflowError):
        float(value)
        return True
    return False


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
        if not _is_number(self.threshold) or not self.threshold >= 0:
            raise UserError(f"bad stop threshold: got {self.threshold!r}, expected a number of at least 0; 0 never stops")
        if isinstance(self.min_index, bool) or not hasattr(self.min_index, "__index__"):
            raise UserError(f"bad min_index of the stop rule: got {self.min_index!r}, expected an integer; correct it")
        if self.probability is not None and not (_is_number(self.probability) and 0 < self.probability <= 1):
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

    def check(self, stop_head: bool) -> None:
        """UserError for a rule by probability where the model has no ``stop_head``."""
        if self.probability is not None and not stop_head:
            raise UserError(
                f"this model has no stop head: got a stop rule by probability {self.probability:g}, expected one by threshold; "
                "use StopRule(threshold=…), or train with lm.stop_head=true"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in config.json, without a probability that is not used, so that older programs read the rest."""
        values = asdict(self)
        if self.probability is None:
            del values["probability"]
        return values


NEVER = StopRule(threshold=0.0)


def default_stop(stop_head: bool) -> StopRule:
    """The rule of a model that stores none, with or without a stop head."""
    return StopRule(probability=DEFAULT_STOP_PROBABILITY) if stop_head else StopRule()


@dataclass(frozen=True)
class GenerationOptions:
    """Everything that a request may choose besides text and voice. It goes as it is from whoever asks down to the loop.

    A UserError for a value that cannot be used. How to add one: docs/architecture.md, "Adding a generation option".
    """

    seed: int | None = None
    """None draws one; ``Speech.seed`` tells it. The same seed gives the same speech alone, in a batch and as a stream."""
    temperature: float | None = None
    """Scale of the standard deviations; 1 is the model's own spread. None takes the one stored with the weights, else 1."""
    guidance: float = NO_GUIDANCE
    """How far each prediction goes from what the model would predict without the words; 1 is its own, more follows the text more
    closely, at twice the cost. For models trained with objective.text_drop."""
    stop: StopRule | None = None
    """None takes the rule stored with the weights."""
    max_seconds: float | None = None
    """Length cap, of each sentence where the text is spoken by sentences; None derives it from the text. Speech that is cut at a cap
    shorter than that was meant to be cut: it is not tried again."""
    retries: int = 1
    """How often a bad ending (anything but "end") is tried again with another seed; every try is in ``Speech.attempts``."""
    watch: bool = True
    """Stop when the model says the same, or nothing, for seconds; release compatibility and a threshold of 0 switch it off too."""
    compatibility: ReleaseCompatibility = OURS
    """Habits of the release to reproduce."""
    language: str | None = None
    """ISO 639-1 code of the text. None takes the weights' own where the text is in its script, else it is guessed from the script."""
    normalise: bool | None = None
    """Put numbers, dates and abbreviations into words first (English and Chinese). None does so where the weights read English as phonemes,
    and for figures that they never learnt; False leaves the text as written."""
    by_sentences: bool | None = None
    """Speak sentence by sentence. None does so where the text is longer than one request of these weights may be; False refuses it."""
    pause_s: float = 0.3
    """Silence between two sentences, in seconds."""
    paragraph_pause_s: float = 0.8
    """Silence between two paragraphs."""
    fade_s: float = 0.005
    """Each of several sentences fades in and out over this long, so that no joint clicks."""
    rolling: bool = False
    """Give each sentence the one before it in its paragraph as a prompt, after the voice."""
    max_prompt_s: float = 10.0
    """With ``rolling``, voice and sentence before take at most this long together; else the voice alone is the prompt."""
    max_gain_db: float = 6.0
    """A sentence is made at most this much louder or quieter to match the others; a stream leaves the level as it is."""
    latency_frames: int | None = None
    """Of a stream: frames that must exist beyond a piece before it is final. None is the smallest that keeps 1e-4."""
    chunk_frames: int = 8
    """Of a stream: frames in a piece of audio; fewer cost more (docs/results/streaming.md), more delay playback."""

    def __post_init__(self) -> None:
        if self.seed is not None:
            object.__setattr__(self, "seed", check_seed(self.seed))
        for name in ("temperature", "guidance"):
            self._check_number(name, "a finite number of at least 0; 1 is the model's own", lambda value: value >= 0)
        self._check_number("max_seconds", "a finite number above 0; leave it out to derive it from the text", lambda value: value > 0)
        for name in ("pause_s", "paragraph_pause_s", "fade_s", "max_prompt_s", "max_gain_db"):
            self._check_number(name, "a number from 0 to 60", lambda value: value <= 60)
        for name, least in (("retries", 0), ("chunk_frames", 1), ("latency_frames", 0)):
            value = getattr(self, name)
            if value is None and name == "latency_frames":
                continue
            if isinstance(value, bool) or not hasattr(value, "__index__") or not least <= operator.index(value) < SEED_LIMIT:
                raise UserError(f"bad {name}: got {value!r:.60}, expected an integer of at least {least}; correct it")
            object.__setattr__(self, name, operator.index(value))
        for name in ("watch", "normalise", "rolling", "by_sentences"):
            value = getattr(self, name)
            if not isinstance(value, bool | np.bool_) and not (value is None and name in ("by_sentences", "normalise")):
                raise UserError(f"bad {name}: got {value!r:.60}, expected True or False; correct it")
        object.__setattr__(self, "language", checked_language(self.language))
        check_type("stop", self.stop, StopRule | None, "a kalle.synthesis.StopRule")
        check_type("compatibility", self.compatibility, ReleaseCompatibility, "a ReleaseCompatibility")

    def _check_number(self, name: str, expected: str, fits: Callable[[Any], bool]) -> None:
        value, optional = getattr(self, name), name in ("temperature", "max_seconds")
        if value is None and optional:
            return
        if not (_is_number(value) and 0 <= value < math.inf and fits(value)):
            raise UserError(f"bad {name}: got {value!r:.60}, expected {expected}")

    def changed(self, **values: Any) -> GenerationOptions:
        """These options with other ``values`` of some fields; a UserError for a name that is no field lists those there are."""
        names = [field.name for field in fields(self)]
        unknown = [name for name in values if name not in names]
        if unknown:
            raise UserError(f"unknown option: got {', '.join(unknown)}, expected some of {', '.join(names)}; correct the name")
        return replace(self, **values) if values else self

    def stop_rule(self, calibrated: StopRule) -> StopRule:
        """The rule that holds: the one given, else the release's where that is to be reproduced, else ``calibrated``."""
        released = StopRule(RELEASED_THRESHOLD, RELEASED_MIN_INDEX) if self.compatibility.hard_coded_stop else calibrated
        return self.stop or released


@dataclass(frozen=True, init=False)
class SpeechRequest:
    """A text, a voice and how to speak, as one value, so that several can go into `Kalle.synthesize_batch`.

    ``SpeechRequest(text, voice, seed=3)`` is ``SpeechRequest(text, voice, GenerationOptions(seed=3))``. A UserError for a value of
    another type; whether the values can be spoken is seen when the model gets them.
    """

    text: str
    voice: GivenVoice = None
    """None leaves it to the weight folder's default voice, or else to the model; "random" is ``Kalle.random_voice`` of the seed."""
    options: GenerationOptions = field(default_factory=GenerationOptions)

    def __init__(self, text: str, voice: GivenVoice = None, options: GenerationOptions | None = None, **fields: Any) -> None:
        if not isinstance(text, str):
            got = "None" if text is None else type(text).__name__
            raise UserError(f"bad text: got {got}, expected a str; decode bytes with .decode('utf-8')")
        check_given_voice(voice)
        check_type("options", options, GenerationOptions | None, "kalle.synthesis.GenerationOptions")
        for name, value in (("text", text), ("voice", voice), ("options", (options or GenerationOptions()).changed(**fields))):
            object.__setattr__(self, name, value)


def checked_language(language: str | None) -> str | None:
    """The ISO 639 code of ``language``, a code or a locale such as en-US; a UserError for what looks like neither."""
    if language is None:
        return None
    check_type("language", language, str, "an ISO 639 code such as en or zh")
    code = language_code(language)
    if code is None or len(language.replace("_", "-").split("-")[0]) > 3:
        remedy = f"write {code}" if code else "leave language out to guess it"
        raise UserError(f"unknown language: got '{language}', expected an ISO 639 code such as en or zh; {remedy}")
    return code


def check_seed(seed: object) -> int:
    """``seed`` as an int, NumPy's integers included; a UserError unless it is an integer from 0 to 2**63 - 1."""
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        number = -1
    if not 0 <= number < SEED_LIMIT:
        raise UserError(f"bad seed: got {seed!r:.60}, expected an integer from 0 to 2**63 - 1; leave it out to draw one")
    return number


def usual_seconds(text: str) -> float:
    """How long ``text`` takes at the usual pace, roughly."""
    return sum(map(_character_seconds, text)) / CAP_PER_USUAL


def cap_seconds(text: str) -> float:
    """A length that slow speech of ``text`` does not reach: about three times the usual pace, and a fixed allowance.

    Each ideograph, kana or hangul character counts as a syllable, each digit as a word, any other character as a letter.
    """
    return min(BASE_SECONDS + CAP_PER_USUAL * usual_seconds(text), LONGEST_SECONDS)


def cap_frames(text: str, frame_rate_hz: float, max_seconds: float | None = None) -> int:
    """The length cap in frames: ``max_seconds`` where given, else from the text. UserError when it allows no frame."""
    if max_seconds is not None and not (math.isfinite(max_seconds) and max_seconds * frame_rate_hz >= 1):
        raise UserError(f"bad max_seconds: got {max_seconds} s, expected at least one frame of {1 / frame_rate_hz:g} s; raise max_seconds")
    seconds = cap_seconds(text) if max_seconds is None else max_seconds
    return math.floor(min(seconds * frame_rate_hz, _MOST_FRAMES) + 1e-6)


def fits_one_request(text: str, longest_seconds: float | None = None) -> bool:
    """Whether the length cap that follows from ``text`` is below the longest one, so that slow speech is not cut off.

    And whether the text takes ``longest_seconds`` at most at the usual pace, where weights can keep up no more (`FolderConfig`).
    """
    return cap_seconds(text) < LONGEST_SECONDS and (longest_seconds is None or usual_seconds(text) <= longest_seconds)


def _character_seconds(character: str) -> float:
    if character.isdigit():
        return _DIGIT_SECONDS
    if unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) in "WFH":
        return _IDEOGRAPH_SECONDS
    return _OTHER_SECONDS
