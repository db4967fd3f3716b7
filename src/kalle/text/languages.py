"""The language of a text, guessed from its script, and its sentences."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from kalle.errors import UserError

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
_NAMES = {
    **{"ar": "ara arabic", "bn": "ben bengali", "ca": "cat catalan", "cs": "ces cze czech", "da": "dan danish", "de": "deu ger german"},
    **{"el": "ell gre greek", "en": "eng english", "es": "spa spanish castilian", "fa": "fas per persian farsi", "fi": "fin finnish"},
    **{"fr": "fra fre french", "he": "heb hebrew", "hi": "hin hindi", "hu": "hun hungarian", "id": "ind indonesian", "it": "ita italian"},
    **{"ja": "jpn japanese", "ko": "kor korean", "nl": "nld dut dutch", "no": "nor norwegian", "pl": "pol polish", "pt": "por portuguese"},
    **{"ro": "ron rum romanian", "ru": "rus russian", "sv": "swe swedish", "ta": "tam tamil", "th": "tha thai", "tr": "tur turkish"},
    **{"uk": "ukr ukrainian", "vi": "vie vietnamese", "yue": "cantonese", "zh": "zho chi cmn chinese mandarin"},
}
"""ISO 639 code -> the codes of ISO 639-2 and 639-3 and the English names of the same language."""
_CODES = {name: code for code, names in _NAMES.items() for name in names.split()} | {"zh-hk": "yue", "zh-yue": "yue"}
_LOCALE = re.compile(r"[a-z]{2,3}(-[a-z0-9]{1,8})*")
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


@lru_cache(maxsize=1024)
def language_code(name: str) -> str | None:
    """ISO 639 code, of two letters where there is one, of a code, a locale such as en-US or an English name; None for anything else."""
    lowered = re.sub(r"\s*\(.*\)$", "", name.strip().lower()).replace("_", "-")
    if lowered in _CODES:
        return _CODES[lowered]
    head, *rest = re.split(r"[-\s]+", lowered, maxsplit=1)
    if head in _CODES and (len(head) > 3 or not rest or _LOCALE.fullmatch(lowered)):
        return _CODES[head]
    return head if _LOCALE.fullmatch(lowered) else None


def language_of_name(name: str | None) -> str:
    """ISO 639 code of a language by `language_code`; "" for None, and an unknown name as it is."""
    return "" if not name or not name.strip() else language_code(name) or name.strip()


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


LONGEST_CHARACTERS = 400
"""No sentence is longer than this, whatever ``fits`` allows; a long sentence of a novel is half of it."""
SHORTEST_LETTERS = 10
"""A sentence of fewer letters is joined to a neighbour: one or two words alone are what such models speak worst."""
_LINE_END = r"(?>\r\n|[\n\r\x0b\x0c\x85])"
_PARAGRAPH = re.compile(rf"{_LINE_END}[^\S\n\r\x0b\x0c\x85]*{_LINE_END}\s*|\u2029\s*")
_QUOTES = re.compile(r"""["“”„«»「」『』《》()（）\[\]【】]""")
_OPENING = re.compile(r"""[“„«「『《(（\[【]+$|(?<=\s)"$""")
_CHINESE_SEMICOLON = re.compile(r"；")
# Where a sentence that is too long is cut, best first; between letters or figures a colon or comma is part of a word.
_CUTS = (re.compile(r"[;:]+\s+|[；：…—]+\s*"), re.compile(r"[,،]+\s+|[，、]+\s*"))
_TITLES = (
    "Mr|Mrs|Ms|Mx|Messrs|Mme|Mlle|Dr|Prof|St|Mt|Ft|Hon|Pres|Gov|Sen|Rep|Gen|Col|Maj|Capt|Cmdr|Lt|Sgt|Cpl|Pvt|Adm|Supt|Rev|Fr|Msgr|Sra?|"
    "Srta|Hr|Sig"
)
_MONTHS = "(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*"
_UNITS = "[ap]\\.?m|o'clock|thousand|million|billion|trillion|percent|dollars|euros|pounds|[kcm]?m|k?g|km/h|mph|[GMk]?Hz|[GMTk]B|°"
_WHOLE = re.compile(
    rf"""
    (?:https?://|www\.)\S+ | (?<![\w.+-])[\w.+-]+@[\w.-]+\w                    # addresses
    | (?<![\w.])v?\d+(?:\.\d+)+\.\s+[a-z]                              # a version or decimal before a full stop that ends nothing
    | (?<!\d)\+?\(?\d+\)?(?:[ .-]\(?\d+\)?){{2,}}                       # telephone numbers
    | [$£€¥]?\d+(?:[.,:/–-]\d+)* (?:\s?(?:{_UNITS})\b\.?)?          # numbers, times, amounts
    | \b(?:{_MONTHS})\.?\ \d\d?(?:st|nd|rd|th)?\b(?:,?\ \d{{4}})?  # dates
    | \b\d\d?\ (?:{_MONTHS})\b\.?(?:,?\ \d{{4}})?
    | \b(?:{_TITLES})\.\s+\w+ | \b(?:[Aa]pprox|ca|vs|e\.g|i\.e)\.\s+\S+ | \b(?:[Nn]os?|[Ff]igs?|[Vv]ol|[Cc]h|pp?)\.\s?\d+
    | (?:「[^「」]*」|『[^『』]*』)\s?[とっなのはがをにでもかよね]        # a Japanese quotation and the particle behind it
    """,
    re.VERBOSE,
)
"""Text that stays in one piece where possible."""
_INITIALS = re.compile(r"\b(?:[A-Z]\.\s?)+[A-Z]\w+")
_SPACE = re.compile(r"(?<=\S)\s+")
_JOINER = "\u200d"
Span = tuple[int, int]


