"""The checks of a prepared corpus as one table: name, threshold, function, remedy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalle.data.corpus.items import PrepareOptions, normalised
from kalle.data.corpus.measures import (
    SCRIPTS_OF_LANGUAGE,
    MeasuredItem,
    Measures,
    letters_and_signs,
    mixed_word,
    odd_characters,
    script_counts,
)
from kalle.errors import UserError
from kalle.text.languages import SYLLABLE_LETTERS, language_of_name

GOOD, LOOK, BAD = "good", "look", "bad"
VERDICTS = (GOOD, LOOK, BAD)
"""From best to worst."""
LISTED_SPEAKERS = 30
RARE_CHARACTERS = 40
"""At most so many of the rarest characters are listed."""
_RARE_COUNT = 3
_HELD_OUT_FIRST = {"test": 0, "valid": 1, "train": 3}
_MAD_TO_SIGMA = 1.4826
_LEAST_SIGMA = 0.05
_ITEMS_PER_BIN = 50
_MOST_BINS = 12
Key = tuple[str, str]
"""Split and id of an item."""


@dataclass(frozen=True)
class QualityLimits:
    """From where on an item is flagged, and from which share of flagged items on a corpus is worth a look, or bad."""

    look_share: float = 0.001
    """Share of flagged items above which a check says "look"; below it a large corpus is as good as corpora get."""
    bad_share: float = 0.05
    """Share of flagged items above which a check says "bad"."""
    min_seconds: float = PrepareOptions.min_seconds
    max_seconds: float = PrepareOptions.max_seconds
    min_loudness_lufs: float = -45.0
    max_loudness_lufs: float = -8.0
    max_loudness_offset_db: float = 12.0
    """Distance from the median loudness of the corpus."""
    max_leading_s: float = 1.0
    max_trailing_s: float = 1.0
    max_pause_s: float = 2.0
    """Longest silence between two sounds."""
    max_inner_silence_share: float = 0.5
    """Share of the time between the first and the last sound that is silent."""
    max_clipped_share: float = 0.001
    """Share of samples in flat tops, at full scale or at the recording's own peak."""
    min_bandwidth_share: float = 0.75
    """Of half the sample rate; below it the audio was recorded, coded or sent with less than the file promises."""
    max_letters_per_s: float = 30.0
    max_signs_per_s: float = 14.0
    """Ideographs, kana or hangul."""
    min_letters_per_s: float = 1.0
    min_signs_per_s: float = 0.4
    outlier_z: float = 5.0
    """Robust z of the log rate among texts of like length and language."""
    min_outlier_ratio: float = 1.8
    """An outlier is also this many times faster or slower than its like: in a very even corpus a large z means little."""
    min_like_items: int = 20
    """With fewer items of a language nothing is said about outliers."""
    max_foreign_share: float = 0.3
    """Share of letters that are not in a script of the item's language."""
    look_repeated_share: float = 0.2
    """Share of items that repeat a text of the same speaker."""
    min_speaker_minutes: float = 1.0
    max_speaker_share: float = 0.5
    """Share of the audio of one speaker among several."""

    def __post_init__(self) -> None:
        if not 0 <= self.look_share <= self.bad_share <= 1:
            raise UserError(f"limits: got look_share {self.look_share} and bad_share {self.bad_share}, expected 0 <= look <= bad <= 1")


def limits_from(settings: list[str]) -> QualityLimits:
    """`QualityLimits` with ``NAME=NUMBER`` settings applied; a UserError lists the names there are."""
    defaults = {field.name: getattr(QualityLimits(), field.name) for field in fields(QualityLimits)}
    changed: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in defaults:
            raise UserError(f"unknown limit: got '{setting}', expected NAME=NUMBER with one of {', '.join(defaults)}")
        try:
            changed[name] = type(defaults[name])(value)
        except ValueError:
            raise UserError(f"bad limit: got '{setting}', expected {name}=NUMBER, such as {name}={defaults[name]}") from None
    return QualityLimits(**changed)


