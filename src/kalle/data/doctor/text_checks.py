"""Checks of the text alone: its script against its language, and characters nobody can speak."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from kalle.data.doctor.findings import Finding, Flag, flagged_finding
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item
from kalle.data.doctor.writing import SCRIPTS_OF_LANGUAGE, mixed_word, odd_characters, script_counts

RARE_CHARACTERS = 40
"""At most so many of the rarest characters are listed."""
_RARE_COUNT = 3


def script(items: Sequence[Item], limits: Limits) -> Finding:
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


def _expected_scripts(items: Sequence[Item], counts: Sequence[Counter[str]]) -> Mapping[str, frozenset[str]]:
    of_language: dict[str, Counter[str]] = {}
    for item, count in zip(items, counts, strict=True):
        of_language.setdefault(item.language, Counter()).update([max(count, key=lambda name: (count[name], name))] if count else [])
    usual = {language: frozenset(name for name, _ in votes.most_common(1)) for language, votes in of_language.items()}
    return {language: SCRIPTS_OF_LANGUAGE.get(_base(language), scripts) for language, scripts in usual.items()}


def _base(language: str) -> str:
    """The language of a tag such as "zh-CN" or "EN_us"."""
    return language.lower().replace("_", "-").split("-")[0]


def _script_reason(item: Item, count: Counter[str], expected: frozenset[str], limits: Limits) -> str:
    letters = count.total()
    foreign = Counter({name: number for name, number in count.items() if name not in expected})
    if letters and foreign.total() / letters > limits.max_foreign_share:
        name = foreign.most_common(1)[0][0].title()
        wanted = " or ".join(sorted(part.title() for part in expected))
        share = foreign.total() / letters
        return f"{share:.0%} of the letters are {name}, expected {wanted} for language '{item.language or 'not given'}'"
    word = mixed_word(item.text)
    return f"the word '{word}' mixes {' and '.join(sorted(name.title() for name in script_counts(word)))} letters" if word else ""


def characters(items: Sequence[Item], limits: Limits) -> Finding:
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
