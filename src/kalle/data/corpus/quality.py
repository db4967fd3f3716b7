"""The checks of a prepared corpus as one table: name, threshold, function, remedy."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalle.data.corpus.measures import (
    SCRIPTS_OF_LANGUAGE,
    MeasuredItem,
    Measures,
    letters_and_signs,
    mixed_word,
    odd_characters,
    script_counts,
)
from kalle.data.corpus.splits import normalised
from kalle.errors import UserError
from kalle.text.languages import SYLLABLE_LETTERS


@dataclass(frozen=True)
class Limits:
    """From where on an item is flagged, and from which share of flagged items on a corpus is worth a look, or bad."""

    look_share: float = 0.001
    """Share of flagged items above which a check says "look"; below it a large corpus is as good as corpora get."""
    bad_share: float = 0.05
    """Share of flagged items above which a check says "bad"."""
    min_seconds: float = 0.3
    max_seconds: float = 30.0
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


def limits_from(settings: list[str]) -> Limits:
    """`Limits` with ``NAME=NUMBER`` settings applied; a UserError lists the names there are."""
    defaults = {field.name: getattr(Limits(), field.name) for field in fields(Limits)}
    changed: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in defaults:
            raise UserError(f"unknown limit: got '{setting}', expected NAME=NUMBER with one of {', '.join(defaults)}")
        try:
            changed[name] = type(defaults[name])(value)
        except ValueError:
            raise UserError(f"bad limit: got '{setting}', expected {name}=NUMBER, such as {name}={defaults[name]}") from None
    return Limits(**changed)


GOOD, LOOK, BAD = "good", "look", "bad"
VERDICTS = (GOOD, LOOK, BAD)
"""From best to worst."""


@dataclass(frozen=True)
class Flag:
    """One item that a check objects to, and why."""

    check: str
    split: str
    id: str
    reason: str

    @property
    def key(self) -> tuple[str, str]:
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


Check = Callable[[Sequence[MeasuredItem], Limits], CheckResult]


def share_verdict(flagged: int, total: int, limits: Limits) -> str:
    """The verdict for ``flagged`` of ``total`` items."""
    share = flagged / max(total, 1)
    if share <= limits.look_share:
        return GOOD
    return LOOK if share <= limits.bad_share else BAD


def worst(verdicts: Sequence[str]) -> str:
    """The worst of the verdicts; good for none."""
    return max(verdicts, key=VERDICTS.index, default=GOOD)


def flagged_finding(
    check: str, items: Sequence[MeasuredItem], flags: list[Flag], limits: Limits, threshold: str, remedy: str, numbers: dict[str, Any]
) -> CheckResult:
    """A finding whose verdict follows from the share of flagged items."""
    verdict = share_verdict(len({flag.key for flag in flags}), len(items), limits)
    summary = f"{len({flag.key for flag in flags})} of {len(items)} items"
    return CheckResult(check, verdict, summary, threshold, remedy if flags else "", flags, numbers)


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Minimum, 5, 50 and 95 % points, and maximum; empty for no values."""
    import numpy as np

    if not len(values):
        return {}
    points = np.percentile(np.asarray(values, dtype=np.float64), [0, 5, 50, 95, 100])
    return {name: round(float(point), digits) for name, point in zip(("min", "p5", "median", "p95", "max"), points, strict=True)}


