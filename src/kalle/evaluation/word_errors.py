"""Word error rates: the normalisers that protocols name, the count of errors, and the metric."""

from __future__ import annotations

import functools
import importlib.util
import re
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from kalle.errors import UserError
from kalle.evaluation.asr import Transcriber, recogniser, transcripts
from kalle.evaluation.metrics import TEXT, MetricError, ScoreItem, Value, declared
from kalle.evaluation.test_list import CJK
from kalle.extras import require

Normaliser = Callable[[str, str], list[str]]
"""(text, two-letter language) to tokens."""


def seed_tts(text: str, language: str) -> list[str]:
    """The normaliser of the Seed-TTS test sets: punctuation is deleted, not replaced, and "'" is kept (U+2019 is not).

    English is lower-cased and split at spaces, Chinese split into characters. Numbers are left alone.
    """
    kept = text.translate(_deleted()).replace("  ", " ")
    if language == "zh":
        return [character for character in kept if not character.isspace()]
    return kept.lower().split()


@functools.cache
def _deleted() -> dict[int, None]:
    from zhon.hanzi import punctuation

    return {ord(character): None for character in set(punctuation + string.punctuation) - {"'"}}


def whisper_english(text: str, language: str) -> list[str]:
    """Whisper's EnglishTextNormalizer for English, its BasicTextNormalizer for other languages, as whisper-normalizer packages them.

    British spellings ("colour"), contractions, numbers, titles and fillers are unified. transformers ships the code without the table
    of spellings.
    """
    return _whisper(language)(text).split()


@functools.cache
def _whisper(language: str) -> Callable[[str], str]:
    require("whisper_normalizer", "eval", "the normaliser whisper (metrics.wer.normalisers)")
    from whisper_normalizer.basic import BasicTextNormalizer
    from whisper_normalizer.english import EnglishTextNormalizer

    return EnglishTextNormalizer() if language == "en" else BasicTextNormalizer(split_letters=language == "zh")


def corpus_style(text: str, language: str) -> list[str]:
    """As KALL-E's authors scored: case-insensitive, punctuation becomes a space, CJK per character, Latin per word."""
    return re.findall(rf"[{CJK}]|[^\W_{CJK}]+", text.lower())


NORMALISERS: Mapping[str, Normaliser] = {"seed_tts": seed_tts, "whisper": whisper_english, "kalle_authors": corpus_style}


def normaliser(name: str) -> Normaliser:
    """The normaliser called ``name``; a UserError lists the names there are."""
    if name not in NORMALISERS:
        raise UserError(f"unknown text normaliser: got '{name}', expected one of {', '.join(NORMALISERS)}; correct the configuration")
    return NORMALISERS[name]


@dataclass(frozen=True)
class WordErrors:
    """Substitutions, deletions and insertions of one hypothesis against ``words`` reference tokens."""

    errors: int
    words: int

    @property
    def rate(self) -> float:
        """Errors per reference token; can exceed 1."""
        return self.errors / self.words


def word_errors(reference: Sequence[str], hypothesis: Sequence[str]) -> WordErrors:
    """Levenshtein errors between token lists, as ``jiwer.process_words`` counts them. MetricError for an empty reference."""
    import jiwer

    if not reference:
        raise MetricError("the text is empty after normalisation")
    counts = jiwer.process_words(" ".join(reference), " ".join(hypothesis))
    return WordErrors(counts.substitutions + counts.deletions + counts.insertions, len(reference))


def one_script(text: str, language: str) -> str:
    """``text``, Chinese in simplified characters: converted by script, which leaves the words what they are."""
    if language not in ("zh", "yue"):
        return text
    require_zhconv()
    import zhconv

    return str(zhconv.convert(text, "zh-hans"))


def in_one_script(reference: str, transcript: str) -> tuple[str, str]:
    """Both texts of Chinese in simplified characters: the transcript as the protocol has it, words of the mainland in place of others.

    A traditional reference is converted too, and then both by script alone, for the words are its own.
    """
    converted = one_script(reference, "zh")
    if converted != reference:
        return converted, one_script(transcript, "zh")
    import zhconv

    return reference, str(zhconv.convert(transcript, "zh-cn"))


def require_zhconv() -> None:
    """A UserError where zhconv is missing."""
    if importlib.util.find_spec("zhconv") is None:
        raise UserError("WER of Chinese needs the package zhconv, which is not installed: run pip install zhconv (GPL: no extra brings it)")


class WER:
    """Word error rate of a transcript under one or more named normalisers; the first gives the unsuffixed columns.

    Two means each, because the field uses both: ``wer_utt_mean`` is the mean of per-utterance rates (official for the Seed-TTS
    test sets), ``wer_corpus`` total errors over total reference tokens. Give a ``transcriber``, or what ``recogniser`` takes.
    """

    name = "wer"
    needs = frozenset({TEXT})

    def __init__(
        self,
        transcriber: Transcriber | None = None,
        normalisers: Iterable[str] = ("seed_tts", "whisper"),
        languages: Iterable[str] = ("en",),
        **asr: object,
    ) -> None:
        """``languages`` are those of the list, for the recogniser to speak; what a language needs is looked for here."""
        self.normalisers = {name: normaliser(name) for name in normalisers}
        if not self.normalisers:
            raise UserError("wer: got no normaliser, expected at least one; set normalisers: [seed_tts]")
        languages = tuple(languages)
        if "zh" in languages:
            require_zhconv()
        if "whisper" in self.normalisers:
            _whisper("en")
        self.transcriber = transcriber if transcriber is not None else recogniser(languages=languages, **asr)  # type: ignore[arg-type]
        rules = []
        for suffix in self._suffixes():
            rules.append(declared("wer_utt_mean", "wer", suffix=suffix))
            rules.append(declared("wer_corpus", "wer_errors", "wer_words", suffix=suffix))
        self.aggregates = tuple(rules)

    def _suffixes(self) -> list[str]:
        return ["" if index == 0 else f"_{name}" for index, name in enumerate(self.normalisers)]

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """Transcript, and rate, errors and words under every normaliser.

        MetricError where a normaliser leaves nothing of the text; it keeps the columns of the others.
        """
        (result,) = self.batch([item])
        if isinstance(result, MetricError):
            raise result
        return dict(result)

    def batch(self, items: Sequence[ScoreItem]) -> list[Mapping[str, Value] | MetricError]:
        """The same for several items, whose audio of one language is transcribed at once where the recogniser can."""
        return [self._count(item, transcript) for item, transcript in zip(items, transcripts(self.transcriber, items), strict=True)]

    def _count(self, item: ScoreItem, transcript: str) -> Mapping[str, Value] | MetricError:
        text = item.text
        if item.language == "zh":
            text, transcript = in_one_script(text, transcript)
        columns: dict[str, Value] = {"transcript": transcript}
        empty = []
        for suffix, (name, tokens) in zip(self._suffixes(), self.normalisers.items(), strict=True):
            reference = tokens(text, item.language)
            if not any(character.isalnum() for token in reference for character in token):
                empty.append(name)
                continue
            counts = word_errors(reference, tokens(transcript, item.language))
            columns |= {f"wer{suffix}": counts.rate, f"wer_errors{suffix}": counts.errors, f"wer_words{suffix}": counts.words}
        return MetricError(f"the text is empty after normalisation: {', '.join(empty)}", columns) if empty else columns

    def describe(self) -> Mapping[str, object]:
        """Normalisers, first the unsuffixed one, and the recogniser."""
        return {"normalisers": list(self.normalisers), **self.transcriber.describe()}
