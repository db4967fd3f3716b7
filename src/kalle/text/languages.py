"""The language of a text, guessed from its script."""

from __future__ import annotations

import unicodedata
from collections import Counter
from functools import lru_cache

LANGUAGE_OF_SCRIPT = {
    "CJK": "zh",
    "HIRAGANA": "ja",
    "KATAKANA": "ja",
    "HANGUL": "ko",
    "ARABIC": "ar",
    "ARMENIAN": "hy",
    "BENGALI": "bn",
    "CYRILLIC": "ru",
    "DEVANAGARI": "hi",
    "GEORGIAN": "ka",
    "GREEK": "el",
    "HEBREW": "he",
    "TAMIL": "ta",
    "THAI": "th",
}
"""First word of a character's Unicode name -> ISO 639-1 code of the language most written in it."""
_EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL")
_SHARES_SCRIPT = {
    **dict.fromkeys(("be", "bg", "kk", "ky", "mk", "mn", "tg", "uk"), ("ru",)),
    **dict.fromkeys(("fa", "ps", "ur"), ("ar",)),
    **dict.fromkeys(("mr", "ne", "sa"), ("hi",)),
    **dict.fromkeys(("as",), ("bn",)),
    **dict.fromkeys(("yue",), ("zh",)),
    **dict.fromkeys(("yi",), ("he",)),
    "ja": ("ja", "zh"),  # a text may have no kana
    "sr": ("", "ru"),
    "uz": ("", "ru"),
}
"""Language -> what is guessed of a text in its script, "" being the Latin one, where that is not the language itself."""
SYLLABLE_LETTERS = 3
"""How many letters of an alphabet one ideograph or syllable sign stands for."""
_KANA_SHARE = 0.05


def detect_language(text: str, default: str = "en") -> str:
    """The ISO 639-1 code of the language whose script has most of ``text``; ``default`` for the Latin and every other script.

    An ideograph weighs as much as a few letters. Kana among ideographs make it Japanese.
    """
    weights: Counter[str] = Counter()
    for character, count in Counter(text).items():
        script = script_of(character)
        if script is not None:
            weights[script] += count * (SYLLABLE_LETTERS if script in _EAST_ASIAN else 1)
    kana = weights.pop("HIRAGANA", 0) + weights.pop("KATAKANA", 0)
    if kana and kana >= _KANA_SHARE * weights["CJK"]:
        weights["HIRAGANA"] = kana + weights.pop("CJK", 0)
    if not weights:
        return default
    most = max(weights, key=lambda script: (weights[script], script))
    return LANGUAGE_OF_SCRIPT.get(most, default)


def language_in_its_script(text: str, language: str) -> str | None:
    """``language`` (ISO 639-1) if ``text`` is in a script that it is written in, or has no letters; None leaves the text to be guessed."""
    if not any(script_of(character) for character in text):
        return language
    own = _SHARES_SCRIPT.get(language, (language,) if language in LANGUAGE_OF_SCRIPT.values() else ("",))
    return language if detect_language(text, default="") in own else None


@lru_cache(maxsize=4096)
def script_of(character: str) -> str | None:
    """The script of a letter as the first word of its Unicode name, such as "LATIN"; None for what is no letter."""
    if not unicodedata.category(character).startswith("L"):
        return None
    return unicodedata.name(character, "UNNAMED").split()[0]


def has_words(text: str) -> bool:
    """Whether ``text`` has a letter or a number, in any script."""
    return any(unicodedata.category(character)[0] in "LN" for character in text)