@dataclass(frozen=True)
class Flag:
    """One item that a check objects to, and why."""

    check: str
    split: str
    id: str
    reason: str

    @property
    def key(self) -> Key:
        """Split and id of the item."""
        return self.split, self.id


@dataclass(frozen=True)
class CheckResult:
    """The result of one check for the whole corpus."""

    check: str
    verdict: str
    summary: str
    threshold: str
    remedy: str
    flags: list[Flag] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values without the flags, which are listed by item elsewhere."""
        values = asdict(self)
        values["flagged"] = len(values.pop("flags"))
        return values


@dataclass(frozen=True)
class Found:
    """The findings of a check: the reason of every item that it flags, and numbers for the report."""

    reasons: Mapping[Key, str]
    numbers: dict[str, Any] = field(default_factory=dict)
    verdict: str | None = None
    """None: by the share of flagged items."""
    summary: str = ""


@dataclass(frozen=True)
class Check:
    """One check; ``function`` says what it finds among the items."""

    threshold: Callable[[QualityLimits], str]
    function: Callable[[Sequence[MeasuredItem], QualityLimits], Found]
    remedy: str
    removed: bool
    """Whether ``kalle data doctor --filter`` leaves its items out by default: a fault that cannot be corrected, not an unusual item."""

    def run(self, name: str, items: Sequence[MeasuredItem], limits: QualityLimits) -> CheckResult:
        """The result on ``items``."""
        found = self.function(items, limits)
        share = len(found.reasons) / max(len(items), 1)
        by_share = GOOD if share <= limits.look_share else LOOK if share <= limits.bad_share else BAD
        verdict = by_share if found.verdict is None else found.verdict
        objects = bool(found.reasons) if found.verdict is None else verdict != GOOD
        flags = [Flag(name, *key, reason) for key, reason in found.reasons.items()]
        summary = found.summary or f"{len(flags)} of {len(items)} items"
        return CheckResult(name, verdict, summary, self.threshold(limits), self.remedy if objects else "", flags, found.numbers)


def worst(verdicts: Sequence[str]) -> str:
    """The worst of the verdicts; good for none."""
    return max(verdicts, key=VERDICTS.index, default=GOOD)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Minimum, 5, 50 and 95 % points, and maximum; empty for no values."""
    if not len(values):
        return {}
    points = np.percentile(np.asarray(values, dtype=np.float64), [0, 5, 50, 95, 100])
    return {name: round(float(point), digits) for name, point in zip(("min", "p5", "median", "p95", "max"), points, strict=True)}


def readable_items(items: Sequence[MeasuredItem]) -> list[MeasuredItem]:
    """The items whose audio could be read."""
    return [item for item in items if not item.sound.problem]


def _flagged(items: Sequence[MeasuredItem], reason: Callable[[MeasuredItem], str]) -> dict[Key, str]:
    """Those items to which ``reason`` objects."""
    return {item.key: said for item in items if (said := reason(item))}