@dataclass(frozen=True)
class Sentence:
    """``text[start:end]`` of the whole text, without space at its ends."""

    text: str
    start: int
    end: int
    ends_paragraph: bool
    cut: bool = False
    """Whether it ends inside a sentence that was too long for one request."""

    @property
    def spoken(self) -> str:
        """The text on one line: line breaks and runs of space read as one space."""
        return " ".join(self.text.split())


def split_sentences(text: str, language: str | None = None, fits: Callable[[str], bool] | None = None) -> list[Sentence]:
    """The sentences of ``text`` in order, found by sentencex; a blank line ends a paragraph.

    ``language`` is an ISO 639-1 code, guessed for each paragraph from its script by default. A sentence for which ``fits`` says
    no (it must say no to everything longer too) is cut at its inner sentence ends, else at semicolons, commas, spaces, or between any two
    characters, and says so (``Sentence.cut``); a very short one is joined to its neighbour in the paragraph.
    Whatever has no letter and no number in a paragraph of its own stays in a gap: see ``unspoken``. UserError without sentencex.
    """

    def allowed(piece: str) -> bool:
        return len(piece) <= LONGEST_CHARACTERS and (fits is None or fits(piece))

    found: list[Sentence] = []
    for start, end in _paragraphs(text):
        spans = _boundaries(text[start:end], language or detect_language(text[start:end]))
        pieces = [piece for span in spans for piece in _shorten(text, (start + span[0], start + span[1]), language, allowed)]
        joined = [piece for piece in _join_short(text, pieces, allowed) if has_words(text[piece[0] : piece[1]])]
        ends = {piece_end for _, piece_end in joined}
        cut_ends = {piece_end for _, piece_end, cut in pieces if cut}
        found += [Sentence(text[a:b], a, b, b == max(ends), b in cut_ends) for a, b in joined]
    return found