def readable(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Audio that cannot be decoded, or holds no numbers."""
    flags = [Flag("unreadable", *item.key, item.sound.problem) for item in items if item.sound.problem]
    remedy = "fetch or convert these files again, or leave the items out"
    return flagged_finding("unreadable", items, flags, limits, "none may be", remedy, {})


def duration(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Items that are too short to hold speech or too long for a batch."""
    flags = []
    for item in heard(items):
        if not limits.min_seconds <= item.sound.seconds <= limits.max_seconds:
            flags.append(Flag("duration", *item.key, f"{item.sound.seconds:.2f} s long"))
    seconds = [item.sound.seconds for item in heard(items)]
    numbers = {"hours": round(sum(seconds) / 3600, 4), "seconds": spread(seconds)}
    threshold = f"{limits.min_seconds:g} to {limits.max_seconds:g} s"
    return flagged_finding("duration", items, flags, limits, threshold, "cut long items at pauses; drop those without speech", numbers)


def loudness(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Items far from the corpus' usual loudness, or beyond what anybody records on purpose."""
    levels = [item.sound.loudness_lufs for item in heard(items) if item.sound.loudness_lufs is not None]
    median = float(np.median(levels)) if levels else 0.0
    flags = []
    for item in heard(items):
        level = item.sound.loudness_lufs
        if level is None:
            flags.append(Flag("loudness", *item.key, "silent"))
        elif not limits.min_loudness_lufs <= level <= limits.max_loudness_lufs:
            flags.append(Flag("loudness", *item.key, f"{level:.1f} LUFS"))
        elif abs(level - median) > limits.max_loudness_offset_db:
            flags.append(Flag("loudness", *item.key, f"{level:.1f} LUFS, {level - median:+.1f} dB from the median"))
    threshold = (
        f"{limits.min_loudness_lufs:g} to {limits.max_loudness_lufs:g} LUFS, within {limits.max_loudness_offset_db:g} dB of the median"
    )
    remedy = "bring the items to one loudness; drop silent ones"
    return flagged_finding("loudness", items, flags, limits, threshold, remedy, {"lufs": spread(levels, 1)})


def silences(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Long silence before, after or inside the speech."""
    flags = [Flag("silence", *item.key, reason) for item in heard(items) if (reason := _silence_reason(item.sound, limits))]
    numbers = {
        "leading_s": spread([item.sound.leading_s for item in heard(items)]),
        "trailing_s": spread([item.sound.trailing_s for item in heard(items)]),
        "longest_pause_s": spread([item.sound.pause_s for item in heard(items)]),
        "inner_share": spread([item.sound.inner_silence_share for item in heard(items)]),
    }
    threshold = (
        f"leading {limits.max_leading_s:g} s, trailing {limits.max_trailing_s:g} s, pause {limits.max_pause_s:g} s, "
        f"inside {limits.max_inner_silence_share:.0%}"
    )
    remedy = "trim the ends; cut items at long pauses: a model learns them as part of the text"
    return flagged_finding("silence", items, flags, limits, threshold, remedy, numbers)


def _silence_reason(sound: Measures, limits: Limits) -> str:
    """Why the silences of an item are too long; empty when they are not."""
    said = [
        (sound.leading_s, limits.max_leading_s, f"{sound.leading_s:.2f} s of leading silence"),
        (sound.trailing_s, limits.max_trailing_s, f"{sound.trailing_s:.2f} s of trailing silence"),
        (sound.pause_s, limits.max_pause_s, f"a pause of {sound.pause_s:.2f} s"),
        (sound.inner_silence_share, limits.max_inner_silence_share, f"{sound.inner_silence_share:.0%} silence inside"),
    ]
    return ", ".join(words for value, limit, words in said if value > limit)


def clipping(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Waveforms that were cut off."""
    flags = []
    for item in heard(items):
        if item.sound.clipped_share > limits.max_clipped_share:
            flags.append(Flag("clipping", *item.key, f"{item.sound.clipped_share:.2%} of the samples in flat tops"))
    numbers = {"clipped_share": spread([item.sound.clipped_share for item in heard(items)], 6)}
    remedy = "use a take with more headroom, or leave the items out: clipping cannot be undone"
    return flagged_finding("clipping", items, flags, limits, f"{limits.max_clipped_share:.2%} of the samples", remedy, numbers)


def bandwidth(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Audio with less bandwidth than its sample rate promises: upsampled telephone speech, low-rate MP3."""
    flags = []
    for item in heard(items):
        if item.sound.bandwidth_hz < limits.min_bandwidth_share * item.sample_rate_hz / 2:
            reason = f"nothing above {item.sound.bandwidth_hz / 1000:.2f} kHz in audio of {item.sample_rate_hz / 1000:g} kHz"
            flags.append(Flag("bandwidth", *item.key, reason))
    kilohertz = Counter(round(item.sound.bandwidth_hz / 1000) for item in heard(items))
    numbers = {
        "bandwidth_hz": spread([item.sound.bandwidth_hz for item in heard(items)], 0),
        "items_by_khz": {str(band): kilohertz[band] for band in sorted(kilohertz)},
    }
    threshold = f"{limits.min_bandwidth_share:.0%} of half the sample rate"
    remedy = "fetch the recordings at their full rate, or leave the items out: the model learns to sound dull"
    return flagged_finding("bandwidth", items, flags, limits, threshold, remedy, numbers)


def heard(items: Sequence[MeasuredItem]) -> list[MeasuredItem]:
    """The items whose audio could be read."""
    return [item for item in items if not item.sound.problem]


_MAD_TO_SIGMA = 1.4826
_LEAST_SIGMA = 0.05
_ITEMS_PER_BIN = 50
_MOST_BINS = 12


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


def rate(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """A speaking rate that no speaker reaches, or that means text is missing."""
    flags, rates = [], {"letters": list[float](), "signs": list[float]()}
    for item in _spoken(items):
        value, unit = pace(item)
        rates[unit].append(value)
        least, most = _rate_limits(unit, limits)
        if not least <= value <= most:
            flags.append(Flag("rate", *item.key, f"{value:.1f} {unit} a second"))
    numbers = {f"{unit}_per_s": spread(values, 2) for unit, values in rates.items() if values}
    bounds = {unit: _rate_limits(unit, limits) for unit in rates if rates[unit]}
    threshold = " and ".join(f"{least:g} to {most:g} {unit} a second" for unit, (least, most) in bounds.items())
    remedy = "the text is not what is spoken: correct it, or leave the items out"
    return flagged_finding("rate", items, flags, limits, threshold or "no text", remedy, numbers)


def _rate_limits(unit: str, limits: Limits) -> tuple[float, float]:
    if unit == "signs":
        return limits.min_signs_per_s, limits.max_signs_per_s
    return limits.min_letters_per_s, limits.max_letters_per_s


def outliers(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Items much faster or slower than others of their language and length: swapped, cut or wrong texts."""
    flags, judged = [], 0
    by_language: dict[str, list[MeasuredItem]] = {}
    for item in _spoken(items):
        by_language.setdefault(item.language, []).append(item)
    for group in by_language.values():
        if len(group) < limits.min_like_items:
            continue
        judged += len(group)
        score, ratio = scores(group)
        for item, z, times in zip(group, score, ratio, strict=True):
            if abs(z) > limits.outlier_z and max(times, 1 / times) > limits.min_outlier_ratio:
                words = f"{times:.1f} times as fast" if times > 1 else f"{1 / times:.1f} times as slow"
                flags.append(Flag("outlier", *item.key, f"{words} as others of its length (z {z:+.1f})"))
    threshold = f"|z| {limits.outlier_z:g} and {limits.min_outlier_ratio:g} times; at least {limits.min_like_items} items of a language"
    remedy = "listen to them: the text is not what is spoken, or half of it is missing; `kalle data retranscribe` finds out which"
    return flagged_finding("outlier", items, flags, limits, threshold, remedy, {"items_judged": judged})


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
    return [item for item in heard(items) if amount(item.text) > 0]


RARE_CHARACTERS = 40
"""At most so many of the rarest characters are listed."""
_RARE_COUNT = 3


def script(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Text in a script that its language is not written in, and words that mix alphabets.

    A language that isn't in `SCRIPTS_OF_LANGUAGE`, or none, is expected in the script most of its own items use.
    """
    counts = [script_counts(item.text) for item in items]
    expected = _expected_scripts(items, counts)
    flags, total = [], Counter[str]()
    for item, count in zip(items, counts, strict=True):
        total.update(count)
        reason = _script_reason(item, count, expected[item.language], limits)
        if reason:
            flags.append(Flag("script", *item.key, reason))
    numbers = {
        "letters_by_script": dict(total.most_common()),
        "items_by_language": dict(Counter(item.language or "(not given)" for item in items)),
    }
    threshold = f"{limits.max_foreign_share:.0%} of the letters in another script; no word in two alphabets"
    remedy = "correct the language or the text; spell foreign words in the language's own script"
    return flagged_finding("script", items, flags, limits, threshold, remedy, numbers)


def _expected_scripts(items: Sequence[MeasuredItem], counts: Sequence[Counter[str]]) -> Mapping[str, frozenset[str]]:
    of_language: dict[str, Counter[str]] = {}
    for item, count in zip(items, counts, strict=True):
        of_language.setdefault(item.language, Counter()).update([max(count, key=lambda name: (count[name], name))] if count else [])
    usual = {language: frozenset(name for name, _ in votes.most_common(1)) for language, votes in of_language.items()}
    return {language: SCRIPTS_OF_LANGUAGE.get(_base(language), scripts) for language, scripts in usual.items()}


def _base(language: str) -> str:
    """The language of a tag such as "zh-CN" or "EN_us"."""
    return language.lower().replace("_", "-").split("-")[0]


def _script_reason(item: MeasuredItem, count: Counter[str], expected: frozenset[str], limits: Limits) -> str:
    letters = count.total()
    foreign = Counter({name: number for name, number in count.items() if name not in expected})
    if letters and foreign.total() / letters > limits.max_foreign_share:
        name = foreign.most_common(1)[0][0].title()
        wanted = " or ".join(sorted(part.title() for part in expected))
        share = foreign.total() / letters
        return f"{share:.0%} of the letters are {name}, expected {wanted} for language '{item.language or 'not given'}'"
    word = mixed_word(item.text)
    return f"the word '{word}' mixes {' and '.join(sorted(name.title() for name in script_counts(word)))} letters" if word else ""


def characters(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Empty texts, control and replacement characters, markup, text that was decoded wrongly; and the rarest characters, listed only.

    The tokenizers here are byte-level, so no character is unknown to them; a rare one is merely seldom trained.
    """
    flags, every = [], Counter[str]()
    for item in items:
        every.update(item.text)
        reason = odd_characters(item.text) if item.text.strip() else "no text"
        if reason:
            flags.append(Flag("characters", *item.key, reason))
    rare = sorted((count, character) for character, count in every.items() if count <= _RARE_COUNT and not character.isspace())
    numbers = {
        "distinct": len(every),
        "with_digits": sum(any(character.isdigit() for character in item.text) for item in items),
        "rare": {character: count for count, character in rare[:RARE_CHARACTERS]},
    }
    remedy = "clean the texts: leave only what is spoken"
    return flagged_finding("characters", items, flags, limits, "no markup, control or replacement characters", remedy, numbers)


_HELD_OUT_FIRST = {"test": 0, "valid": 1, "train": 3}


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


def same_audio(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Items whose decoded samples are equal; every one but the first of a group is flagged."""
    flags = []
    for first, *rest in _copies(heard(items), lambda item: item.sound.digest):
        for item in rest:
            also = "" if normalised(item.text) == normalised(first.text) else ", with another text"
            flags.append(Flag("duplicate_audio", *item.key, f"the audio of {first.split} '{first.id}'{also}"))
    remedy = "leave the copies out; where the texts differ, listen which one is right"
    return flagged_finding("duplicate_audio", items, flags, limits, "equal samples, to 16 bits", remedy, {})


def same_text(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Texts that one speaker says more than once: no fault, but little is learnt from many of them."""
    flags = []
    for first, *rest in _copies(items, lambda item: normalised(item.text) and (item.speaker, normalised(item.text))):
        flags += [Flag("duplicate_text", *item.key, f"the text of {first.split} '{first.id}', same speaker") for item in rest]
    share = len(flags) / max(len(items), 1)
    numbers = {"distinct_texts": len({normalised(item.text) for item in items}), "repeated_share": round(share, 4)}
    verdict = LOOK if share > limits.look_repeated_share else GOOD
    remedy = "keep a few takes of each text" if verdict == LOOK else ""
    threshold = f"{limits.look_repeated_share:.0%} of the items"
    return CheckResult("duplicate_text", verdict, f"{len(flags)} of {len(items)} items", threshold, remedy, flags, numbers)


def leakage(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """A text or an audio in two splits; the copy outside the held-out split is flagged, test before valid before train."""
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    keys: dict[str, Callable[[MeasuredItem], object]] = {
        "text": lambda item: normalised(item.text),
        "audio": lambda item: item.sound.digest,
    }
    for what, key in keys.items():
        for group in _copies(items, key):
            first = group[0]
            for item in group:
                if _rank(item) != _rank(first) or item.split != first.split:
                    reasons[item.key].append(f"its {what} is also {first.split} '{first.id}'")
    flags = [Flag("leakage", *key, "; ".join(said)) for key, said in reasons.items()]
    summary = f"{len(flags)} of {len(items)} items"
    remedy = "leave the flagged copies out: a score on a held-out split means nothing otherwise" if flags else ""
    return CheckResult("leakage", BAD if flags else GOOD, summary, "none may be", remedy, flags, {})


LISTED_SPEAKERS = 30


def speakers(items: Sequence[MeasuredItem], limits: Limits) -> CheckResult:
    """Minutes of each speaker; no item is flagged, for no item is at fault."""
    seconds: Counter[str] = Counter()
    for item in heard(items):
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
    threshold = f"{limits.min_speaker_minutes:g} min each; one of several at most {limits.max_speaker_share:.0%}"
    summary = f"{len(seconds)} speakers" + "".join(f"; {problem}" for problem in problems)
    remedy = "weight the rare speakers up, or name the speakers; a voice of less than a minute is hardly learnt" if problems else ""
    return CheckResult("speakers", LOOK if problems else GOOD, summary, threshold, remedy, [], numbers)


CHECKS: Mapping[str, Check] = {
    "unreadable": readable,
    "duration": duration,
    "loudness": loudness,
    "silence": silences,
    "clipping": clipping,
    "bandwidth": bandwidth,
    "rate": rate,
    "outlier": outliers,
    "script": script,
    "characters": characters,
    "duplicate_audio": same_audio,
    "duplicate_text": same_text,
    "leakage": leakage,
    "speakers": speakers,
}
"""Name -> check, in the order of the report; a flag carries the name of its check."""
REMOVABLE = tuple(name for name in CHECKS if name != "speakers")
REMOVED_BY_DEFAULT = (
    "unreadable",
    "silence",
    "clipping",
    "bandwidth",
    "rate",
    "outlier",
    "script",
    "characters",
    "duplicate_audio",
    "leakage",
)
"""Checks that find wrong items. Unusual length, loudness or repetition is no error, or can be repaired."""


def examine(items: Sequence[MeasuredItem], limits: Limits) -> list[CheckResult]:
    """One finding a check."""
    return [check(items, limits) for check in CHECKS.values()]


def removal_list(text: str) -> tuple[str, ...]:
    """The names in "a,b,c", in the order of the checks; a UserError for a name that flags nothing."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in REMOVABLE:
            raise UserError(f"no check flags '{name}': expected some of {','.join(REMOVABLE)}; correct --remove")
    return tuple(name for name in REMOVABLE if name in names)