def _unreadable(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    return Found(_flagged(items, lambda item: item.sound.problem))


def _duration(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    def reason(item: MeasuredItem) -> str:
        seconds = item.sound.seconds
        return "" if limits.min_seconds <= seconds <= limits.max_seconds else f"{seconds:.2f} s long"

    seconds = [item.sound.seconds for item in readable_items(items)]
    return Found(_flagged(readable_items(items), reason), {"hours": round(sum(seconds) / 3600, 4), "seconds": spread(seconds)})


def _loudness(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Items far from the corpus' usual loudness, or beyond what anybody records on purpose."""
    levels = [item.sound.loudness_lufs for item in readable_items(items) if item.sound.loudness_lufs is not None]
    median = float(np.median(levels)) if levels else 0.0

    def reason(item: MeasuredItem) -> str:
        level = item.sound.loudness_lufs
        if level is None:
            return "silent"
        if not limits.min_loudness_lufs <= level <= limits.max_loudness_lufs:
            return f"{level:.1f} LUFS"
        far = abs(level - median) > limits.max_loudness_offset_db
        return f"{level:.1f} LUFS, {level - median:+.1f} dB from the median" if far else ""

    return Found(_flagged(readable_items(items), reason), {"lufs": spread(levels, 1)})


def _silence(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Long silence before, after or inside the speech."""

    def reason(item: MeasuredItem) -> str:
        sound: Measures = item.sound
        said = [
            (sound.leading_s, limits.max_leading_s, f"{sound.leading_s:.2f} s of leading silence"),
            (sound.trailing_s, limits.max_trailing_s, f"{sound.trailing_s:.2f} s of trailing silence"),
            (sound.pause_s, limits.max_pause_s, f"a pause of {sound.pause_s:.2f} s"),
            (sound.inner_silence_share, limits.max_inner_silence_share, f"{sound.inner_silence_share:.0%} silence inside"),
        ]
        return ", ".join(words for value, limit, words in said if value > limit)

    names = {"leading_s": "leading_s", "trailing_s": "trailing_s", "longest_pause_s": "pause_s", "inner_share": "inner_silence_share"}
    numbers = {name: spread([getattr(item.sound, measure) for item in readable_items(items)]) for name, measure in names.items()}
    return Found(_flagged(readable_items(items), reason), numbers)


def _clipping(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    def reason(item: MeasuredItem) -> str:
        share = item.sound.clipped_share
        return f"{share:.2%} of the samples in flat tops" if share > limits.max_clipped_share else ""

    return Found(
        _flagged(readable_items(items), reason), {"clipped_share": spread([item.sound.clipped_share for item in readable_items(items)], 6)}
    )


def _bandwidth(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Audio with less bandwidth than its sample rate promises: upsampled telephone speech, low-rate MP3."""

    def reason(item: MeasuredItem) -> str:
        narrow = item.sound.bandwidth_hz < limits.min_bandwidth_share * item.sample_rate_hz / 2
        above, rate = item.sound.bandwidth_hz / 1000, item.sample_rate_hz / 1000
        return f"nothing above {above:.2f} kHz in audio of {rate:g} kHz" if narrow else ""

    widths = [item.sound.bandwidth_hz for item in readable_items(items)]
    kilohertz = Counter(round(width / 1000) for width in widths)
    numbers = {"bandwidth_hz": spread(widths, 0), "items_by_khz": {str(band): kilohertz[band] for band in sorted(kilohertz)}}
    return Found(_flagged(readable_items(items), reason), numbers)


def amount(text: str) -> float:
    """How much there is to speak, in letters: a sign of a syllabic script counts as `SYLLABLE_LETTERS`."""
    letters, signs = letters_and_signs(text)
    return letters + SYLLABLE_LETTERS * signs


def pace(item: MeasuredItem) -> tuple[float, str]:
    """Letters, or signs where the text is mostly signs, in a second from the first to the last sound; and what was counted."""
    letters, signs = letters_and_signs(item.text)
    if signs > letters:
        return (signs + letters / SYLLABLE_LETTERS) / item.sound.spoken_s, "signs"
    return (letters + SYLLABLE_LETTERS * signs) / item.sound.spoken_s, "letters"


def _rate(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """A speaking rate that no speaker reaches, or that means text is missing."""
    bounds = {
        "letters": (limits.min_letters_per_s, limits.max_letters_per_s),
        "signs": (limits.min_signs_per_s, limits.max_signs_per_s),
    }
    paces = {item.key: pace(item) for item in _spoken(items)}
    slow_or_fast = {key: (value, unit) for key, (value, unit) in paces.items() if not bounds[unit][0] <= value <= bounds[unit][1]}
    rates = {unit: [value for value, counted in paces.values() if counted == unit] for unit in bounds}
    numbers = {f"{unit}_per_s": spread(values, 2) for unit, values in rates.items() if values}
    return Found({key: f"{value:.1f} {unit} a second" for key, (value, unit) in slow_or_fast.items()}, numbers)


def _outliers(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Items much faster or slower than others of their language and length: swapped, cut or wrong texts."""
    reasons: dict[Key, str] = {}
    judged = 0
    by_language: dict[str, list[MeasuredItem]] = defaultdict(list)
    for item in _spoken(items):
        by_language[item.language].append(item)
    for group in by_language.values():
        if len(group) < limits.min_like_items:
            continue
        judged += len(group)
        for item, z, times in zip(group, *scores(group), strict=True):
            if abs(z) > limits.outlier_z and max(times, 1 / times) > limits.min_outlier_ratio:
                words = f"{times:.1f} times as fast" if times > 1 else f"{1 / times:.1f} times as slow"
                reasons[item.key] = f"{words} as others of its length (z {z:+.1f})"
    return Found(reasons, {"items_judged": judged})


def scores(items: Sequence[MeasuredItem]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Robust z of each item's log rate (N,), and its rate over the usual one (N,).

    Usual rate and its spread (median and MAD) are found in bins of like amounts of text and interpolated between: a short text is
    spoken slower and less evenly than a long one.
    """
    amounts = np.log([max(amount(item.text), 1.0) for item in items])
    rates = amounts - np.log([item.sound.spoken_s for item in items])
    bins = np.array_split(np.argsort(amounts, kind="stable"), min(max(len(items) // _ITEMS_PER_BIN, 1), _MOST_BINS))
    centres = [float(np.median(amounts[members])) for members in bins]
    usual = np.interp(amounts, centres, [float(np.median(rates[members])) for members in bins])
    off = rates - usual
    sigmas = [max(_MAD_TO_SIGMA * float(np.median(np.abs(off[members]))), _LEAST_SIGMA) for members in bins]
    return off / np.interp(amounts, centres, sigmas), np.exp(off)


def _spoken(items: Sequence[MeasuredItem]) -> list[MeasuredItem]:
    return [item for item in readable_items(items) if amount(item.text) > 0]


def _script(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Text in a script that its language is not written in, and words that mix alphabets.

    A language that isn't in `SCRIPTS_OF_LANGUAGE`, or none, is expected in the script most of its own items use.
    """
    counts = {item.key: script_counts(item.text) for item in items}
    expected = _expected_scripts(items, list(counts.values()))
    numbers = {
        "letters_by_script": dict(sum(counts.values(), Counter[str]()).most_common()),
        "items_by_language": dict(Counter(item.language or "(not given)" for item in items)),
    }
    return Found(_flagged(items, lambda item: _script_reason(item, counts[item.key], expected[item.language], limits)), numbers)


def _expected_scripts(items: Sequence[MeasuredItem], counts: Sequence[Counter[str]]) -> Mapping[str, frozenset[str]]:
    of_language: dict[str, Counter[str]] = {}
    for item, count in zip(items, counts, strict=True):
        of_language.setdefault(item.language, Counter()).update([max(count, key=lambda name: (count[name], name))] if count else [])
    usual = {language: frozenset(name for name, _ in votes.most_common(1)) for language, votes in of_language.items()}
    return {language: SCRIPTS_OF_LANGUAGE.get(language_of_name(language), scripts) for language, scripts in usual.items()}


def _script_reason(item: MeasuredItem, count: Counter[str], expected: frozenset[str], limits: QualityLimits) -> str:
    letters = count.total()
    foreign = Counter({name: number for name, number in count.items() if name not in expected})
    if letters and foreign.total() / letters > limits.max_foreign_share:
        name = foreign.most_common(1)[0][0].title()
        wanted = " or ".join(sorted(part.title() for part in expected))
        share = foreign.total() / letters
        return f"{share:.0%} of the letters are {name}, expected {wanted} for language '{item.language or 'not given'}'"
    word = mixed_word(item.text)
    return f"the word '{word}' mixes {' and '.join(sorted(name.title() for name in script_counts(word)))} letters" if word else ""


def _characters(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Empty texts, control and replacement characters, markup, text that was decoded wrongly; and the rarest characters, listed only.

    The tokenizers here are byte-level, so no character is unknown to them; a rare one is merely seldom trained.
    """
    every = Counter[str]()
    for item in items:
        every.update(item.text)
    rare = sorted((count, character) for character, count in every.items() if count <= _RARE_COUNT and not character.isspace())
    numbers = {
        "distinct": len(every),
        "with_digits": sum(any(character.isdigit() for character in item.text) for item in items),
        "rare": {character: count for count, character in rare[:RARE_CHARACTERS]},
    }
    return Found(_flagged(items, lambda item: (odd_characters(item.text) or "") if item.text.strip() else "no text"), numbers)


def _copies(items: Sequence[MeasuredItem], key: Callable[[MeasuredItem], object]) -> list[list[MeasuredItem]]:
    """Items with an equal key that is not empty, two or more together; in each group those to keep come first."""
    groups: dict[object, list[MeasuredItem]] = defaultdict(list)
    for item in items:
        if key(item):
            groups[key(item)].append(item)
    return [sorted(group, key=_rank) for group in groups.values() if len(group) > 1]


def _rank(item: MeasuredItem) -> int:
    """Held-out splits come before training: what a test set holds decides what training may not."""
    return _HELD_OUT_FIRST.get(item.split, 2)


def _duplicate_audio(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Items whose decoded samples are equal; every one but the first of a group is flagged."""
    reasons = {}
    for first, *rest in _copies(readable_items(items), lambda item: item.sound.digest):
        for item in rest:
            also = "" if normalised(item.text) == normalised(first.text) else ", with another text"
            reasons[item.key] = f"the audio of {first.split} '{first.id}'{also}"
    return Found(reasons)


def _duplicate_text(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Texts that one speaker says more than once: no fault, but little is learnt from many of them."""
    groups = _copies(items, lambda item: normalised(item.text) and (item.speaker, normalised(item.text)))
    reasons = {item.key: f"the text of {first.split} '{first.id}', same speaker" for first, *rest in groups for item in rest}
    share = len(reasons) / max(len(items), 1)
    numbers = {"distinct_texts": len({normalised(item.text) for item in items}), "repeated_share": round(share, 4)}
    return Found(reasons, numbers, LOOK if share > limits.look_repeated_share else GOOD)


def _leakage(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """A text or an audio in two splits; the copy outside the held-out split is flagged, test before valid before train."""
    reasons: dict[Key, list[str]] = defaultdict(list)
    keys: dict[str, Callable[[MeasuredItem], object]] = {
        "text": lambda item: normalised(item.text),
        "audio": lambda item: item.sound.digest,
    }
    for what, key in keys.items():
        for group in _copies(items, key):
            first = group[0]
            for item in group:
                if item.split != first.split:
                    reasons[item.key].append(f"its {what} is also {first.split} '{first.id}'")
    return Found({key: "; ".join(said) for key, said in reasons.items()}, verdict=BAD if reasons else GOOD)


def _speakers(items: Sequence[MeasuredItem], limits: QualityLimits) -> Found:
    """Minutes of each speaker; no item is flagged, for no item is at fault."""
    seconds: Counter[str] = Counter()
    for item in readable_items(items):
        seconds[item.speaker] += item.sound.seconds  # type: ignore[assignment]
    total = max(sum(seconds.values()), 1e-9)
    largest, most = seconds.most_common(1)[0] if seconds else ("", 0)
    few = [name for name, value in seconds.items() if value < 60 * limits.min_speaker_minutes]
    shares = np.array([value / total for value in seconds.values() if value > 0])
    problems = []
    if len(seconds) > 1 and most / total > limits.max_speaker_share:
        problems.append(f"'{largest}' speaks {most / total:.0%}")
    if few:
        problems.append(f"{len(few)} of {len(seconds)} with less than {limits.min_speaker_minutes:g} min")
    if "" in seconds:
        problems.append(f"{seconds[''] / 60:.1f} min without a speaker's name")
    numbers = {
        "count": len(seconds),
        "effective_count": round(float(np.exp(-(shares * np.log(shares)).sum())), 2) if shares.size else 0,
        "minutes": {name or "(not given)": round(value / 60, 2) for name, value in seconds.most_common(LISTED_SPEAKERS)},
        "below_min_minutes": len(few),
    }
    summary = f"{len(seconds)} speakers" + "".join(f"; {problem}" for problem in problems)
    return Found({}, numbers, LOOK if problems else GOOD, summary)


CHECKS: Mapping[str, Check] = {
    "unreadable": Check(lambda limits: "none may be", _unreadable, "fetch or convert these files again, or leave the items out", True),
    "duration": Check(
        lambda limits: f"{limits.min_seconds:g} to {limits.max_seconds:g} s",
        *(_duration, "cut long items at pauses; drop those without speech", False),
    ),
    "loudness": Check(
        lambda limits: (
            f"{limits.min_loudness_lufs:g} to {limits.max_loudness_lufs:g} LUFS, within {limits.max_loudness_offset_db:g} dB of the median"
        ),
        *(_loudness, "bring the items to one loudness; drop silent ones", False),
    ),
    "silence": Check(
        lambda limits: (
            f"leading {limits.max_leading_s:g} s, trailing {limits.max_trailing_s:g} s, pause {limits.max_pause_s:g} s, "
            f"inside {limits.max_inner_silence_share:.0%}"
        ),
        *(_silence, "trim the ends; cut items at long pauses: a model learns them as part of the text", True),
    ),
    "clipping": Check(
        lambda limits: f"{limits.max_clipped_share:.2%} of the samples",
        *(_clipping, "use a take with more headroom, or leave the items out: clipping cannot be undone", True),
    ),
    "bandwidth": Check(
        lambda limits: f"{limits.min_bandwidth_share:.0%} of half the sample rate",
        *(_bandwidth, "fetch the recordings at their full rate, or leave the items out: the model learns to sound dull", True),
    ),
    "rate": Check(
        lambda limits: (
            f"{limits.min_letters_per_s:g} to {limits.max_letters_per_s:g} letters a second, "
            f"{limits.min_signs_per_s:g} to {limits.max_signs_per_s:g} signs"
        ),
        *(_rate, "the text is not what is spoken: correct it, or leave the items out", True),
    ),
    "outlier": Check(
        lambda limits: (
            f"|z| {limits.outlier_z:g} and {limits.min_outlier_ratio:g} times; at least {limits.min_like_items} items of a language"
        ),
        _outliers,
        "listen to them: the text is not what is spoken, or half of it is missing; `kalle data retranscribe` finds out which",
        True,
    ),
    "script": Check(
        lambda limits: f"{limits.max_foreign_share:.0%} of the letters in another script; no word in two alphabets",
        *(_script, "correct the language or the text; spell foreign words in the language's own script", True),
    ),
    "characters": Check(
        lambda limits: "no markup, control or replacement characters", _characters, "clean the texts: leave only what is spoken", True
    ),
    "duplicate_audio": Check(
        lambda limits: "equal samples, to 16 bits",
        *(_duplicate_audio, "leave the copies out; where the texts differ, listen which one is right", True),
    ),
    "duplicate_text": Check(
        lambda limits: f"{limits.look_repeated_share:.0%} of the items", _duplicate_text, "keep a few takes of each text", False
    ),
    "leakage": Check(
        lambda limits: "none may be",
        *(_leakage, "leave the flagged copies out: a score on a held-out split means nothing otherwise", True),
    ),
    "speakers": Check(
        lambda limits: f"{limits.min_speaker_minutes:g} min each; one of several at most {limits.max_speaker_share:.0%}",
        *(_speakers, "weight the rare speakers up, or name the speakers; a voice of less than a minute is hardly learnt", False),
    ),
}
"""Name -> check, in the order of the report; a flag carries the name of its check."""
REMOVABLE = tuple(name for name in CHECKS if name != "speakers")
REMOVED_BY_DEFAULT = tuple(name for name, check in CHECKS.items() if check.removed)


def examine(items: Sequence[MeasuredItem], limits: QualityLimits) -> list[CheckResult]:
    """One result a check."""
    return [check.run(name, items, limits) for name, check in CHECKS.items()]


def removal_list(text: str) -> tuple[str, ...]:
    """The names in "a,b,c", in the order of the checks; a UserError for a name that flags nothing."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in REMOVABLE:
            raise UserError(f"no check flags '{name}': expected some of {','.join(REMOVABLE)}; correct remove")
    return tuple(name for name in REMOVABLE if name in names)
