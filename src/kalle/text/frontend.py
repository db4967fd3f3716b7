"""The spoken form of a text: numbers in words, and characters that weights never learnt written in those they did, or named.

A byte or a token that no training text held makes a small model babble, so a weight folder says which characters each of its languages had
(`LearntTexts`, the key ``text`` of config.json), and every text is brought into them before it is spoken.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from kalle.errors import UserError
from kalle.text.languages import LANGUAGE_OF_SCRIPT, detect_language, script_of
from kalle.text.normalise import LANGUAGES, normalise

GIVEN_PHONEMES = re.compile(r"\[([^\[\]]+)\]\(/([^()]*)/\)")
"""A word and its phonemes, as weights with a phoneme front end read them (`kalle.text.phonemes`)."""
LEARNT_TEXTS = 20
LEARNT_SHARE = 1e-4
"""A character counts as learnt when so many training texts hold it, and such a share of them."""
_MOST_NAMED = 20
_HEADLINE_WORDS = 4
_SMALL_IN_HEADLINES = re.compile("an?|the|and|n?or|but|of|to|in|on|at|by|for|from|with|as|is|are|into|over|up|vs")

_REPLACED = {
    '"“”„‟«»″〝〞': ('"', ""),
    "‹›「」『』": ('"', ""),
    "’ʼ′´`＇": ("'", ""),
    "‘‚‛": ("'", ""),
    "—–―‒⸺": (", ", " "),
    "‐‑−﹣－": ("-", " "),
    "…⋯": ("...", ". "),
    "()[]{}（）【】〔〕": (", ", " "),
    ";；": (";", ",", " "),
    ":：": (":", ",", " "),
    "-": ("-", " "),
    "，、،": (",", " "),
    "。．": (".", " "),
    "？¿؟": ("?", "."),
    "！¡": ("!", "."),
    "!": ("!", "."),
    "?": ("?", "."),
    "·•●▪‣◦|¦": (", ", " "),
    "*_~^\\/<>#=+@&%$£€¥©®™§°×÷": (" ",),
}
"""Characters and what stands for them, best first; "" and a space always can, and a comma brings its space only where it is learnt."""
_CANDIDATES = {character: candidates for characters, candidates in _REPLACED.items() for character in characters}
_LETTERS = {"ß": "ss", "æ": "ae", "œ": "oe", "ø": "o", "ł": "l", "đ": "d", "ð": "d", "þ": "th", "ı": "i", "ħ": "h", "ŋ": "ng"}
"""Latin letters that do not decompose."""
_ENGLISH = {
    "&": "and", "%": "percent", "+": "plus", "=": "equals", "@": "at", "#": "number", "°": "degrees", "§": "section", "×": "times",
    "÷": "divided by", "$": "dollars", "£": "pounds", "€": "euros", "¥": "yen",
}  # fmt: skip
_NO_SOUND = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufe00-\ufe0f\ufeff]")
_MARKUP = (
    (re.compile(r"<!--.*?-->|</?[A-Za-z][\w-]*(?:\s+[\w:-]+\s*=\s*(?:\"[^\"]*\"|'[^']*'|[^\s\"'<>]+))*\s*/?>", re.DOTALL), " "),
    (re.compile(r"!?\[([^\[\]]*)\]\((?!/[^()]*/\))[^()]*\)"), r"\1"),
    (re.compile(r"^[ \t]*(?:[-*_=][ \t]*){3,}$|^[ \t]{0,3}(?:#{1,6}|>)[ \t]+", re.MULTILINE), ""),
    (re.compile(r"^[ \t]*(?:[-*+•]|\d+[.)])[ \t]+(?=\S)", re.MULTILINE), ", "),
    (re.compile(r"(?<=\w)\s*\n\s*\n"), ". "),
    (re.compile(r"‘([^‘’]*(?:’\w[^‘’]*)*)’(?!\w)"), r"\1"),
    (re.compile(r"(?<!\w)(\*{1,3}|_{1,3}|~~|`{1,3})(?=\S)(.+?)(?<=\S)\1(?!\w)", re.DOTALL), r"\2"),
)
"""HTML tags, links, rules and headings, items of lists, ends of paragraphs, quotes that look like apostrophes, emphasis."""
_DASH = re.compile(r"\s*(?:--+|[—–―⸺])\s*|\s+[-‒]\s+")
_TIDY = (
    (re.compile(r"\s+"), " "),
    (re.compile(r" +(?=[,.;:!?])"), ""),
    (re.compile(r",(?:\s*,)+"), ","),
    (re.compile(r"([.;:!?])\s*,"), r"\1"),
    (re.compile(r",\s*(?=[.;:!?])"), ""),
    (re.compile(r"^(?:[\s,]|[-*+>](?=\s))+|[\s,]+$"), ""),
)


@dataclass(frozen=True)
class LearntTexts:
    """The characters of the texts that weights were trained on."""

    characters: Mapping[str, str | None] = field(default_factory=dict)
    """By language (ISO 639-1) the characters that its texts held; None for all that anybody writes. Empty where nothing is known."""
    capital_words: bool = True
    """Whether words in capitals alone were among them."""
    replace: Mapping[str, str] = field(default_factory=dict)
    """Characters that are written in another way than the table here would."""

    def __post_init__(self) -> None:
        for language, characters in self.characters.items():
            if not (language.isascii() and language.isalpha() and 2 <= len(language) <= 3):
                raise UserError(f"characters: got the language {language!r}, expected ISO 639 codes such as en")
            if characters is not None and not isinstance(characters, str):
                raise UserError(f"characters.{language}: got {characters!r}, expected a string of characters or null")
        if not all(len(key) == 1 and isinstance(value, str) for key, value in self.replace.items()):
            raise UserError(f"replace: got {dict(self.replace)!r}, expected a text for single characters")

    @property
    def languages(self) -> tuple[str, ...]:
        """Codes of the languages; empty where nothing is known."""
        return tuple(self.characters)

    def merged(self) -> LearntTexts:
        """The same without a difference between languages: all characters are those of the first one."""
        known = self.of("")
        return self if known is None else LearntTexts({self.languages[0]: "".join(sorted(known))}, self.capital_words, self.replace)

    def of(self, language: str) -> frozenset[str] | None:
        """The characters of ``language``; for another language those of all, and None where all may come."""
        known = [self.characters[language]] if language in self.characters else list(self.characters.values())
        if not known or any(characters is None for characters in known):
            return None
        return frozenset("".join(str(characters) for characters in known)) | {" "}


@dataclass(frozen=True)
class MappedText:
    """A text in the characters that the weights learnt."""

    text: str
    warnings: tuple[str, ...] = ()
    """Characters that were not trained and have no replacement, one line each."""


def check_language(language: str | None, learnt: LearntTexts) -> None:
    """A UserError when ``language`` (ISO 639-1) is not among those of the weights."""
    if language is not None and learnt.languages and language.lower() not in learnt.languages:
        raise UserError(
            f"these weights do not speak '{language}': expected {' or '.join(learnt.languages)}; choose one of them, or other weights"
        )


def map_characters(text: str, learnt: LearntTexts, language: str | None = None, *, given_phonemes: bool = False) -> MappedText:
    """``text`` on one line in the characters that the weights learnt.

    ``language`` is an ISO 639-1 code, by default guessed from the script. Quotes, dashes, brackets, other spaces, line breaks, markup,
    accents and capitals are written as the weights know them. Letters of another script stay, unspoken signs are removed, and the
    warnings name both. With ``given_phonemes`` ``[word](/phonemes/)`` stays as it is.
    """
    if language is None:
        default = learnt.languages[0] if learnt.languages else "en"
        language = detect_language(GIVEN_PHONEMES.sub(r"\1", text), default)
    if not given_phonemes:
        text = GIVEN_PHONEMES.sub(r"\1", text)
    known = learnt.of(language)
    warnings = []
    if learnt.languages and language not in learnt.languages:
        warnings.append(
            f"the text looks like language '{language}', and these weights speak {', '.join(learnt.languages)}: what comes may be no speech"
        )
    if known is None:
        return MappedText(" ".join(text.split()), tuple(warnings))
    parts, place = [], 0
    text = without_markup(text, known)
    left: Counter[str] = Counter()
    for match in GIVEN_PHONEMES.finditer(text) if given_phonemes else ():
        parts += [_mapped(text[place : match.start()], known, learnt, language, left), match[0]]
        place = match.end()
    parts.append(_mapped(text[place:], known, learnt, language, left))
    if warnings:  # its letters need no names then
        left = Counter({character: count for character, count in left.items() if not character.isalpha()})
    return MappedText(_tidy("".join(parts)), (*warnings, *_unlearnt(left, language)))


def learnt_characters(texts: Iterable[str]) -> str:
    """The characters that enough of ``texts`` hold to be learnt, sorted."""
    counts: Counter[str] = Counter()
    number = 0
    for text in texts:
        counts.update(set(text))
        number += 1
    least = min(max(LEARNT_TEXTS, LEARNT_SHARE * number), max(number / 2, 1))
    return "".join(sorted(character for character, count in counts.items() if count >= least and not character.isspace()))


def without_markup(text: str, known: frozenset[str] | None) -> str:
    """``text`` without HTML and Markdown, whose signs are not among the ``known`` characters; None knows all."""
    if known is None:
        return text
    text = _NO_SOUND.sub(lambda match: match[0] if match[0] in known else "", unicodedata.normalize("NFC", text))
    if "<" in known or "*" in known:
        return text
    if "&" not in known:
        text = html.unescape(text)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text


def _mapped(text: str, known: frozenset[str], learnt: LearntTexts, language: str, left: Counter[str]) -> str:
    if "—" not in known:
        text = _DASH.sub(", " if "," in known else " ", text)
    if not learnt.capital_words:
        text = _in_small_letters(text)
    return "".join(
        character if character in known else _stand_in(text, place, known, learnt, language, left) for place, character in enumerate(text)
    )


def _stand_in(text: str, place: int, known: frozenset[str], learnt: LearntTexts, language: str, left: Counter[str]) -> str:
    """The replacement of the untrained ``text[place]``."""
    character = text[place]
    if character in learnt.replace:
        return learnt.replace[character]
    if character.isspace():
        return " "
    inside = 0 < place < len(text) - 1 and text[place - 1].isalpha() and text[place + 1].isalpha()
    if character in "‘’‚‛" and not inside and not (character == "’" and text[place - 1 : place] == "s"):
        return ""
    if language == "en" and character in _ENGLISH:
        return f" {_ENGLISH[character]} "
    for candidate in _CANDIDATES.get(character, ()):
        if all(c in known for c in candidate):
            return candidate
    for candidate in (*_other_case(character), *_decomposed(character)):
        if candidate and all(c in known for c in candidate):
            return candidate
    if unicodedata.category(character)[0] == "M":
        return ""
    if character in (learnt.of("") or character):
        return character
    left[character] += 1
    return character if unicodedata.category(character)[0] in "LN" else " "


def _other_case(character: str) -> tuple[str, ...]:
    return tuple(other for other in (character.lower(), character.upper()) if len(other) == 1)


def _decomposed(character: str) -> tuple[str, ...]:
    plain = "".join(c for c in unicodedata.normalize("NFKD", character) if not unicodedata.combining(c))
    special = _LETTERS.get(character.lower(), "")
    found = (plain, special.capitalize() if character.isupper() else special)
    return (*found, *(one.lower() for one in found))


def _in_small_letters(text: str) -> str:
    """``text`` with words in capitals, and the words of a headline, in small letters, but for the start of a sentence.

    A short word that stands alone in capitals, or one without a vowel, is an abbreviation and read by its letters.
    """
    words = list(re.finditer(r"[^\W\d_]+(?:['’][^\W\d_]+)*", text))
    capital = [len(word[0]) > 1 and word[0] == word[0].upper() != word[0].lower() for word in words]
    begun_large = sum(word[0][0].isupper() for word in words)
    headline = begun_large >= _HEADLINE_WORDS and all(word[0][0].isupper() or _SMALL_IN_HEADLINES.fullmatch(word[0]) for word in words)
    parts, place = [], 0
    for index, word in enumerate(words):
        parts.append(text[place : word.start()])
        place = word.end()
        near = any(capital[max(index - 1, 0) : index] + capital[index + 1 : index + 2])
        if capital[index] and not near and (len(word[0]) < 4 or not re.search("[AEIOUYaeiouy]", word[0])):
            parts.append(" ".join(word[0]))
        elif capital[index] or (headline and len(word[0]) > 1):
            starts = re.search(r"(?:^|[.!?])\W*$", text[: word.start()])
            parts.append(word[0].capitalize() if starts else word[0].lower())
        else:
            parts.append(word[0])
    return "".join([*parts, text[place:]])


def _tidy(text: str) -> str:
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text


def _unlearnt(left: Counter[str], language: str) -> list[str]:
    """A warning for each kind of character that nothing stands for."""
    kinds: dict[str, str] = {}
    for character in sorted(left):
        if unicodedata.category(character)[0] == "N":
            kind = "figures"
        else:
            script = script_of(character)
            kind = "signs, which are left out" if script is None else f"letters ({script.capitalize()})"
            if script is not None and LANGUAGE_OF_SCRIPT.get(script) == language:
                kind = "letters"
        kinds[kind] = kinds.get(kind, "") + character
    return [
        f"these weights never learnt some {kind}: {' '.join(found[:_MOST_NAMED])}" + (" ..." if len(found) > _MOST_NAMED else "")
        for kind, found in kinds.items()
    ]


@dataclass(frozen=True)
class TextFrontEnd:
    """From a text as it is written to the text that the tokenizer gets, the same for every command."""

    learnt: LearntTexts = field(default_factory=LearntTexts)
    """Characters that the weights were trained on."""
    language: str | None = None
    """ISO 639-1 code of the texts; None guesses it from each text's script."""
    normalise: bool | None = None
    """Whether numbers, amounts, dates, units and abbreviations become words. None does so in English for a tokenizer that reads phonemes,
    and for figures that the weights never learnt."""
    given_phonemes: bool = False
    """Whether the tokenizer reads ``[word](/phonemes/)``; without it the word alone is kept."""

    def read(self, text: str) -> MappedText:
        """``text`` as it is spoken, with warnings about what is not; it stays as it is where nothing is known of the weights."""
        if not self.learnt.languages and (self.normalise is False or not (self.normalise or self.given_phonemes)):
            return MappedText(text if self.given_phonemes else GIVEN_PHONEMES.sub(r"\1", text))
        plain = GIVEN_PHONEMES.sub(r"\1", text)
        language = self.language or detect_language(plain, self.learnt.languages[0] if self.learnt.languages else "en")
        known = self.learnt.of(language)
        figures = known is not None and any(character.isdecimal() and character not in known for character in plain)
        warnings: tuple[str, ...] = ()
        # The lexicon of phonemes has a normaliser of its own, whose readings would be others than those that are shown.
        needed = (self.given_phonemes and language == "en") or (figures and language in LANGUAGES)
        if needed if self.normalise is None else self.normalise:
            try:
                text, warnings = self._in_words(without_markup(text, known), language)
            except UserError as error:
                if self.normalise:
                    raise
                warnings = (str(error),)
        mapped = map_characters(text, self.learnt, language, given_phonemes=self.given_phonemes)
        return MappedText(mapped.text, (*warnings, *mapped.warnings))

    def _in_words(self, text: str, language: str) -> tuple[str, tuple[str, ...]]:
        """``text`` normalised, but for the phonemes given in it."""
        if not self.given_phonemes:
            text = GIVEN_PHONEMES.sub(r"\1", text)
        parts: list[str] = []
        warnings: list[str] = []
        place = 0
        for link in (*GIVEN_PHONEMES.finditer(text), None):
            piece = text[place : None if link is None else link.start()]
            result = normalise(piece, language)
            parts += [piece[: len(piece) - len(piece.lstrip())], result.text, piece[len(piece.rstrip()) :] if piece.strip() else ""]
            warnings += result.warnings
            if link is not None:
                parts.append(link[0])
                place = link.end()
        return "".join(parts), tuple(dict.fromkeys(warnings))
