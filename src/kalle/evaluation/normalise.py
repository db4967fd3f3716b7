"""Text normalisers for word error rates. Each is part of a protocol: changing one changes the number, so each has a name."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping

from kalle.data.testlist import CJK
from kalle.errors import UserError

Normaliser = Callable[[str, str], list[str]]
"""(text, two-letter language) to tokens."""


def seed_tts(text: str, language: str) -> list[str]:
    """The normaliser of the Seed-TTS test sets: punctuation is deleted, not replaced, and "'" is kept (U+2019 is not).

    English is lower-cased and split at spaces, Chinese split into characters. Numbers are left alone.
    """
    from zhon.hanzi import punctuation

    kept = text.translate({ord(character): None for character in set(punctuation + string.punctuation) - {"'"}})
    kept = kept.replace("  ", " ")
    if language == "zh":
        return [character for character in kept if not character.isspace()]
    return kept.lower().split()


def whisper_english(text: str, language: str) -> list[str]:
    """Whisper's EnglishTextNormalizer for English, its BasicTextNormalizer for other languages, as transformers has them.

    transformers ships the normaliser without Whisper's table of British spellings (it belongs to a checkpoint), so
    "colour" and "color" differ here; contractions, numbers, titles and fillers are unified.
    """
    from transformers.models.whisper.english_normalizer import BasicTextNormalizer, EnglishTextNormalizer

    normaliser = EnglishTextNormalizer({}) if language == "en" else BasicTextNormalizer(split_letters=language == "zh")
    return normaliser(text).split()


def corpus_style(text: str, language: str) -> list[str]:
    """As KALL-E's authors scored: case-insensitive, punctuation becomes a space, CJK per character, Latin per word."""
    return re.findall(rf"[{CJK}]|[^\W_{CJK}]+", text.lower())


NORMALISERS: Mapping[str, Normaliser] = {"seed_tts": seed_tts, "whisper": whisper_english, "kalle_authors": corpus_style}


def normaliser(name: str) -> Normaliser:
    """The normaliser called ``name``; a UserError lists the names there are."""
    if name not in NORMALISERS:
        raise UserError(f"unknown text normaliser: got '{name}', expected one of {', '.join(NORMALISERS)}; correct the configuration")
    return NORMALISERS[name]
