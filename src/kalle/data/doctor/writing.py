"""What can be read off a text alone: how much there is to speak, its scripts, and characters nobody can speak."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping

from kalle.text.languages import LANGUAGE_OF_SCRIPT, script_of

SIGN_SCRIPTS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL"})
"""Scripts whose characters are about a syllable each and are counted one by one."""
_KANA_AND_HAN = frozenset({"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"})
_LATIN = "ca cs cy da de en es et eu fi fr ga hr hu id is it lt lv ms mt nl no nb nn pl pt ro sk sl sq sv sw tl tr vi"
SCRIPTS_OF_LANGUAGE: Mapping[str, frozenset[str]] = {
    **{language: frozenset({script}) for script, language in LANGUAGE_OF_SCRIPT.items()},
    **dict.fromkeys(_LATIN.split(), frozenset({"LATIN"})),
    **dict.fromkeys(("uk", "be", "bg", "mk", "kk", "ky", "mn"), frozenset({"CYRILLIC"})),
    **dict.fromkeys(("fa", "ur", "ps"), frozenset({"ARABIC"})),
    **dict.fromkeys(("mr", "ne", "sa"), frozenset({"DEVANAGARI"})),
    "sr": frozenset({"CYRILLIC", "LATIN"}),
    "yue": frozenset({"CJK"}),
    "ja": _KANA_AND_HAN,
    "ko": frozenset({"HANGUL", "CJK"}),
}
"""ISO 639 code -> the scripts it is written in."""
MARKUP = re.compile(r"<[^<>\s][^<>]*>|&(?:#\d+|#x[0-9a-f]+|[a-z]+);|https?://|\[[^\]]*\]|\{[^}]*\}", re.IGNORECASE)
MOJIBAKE = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\u00ef\u00bb\u00bf")
"""UTF-8 read as Latin-1 or Windows-1252."""
_UNSPEAKABLE = {"Cc": "control character", "Cn": "unassigned character", "Co": "private character", "Cs": "half a character"}
_INVISIBLE = frozenset("\u200b\u2060\ufeff\u00ad\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_APOSTROPHES = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def letters_and_signs(text: str) -> tuple[int, int]:
    """Numbers of characters that are spoken: letters and digits of alphabets, and signs of syllabic scripts."""
    letters = signs = 0
    for character in text:
        if script_of(character) in SIGN_SCRIPTS:
            signs += 1
        elif unicodedata.category(character)[0] in "LN":
            letters += 1
    return letters, signs


def script_counts(text: str) -> Counter[str]:
    """How many letters of each script ``text`` has."""
    return Counter(script for script in map(script_of, text) if script is not None and script not in ("MODIFIER", "FEMININE", "MASCULINE"))


def mixed_word(text: str) -> str | None:
    """The first word that mixes alphabets, such as a Cyrillic word with a Latin letter that looks alike; None when there is none."""
    for word in _APOSTROPHES.findall(text):
        scripts = set(script_counts(word)) - SIGN_SCRIPTS - _KANA_AND_HAN
        if len(scripts) > 1:
            return str(word)
    return None


def odd_characters(text: str) -> str | None:
    """The first thing in ``text`` that is no speech, in words; None for clean text."""
    for character in text:
        kind = _UNSPEAKABLE.get(unicodedata.category(character))
        if character == "\ufffd":
            kind = "replacement character (a decoding error)"
        elif character in _INVISIBLE:
            kind = "invisible character"
        if kind is not None:
            return f"{kind} U+{ord(character):04X}"
    found = MOJIBAKE.search(text)
    if found:
        return f"{found.group()!r} looks like UTF-8 read as Latin-1"
    found = MARKUP.search(text)
    return f"markup {found.group()!r}" if found else None