def unspoken(text: str, sentences: list[Sentence]) -> list[tuple[int, str]]:
    """Text between the ``sentences`` of ``text`` that is more than space, with its position: lines of stars, lone emoji."""
    edges = [0, *(edge for sentence in sentences for edge in (sentence.start, sentence.end)), len(text)]
    gaps = [(start, text[start:end]) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [(start + len(gap) - len(gap.lstrip()), gap.strip()) for start, gap in gaps if gap.strip()]


def weight(text: str) -> int:
    """Letters and digits of ``text``; a wide one, such as an ideograph, counts as several."""
    letters = [character for character in text if unicodedata.category(character)[0] in "LN"]
    return sum(SYLLABLE_LETTERS if unicodedata.east_asian_width(character) in "WF" else 1 for character in letters)


def _paragraphs(text: str) -> Iterator[Span]:
    start = 0
    for blank in _PARAGRAPH.finditer(text):
        yield start, blank.start()
        start = blank.end()
    yield start, len(text)


def _boundaries(text: str, language: str) -> list[Span]:
    """Spans of the sentences of ``text``, trimmed, by sentencex and at full-width semicolons."""
    edges, place = [0], 0
    for piece in _segment(text, language):
        edges += [place + match.end() for match in _CHINESE_SEMICOLON.finditer(piece)]
        place += len(piece)
        edges.append(place)
    inside = _inside(text, _WHOLE)
    edges = [edge for edge in edges if edge not in inside]
    spans = zip(edges, [*edges[1:], len(text)], strict=True)
    return [trimmed for span in spans if (trimmed := _trim(text, span))[0] < trimmed[1]]


def _inside(text: str, *patterns: re.Pattern[str]) -> set[int]:
    """The places of ``text`` inside of what matches one of ``patterns``, space at its end apart."""
    return {
        place
        for pattern in patterns
        for match in pattern.finditer(text)
        for place in range(match.start() + 1, match.end() - (len(match[0]) - len(match[0].rstrip())))
    }


def _segment(text: str, language: str) -> list[str]:
    try:
        from sentencex import segment
    except ImportError:
        raise UserError("splitting text into sentences needs sentencex, which is not installed; run: pip install sentencex") from None
    pieces = list(segment(language, text))
    # Odd runs of line breaks come back shorter than they went in; such a paragraph stays in one piece, to be cut by length.
    return pieces if "".join(pieces) == text else [text]


def _trim(text: str, span: Span) -> Span:
    start, end = span
    piece = text[start:end]
    return start + len(piece) - len(piece.lstrip()), max(end - len(piece) + len(piece.rstrip()), start)


def _shorten(text: str, span: Span, language: str | None, allowed: Callable[[str], bool]) -> Iterator[tuple[int, int, bool]]:
    """``span``, in pieces that are all allowed; the third value says that a piece ends inside a sentence."""
    start, end = span
    if allowed(text[start:end]):
        yield start, end, False
        return
    inner = _inside_quotes(text, span, language, allowed)
    if len(inner) > 1:
        for piece in inner:
            yield from _shorten(text, piece, language, allowed)
        return
    while start < end and not allowed(text[start:end]):
        cut = start + _cut_place(text[start:end], allowed)
        yield (*_trim(text, (start, cut)), True)
        start = _trim(text, (cut, end))[0]
    if start < end:
        yield start, end, False


def _inside_quotes(text: str, span: Span, language: str | None, allowed: Callable[[str], bool]) -> list[Span]:
    """The sentences within a long quotation or bracket, which sentencex keeps whole; but nothing is cut that stays whole and is allowed."""
    start, end = span
    piece = text[start:end]
    spans = [(start + a, start + b) for a, b in _boundaries(_QUOTES.sub(" ", piece), language or detect_language(piece))]
    edges = [start]
    whole = {place for match in _WHOLE.finditer(piece) if allowed(match[0]) for place in range(match.start() + 1, match.end())}
    for _, following in pairwise(spans):
        if following[0] - start in whole:
            continue
        opening = _OPENING.search(text[edges[-1] : following[0]])
        edges.append(following[0] - (len(opening[0]) if opening else 0))
    trimmed = [_trim(text, pair) for pair in zip(edges, [*edges[1:], end], strict=True)]
    return [pair for pair in trimmed if pair[0] < pair[1]]


def _cut_place(piece: str, allowed: Callable[[str], bool]) -> int:
    """Where to cut ``piece``, which is too long: at the last good place within what is allowed."""
    room, beyond = 1, min(len(piece), LONGEST_CHARACTERS + 1)
    while beyond - room > 1:
        middle = (room + beyond) // 2
        room, beyond = (middle, beyond) if allowed(piece[:middle]) else (room, middle)
    inside = _inside(piece[: LONGEST_CHARACTERS + 1], _WHOLE, _INITIALS)
    for pattern in _CUTS:
        places = [match.end() for match in pattern.finditer(piece[:room]) if match.end() > room // 2 and match.end() not in inside]
        if places:
            return places[-1]
    if len(piece) - room < room // 2:
        room = max((len(piece) + 1) // 2, 1)  # two halves rather than a long piece and a word
    spaces = [match.end() for match in _SPACE.finditer(piece[:room])]
    good = [place for place in spaces if place not in inside]
    if good or spaces:
        return (good or spaces)[-1]
    outside = next((place for place in range(room, room // 2, -1) if place not in inside), room)
    room = max(outside, 1)
    while room > 1 and (unicodedata.category(piece[room]).startswith("M") or _JOINER in piece[room - 1 : room + 1]):
        room -= 1
    return room


def _join_short(text: str, pieces: list[tuple[int, int, bool]], allowed: Callable[[str], bool]) -> list[Span]:
    joined: list[Span] = []
    for start, end, _ in pieces:
        if joined and weight(text[slice(*joined[-1])]) < SHORTEST_LETTERS and allowed(text[joined[-1][0] : end]):
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    if len(joined) > 1 and weight(text[slice(*joined[-1])]) < SHORTEST_LETTERS and allowed(text[joined[-2][0] : joined[-1][1]]):
        joined[-2:] = [(joined[-2][0], joined[-1][1])]
    return joined
