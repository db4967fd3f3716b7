"""The transcript against the text, word by word: kinds of error, lost words, repetitions, early stops, and the length of the text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from difflib import SequenceMatcher
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kalle.evaluation.metrics import Aggregate
from kalle.evaluation.scoring import Estimate, Row, aggregate

Tokens = Callable[[str, str], list[str]]
"""(text, two-letter language) to tokens: one of ``word_errors.NORMALISERS``."""
SHORT_SHARE = 0.5
"""Speech of less than this share of the expected seconds is too short."""
PACED_ITEMS = 5
"""Items that the pace of a system is measured on, at least, where there are no recordings to compare with."""
ALIKE = 0.7
"""Least likeness (difflib's ratio) of the last word to one of the last words heard: recognisers spell, which is not the speaker's doing."""
LAST_WORDS = 3
LONGEST_PHRASE = 8
REPEATED_WORDS = 3
"""So many words more than the text repeats itself make a repetition."""
BINS = ((1, 1), (2, 5), (6, 10), (11, 20), (21, 40), (41, 10**6))
"""First and last number of words of each point of the curve over text length."""
ENDED = ("end", "too_short")
"""Stop reasons of speech that ended by itself."""
RULES = (
    Aggregate("early_stop_rate", "early_stop", lower_is_better=True),
    Aggregate("last_word_missing_rate", "last_word_missing", lower_is_better=True),
    Aggregate("repetition_rate", "repetition", lower_is_better=True),
    Aggregate("insertion_rate", "inserted", "spoken_words", lower_is_better=True),
    Aggregate("deletion_rate", "deleted", "spoken_words", lower_is_better=True),
    Aggregate("substitution_rate", "substituted", "spoken_words", lower_is_better=True),
)
CURVE = Aggregate("wer", "errors", "spoken_words", lower_is_better=True)
JUDGED = ("spoken_words", "inserted", "deleted", "substituted", "last_word_missing", "early_stop", "repetition")
"""The columns of ``judge``."""


@dataclass(frozen=True)
class Edit:
    """One word of the text and what was heard for it: "equal", "substitute", "delete" (nothing heard) or "insert" (no word of the text)."""

    kind: str
    word: str
    heard: str


def alignment(text: Sequence[str], heard: Sequence[str]) -> list[Edit]:
    """The Levenshtein alignment of two token lists, as jiwer finds it; without tokens in ``text`` all is inserted."""
    import jiwer

    if not text:
        return [Edit("insert", "", word) for word in heard]
    edits = []
    for chunk in jiwer.process_words(" ".join(text), " ".join(heard)).alignments[0]:
        words, others = text[chunk.ref_start_idx : chunk.ref_end_idx], heard[chunk.hyp_start_idx : chunk.hyp_end_idx]
        for index in range(max(len(words), len(others))):
            edits.append(Edit(chunk.type, words[index] if words else "", others[index] if others else ""))
    return edits


def row_alignment(row: Mapping[str, Any], tokens: Tokens) -> list[Edit] | None:
    """The alignment of a row's text and transcript; None without a transcript."""
    if "transcript" not in row:
        return None
    language = row.get("language", "en")
    return alignment(tokens(row["text"], language), tokens(row["transcript"], language))


def repeated_words(tokens: Sequence[str]) -> int:
    """Words that say again what stands right before them: the most that one phrase of up to `LONGEST_PHRASE` words gives.

    "go on go on go on" has four: "go on" twice more than once.
    """
    most = 0
    for size in range(1, min(LONGEST_PHRASE, len(tokens) // 2) + 1):
        run = 0
        for index in range(size, len(tokens)):
            run = run + 1 if tokens[index] == tokens[index - size] else 0
            most = max(most, run - run % size)
    return most


def last_word_heard(text: Sequence[str], heard: Sequence[str]) -> bool:
    """Whether the last word of ``text``, or one much like it, is among the last `LAST_WORDS` that were ``heard``."""
    return any(SequenceMatcher(None, text[-1], word).ratio() >= ALIKE for word in heard[-LAST_WORDS:])


def judge(rows: Sequence[Row], tokens: Tokens) -> None:
    """Add to every row with a transcript: ``spoken_words`` of the text, ``inserted``, ``deleted``, ``substituted`` words, and 0 or 1 each:

    ``last_word_missing``, ``repetition`` (stopped as one, or heard as one) and ``early_stop``: ended by itself, and lacks its last word or
    is far too short. The expected seconds are those of the recording where the row compares with one (its ``early_stop`` says so already),
    else the text's characters at the median pace of the row's system. What did not end by itself is no early stop. A text without tokens
    has nothing to judge.
    """
    pace = _paces(rows)
    for row in rows:
        edits = row_alignment(row, tokens)
        text = [edit.word for edit in edits or () if edit.kind != "insert"]
        if edits is None or not text:
            continue
        heard = [edit.heard for edit in edits if edit.kind != "delete"]
        kinds = Counter(edit.kind for edit in edits)
        reason = row.get("stop_reason", ENDED[0])
        missing = not last_word_heard(text, heard)
        short = bool(row.get("early_stop")) or row["audio_s"] < SHORT_SHARE * pace.get(row["system"], 0.0) * len(row["text"])
        row |= {"spoken_words": len(text), "inserted": kinds["insert"], "deleted": kinds["delete"], "substituted": kinds["substitute"]}
        row |= {"last_word_missing": float(missing), "early_stop": float(reason in ENDED and (missing or short))}
        row["repetition"] = float(reason == "repetition" or repeated_words(heard) >= repeated_words(text) + REPEATED_WORDS)


def _paces(rows: Iterable[Row]) -> dict[str, float]:
    """The median seconds for a character of each system with enough items."""
    found: dict[str, list[float]] = {}
    for row in rows:
        if row.get("audio_s") and row["text"]:
            found.setdefault(row["system"], []).append(row["audio_s"] / len(row["text"]))
    return {system: float(np.median(paces)) for system, paces in found.items() if len(paces) >= PACED_ITEMS}


@dataclass(frozen=True)
class LengthPoint:
    """The corpus word error rate of the texts of ``first`` to ``last`` words."""

    first: int
    last: int
    wer: Estimate


def length_curve(rows: Iterable[Mapping[str, Any]]) -> list[LengthPoint]:
    """The word error rate of one system, from the columns of ``judge``, for each of `BINS` that has an item, whose seeds are averaged.

    The last bin ends with the longest text.
    """
    judged = [dict(row) for row in rows if "spoken_words" in row]
    points = []
    for first, last in BINS:
        own = [row for row in judged if first <= row["spoken_words"] <= last]
        if own:
            wer = aggregate([row | {"errors": row["inserted"] + row["deleted"] + row["substituted"]} for row in own], CURVE)
            assert wer is not None, "every row has words"
            points.append(LengthPoint(first, min(last, max(row["spoken_words"] for row in own)), wer))
    return points


@dataclass(frozen=True)
class WordErrorCount:
    """One word of the texts: how often it was to be spoken, how often nothing or another word was heard for it, and which most."""

    word: str
    spoken: int
    deleted: int
    substituted: int
    heard_as: Sequence[tuple[str, int]]


@dataclass(frozen=True)
class WordTable:
    """Errors by word over many rows, those with most errors first, and the words that were heard without being in the text."""

    words: Sequence[WordErrorCount]
    inserted: Sequence[tuple[str, int]]


def word_table(alignments: Iterable[Sequence[Edit]], most: int = 30) -> WordTable:
    """The ``most`` words with the most errors, and the ``most`` words most often inserted."""
    spoken: Counter[str] = Counter()
    deleted: Counter[str] = Counter()
    inserted: Counter[str] = Counter()
    replaced: dict[str, Counter[str]] = {}
    for edit in (edit for edits in alignments for edit in edits):
        if edit.kind == "insert":
            inserted[edit.heard] += 1
            continue
        spoken[edit.word] += 1
        deleted[edit.word] += edit.kind == "delete"
        if edit.kind == "substitute":
            replaced.setdefault(edit.word, Counter())[edit.heard] += 1
    wrong = {word: deleted[word] + replaced.get(word, Counter()).total() for word in spoken}
    order = sorted((word for word in wrong if wrong[word]), key=lambda word: (-wrong[word], word))[:most]
    counts = [
        WordErrorCount(
            word, spoken[word], deleted[word], replaced.get(word, Counter()).total(), replaced.get(word, Counter()).most_common(3)
        )
        for word in order
    ]
    return WordTable(counts, inserted.most_common(most))


def word_facts(rows: Sequence[Row], tokens: Tokens) -> dict[str, dict[str, Any]]:
    """For every system with transcripts, as JSON's types: ``by_length`` (`length_curve`), ``by_word`` and ``inserted`` (`word_table`)."""
    found = {}
    for system in dict.fromkeys(row["system"] for row in rows if "spoken_words" in row):
        own = [row for row in rows if row["system"] == system]
        table = word_table(edits for row in own if (edits := row_alignment(row, tokens)) is not None)
        by_word = [asdict(word) for word in table.words]
        found[system] = {"by_length": [asdict(point) for point in length_curve(own)], "by_word": by_word, "inserted": table.inserted}
    return found


PHONEME_CLASSES: Mapping[str, str] = {
    "stop": "pbtdkɡg",
    "fricative": "fvθðszʃʒh",
    "affricate": "ʧʤ",
    "nasal": "mnŋ",
    "approximant": "lɹrwj",
    "short vowel": "ɪɛæʌʊəɐᵊᵻ",
    "long vowel": "iuɑɔɜ",
    "diphthong": "AIOWYQ",
}
"""Symbols of the phoneme front end (misaki's alphabet, in which a diphthong is one capital) by class of sound."""


def sound_classes(alignments: Iterable[Sequence[Edit]], phonemes: Callable[[str], str | None]) -> list[tuple[str, int, int]]:
    """For each of `PHONEME_CLASSES` (name, words that hold such a sound, those of them with an error); ``phonemes`` reads a word.

    Words that ``phonemes`` does not know are left out.
    """
    said, wrong, known = Counter[str](), Counter[str](), dict[str, str]()
    for edit in (edit for edits in alignments for edit in edits if edit.kind != "insert"):
        if edit.word not in known:
            known[edit.word] = phonemes(edit.word) or ""
        classes = [name for name, symbols in PHONEME_CLASSES.items() if set(symbols) & set(known[edit.word])]
        said.update(classes)
        wrong.update(classes if edit.kind != "equal" else ())
    return [(name, said[name], wrong[name]) for name in PHONEME_CLASSES if said[name]]


NOTHING = "nothing"
"""The sound that stands for none: heard where a sound is lost, said where one is added."""


def sound_confusions(alignments: Iterable[Sequence[Edit]], phonemes: Callable[[str], str | None]) -> tuple[list[str], NDArray[np.int64]]:
    """Counts (heard, said) of sounds by class, and the names of rows and columns alike: of `PHONEME_CLASSES`, then `NOTHING`.

    The phonemes of a word and of what was heard for it are aligned once more, so that "boat" heard as "coat" is a stop heard as a stop and
    two sounds that are right. ``phonemes`` reads a word of either; words that it does not know are left out.
    """
    names = [*PHONEME_CLASSES, NOTHING]
    class_of = {symbol: index for index, symbols in enumerate(PHONEME_CLASSES.values()) for symbol in symbols}
    lost = len(PHONEME_CLASSES)
    counts, known = np.zeros((len(names), len(names)), dtype=np.int64), dict[str, list[str]]()

    def sounds(word: str) -> list[str]:
        if word not in known:
            known[word] = [symbol for symbol in phonemes(word) or "" if symbol in class_of]
        return known[word]

    for edit in (edit for edits in alignments for edit in edits):
        said, heard = (sounds(word) if word else [] for word in (edit.word, edit.heard))
        if (edit.word and not said) or (edit.heard and not heard):
            continue
        for sound in alignment(said, heard):
            counts[class_of.get(sound.heard, lost), class_of.get(sound.word, lost)] += 1
    return names, counts
