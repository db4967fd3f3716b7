"""English as phonemes in front of the language model; whatever has no sure reading stays UTF-8 bytes, word by word.

The readings come from ``hibari.g2p`` (PyPI hibari-tts, Apache-2.0): misaki's lexicons and rules, a tagger for words of several
readings, and a text normaliser. Its neural guesses for unknown words are not used.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer as Backend

from kalle.errors import UserError
from kalle.extras import install_command
from kalle.files import atomic_file
from kalle.text.languages import detect_language, has_words, language_of_name, script_of, split_sentences
from kalle.text.tokenizer import BEFORE_SPEECH, PHONEMES_NAME, Tokenizer, check_text

if TYPE_CHECKING:
    from hibari.g2p import G2P
    from hibari.g2p.token import Tok

PACKAGE, VERSION = "hibari-tts", "0.2.1"
"""The front end and the version whose readings are stored with new weights."""
SYMBOLS = "—…“”\u0303ʣʥʦʨᵝꭧAIOQSTWYᵊabcdefhijklmnopqrstuvwxyzɑɐɒæβɔɕçɖðʤəɚɛɜɟɡɥɨɪʝɯɰŋɳɲɴøɸθœɹɾɻʁɽʂʃʈʧʊʋʌɣɤχʎʒʔˈˌːʰʲ↓→↗↘ᵻ"
"""Symbols with an id of their own: the package's vocabulary without ASCII punctuation and space, which are their byte in both forms."""
PUNCTUATION = ';:,.!?"() '
"""The rest of the package's vocabulary."""
LANGUAGE = "en"
_LINK = re.compile(r"\[([^\[\]]+)\]\(/([^()]*)/\)")
_OTHER_LINK = re.compile(r"\[([^\[\]]+)\]\((?!/[^()]*/\))[^()]*\)")
_CHUNK = re.compile(r"(?:\[[^\[\]]+\]\(/[^()]*/\)|\S)+|\s+")
_DOUBLE_QUOTES = str.maketrans("", "", '"“”„‟«»″')
"""A word that touches a double quote misses the lexicon."""
_PLAIN_WORD = re.compile(r"[A-Za-z]+(?:['’-][A-Za-z]+)*")
_LETTER = (
    r"(?<![\w'’-])A(?= [A-HJ-Z](?![\w'’]))|(?<=\b[A-HJ-Z] )A(?![\w'’-])|(?<=\b[A-Z] and )A(?![\w'’-])|"
    r"(?<=[a-z] )A(?= [a-z]|[^\w\s'’-]|\s*$)|"
    r"(?<=\b[A-Z] )[A-Z](?=\.(?!\w))|(?<![\w.'’-])[A-Z](?=\.\s*$)"
)
"""An A that is no article (A M, U S A, Q and A, vitamin A), and letters before a full stop, which is lost otherwise (at five P M.)."""
_ADDED = {
    "et cetera": "ɛt sˈɛTəɹə", "gigahertz": "ɡˈɪɡəhˌɜɹts", "per mille": "pɜɹ mˈɪl", "Miz": "mˈɪz", "Hong Kong": "hˈɑŋ kˈɑŋ",
    "kilojoules": "kˈɪləʤˌulz", "kilojoule": "kˈɪləʤˌul", "kilopascals": "kˈɪləpæskˌælz", "kilopascal": "kˈɪləpæskˌæl",
    "hectopascals": "hˈɛktəpæskˌælz", "hectopascal": "hˈɛktəpæskˌæl",
}  # fmt: skip
"""Words that `kalle.text.normalise` writes and the lexicon lacks, with their readings."""
_NAMES = {
    "A": "ˈA", "B": "bˈi", "C": "sˈi", "D": "dˈi", "E": "ˈi", "F": "ˈɛf", "G": "ʤˈi", "H": "ˈAʧ", "I": "ˈI",
    "J": "ʤˈA", "K": "kˈA", "L": "ˈɛl", "M": "ˈɛm", "N": "ˈɛn", "O": "ˈO", "P": "pˈi", "Q": "kjˈu", "R": "ˈɑɹ",
    "S": "ˈɛs", "T": "tˈi", "U": "jˈu", "V": "vˈi", "W": "dˈʌbᵊlju", "X": "ˈɛks", "Y": "wˈI", "Z": "zˈi",
}  # fmt: skip
"""Readings of single letters."""
_EXCEPTIONS = re.compile(rf"{_LINK.pattern}|(?P<word>\b(?:{'|'.join(_ADDED)})\b)|(?P<letter>{_LETTER})")
_GUESSED, _GIVEN = 2, 5
"""Ratings of the front end's readings; 3 and 4 are the lexicon and its rules."""
_MOST_CACHED = 2048
_MOST_MARKED = np.iinfo(np.int16).max

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """A word, a mark or a space of a text."""

    written: str
    """As written, after the package's normaliser."""
    phonemes: str | None
    """Its reading in ``SYMBOLS`` and ``PUNCTUATION``; None leaves it as bytes."""
    optional: bool = False
    """Whether training may also show it as bytes."""


@dataclass(frozen=True)
class WordForms:
    """A text whose words may be read in two forms.

    ``ids`` (L,) uint16 holds both forms of such words; ``words`` (L,) int16 is 0 for what is always there, n for the
    phonemes of the n-th such word and -n for its bytes.
    """

    ids: np.ndarray
    words: np.ndarray

    def chosen(self, as_bytes: np.ndarray) -> np.ndarray:
        """The ids with word n + 1 as bytes where ``as_bytes`` (N,) bool says so."""
        left = np.concatenate([[False], as_bytes])[np.abs(self.words)]
        return self.ids[(self.words == 0) | ((self.words < 0) == left)]

    @property
    def count(self) -> int:
        """Words in two forms, N."""
        return int(self.words.max(initial=0))

    @property
    def longest(self) -> int:
        """Ids of the longest choice."""
        counts = np.bincount(np.abs(self.words) * 2 + (self.words < 0), minlength=2)
        pairs = np.concatenate([counts, np.zeros(len(counts) % 2, counts.dtype)]).reshape(-1, 2)
        return int(pairs.max(axis=1).sum())


class PhonemeTokenizer(Tokenizer):
    """The byte tokenizer and one id for each phoneme symbol behind its ids.

    English words that the lexicon knows are phonemes. Words that it doesn't know, words in another script and texts in another
    language are bytes; ``unknown_words`` names them. ``[word](/phonemes/)`` in a text gives the phonemes of a word.
    """

    def __init__(
        self,
        backend: Backend,
        symbols: str = SYMBOLS,
        version: str = VERSION,
        byte_words: float = 0.0,
        byte_utterances: float = 0.0,
        cache: str | Path | None = None,
    ) -> None:
        super().__init__(backend)
        for name, share in (("byte_words", byte_words), ("byte_utterances", byte_utterances)):
            if not 0 <= share <= 1:
                raise UserError(f"bad {name}: got {share}, expected a share from 0 to 1; correct it")
        self.symbols, self.version, self.byte_words, self.byte_utterances = symbols, version, byte_words, byte_utterances
        self.cache = cache
        self.first_phoneme = super().vocab_size
        self._ids = {symbol: self.first_phoneme + index for index, symbol in enumerate(symbols)} | {c: ord(c) for c in PUNCTUATION}
        self._pieces = lru_cache(maxsize=_MOST_CACHED)(self._read)

    @classmethod
    def create(cls, byte_words: float = 0.15, byte_utterances: float = 0.05, cache: str | Path | None = None) -> PhonemeTokenizer:
        """A new one for training; the shares of words and of whole utterances that training leaves as bytes.

        ``cache`` is a folder that keeps the readings of a training's texts for the next one. UserError without hibari-tts.
        """
        if _engine() is None:
            raise UserError(f"tokenizer=phonemes needs {PACKAGE}, which is not installed: run {install_command('phonemes')}")
        return cls(Tokenizer.bytes()._backend, byte_words=byte_words, byte_utterances=byte_utterances, cache=cache)

    @classmethod
    def from_files(cls, backend: Backend, path: Path) -> PhonemeTokenizer:
        """The tokenizer of ``backend`` and the phonemes.json at ``path``; UserError when that is not one."""
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            symbols, package, version = stored["symbols"], stored["package"], stored["version"]
            byte_words, byte_utterances = float(stored["byte_words"]), float(stored["byte_utterances"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"not a table of phonemes: '{path}' ({error!r}); copy the tokenizer folder of these weights again") from None
        valid = isinstance(symbols, str) and len(set(symbols)) == len(symbols) and not set(symbols) & set(PUNCTUATION)
        if package != PACKAGE or not valid or not isinstance(version, str):
            raise UserError(f"unknown phonemes in '{path}': got {package!r} {version!r}, expected symbols of {PACKAGE}; update kalle")
        tokenizer = cls(backend, symbols, version, byte_words, byte_utterances)
        if stored.get("first_id") != tokenizer.first_phoneme:
            raise UserError(
                f"'{path}' belongs to another tokenizer.json: got first_id {stored.get('first_id')}, expected {tokenizer.first_phoneme}; "
                "copy the whole tokenizer folder of these weights again"
            )
        return tokenizer

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and phonemes.json into ``folder``."""
        super().save(folder)
        stored = {
            "package": PACKAGE,
            "version": self.version,
            "first_id": self.first_phoneme,
            "symbols": self.symbols,
            "byte_words": self.byte_words,
            "byte_utterances": self.byte_utterances,
        }
        with atomic_file(Path(folder) / PHONEMES_NAME) as temporary:
            temporary.write_text(json.dumps(stored, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, so the least number of rows an embedding needs."""
        return self.first_phoneme + len(self.symbols)

    def encode(self, text: str, language: str | None = None) -> list[int]:
        """The id of the beginning of text, then those of ``text``; a UserError as for bytes, and for phonemes that are no symbols.

        ``language`` is an ISO 639-1 code, by default guessed from the script; all but English is bytes.
        """
        ids = super().encode("")
        for piece in self.pieces(text, language):
            ids += self._written(piece) if piece.phonemes is None else self._read_out(piece)
        return ids

    def encode_bytes(self, text: str) -> list[int]:
        """As the byte tokenizer encodes ``text``."""
        return super().encode(text)

    def forms(self, text: str, language: str | None = None) -> WordForms:
        """The ids that ``encode`` gives, and beside them the bytes of every word that training may leave as bytes."""
        ids, words, word = super().encode(""), [0], 0
        for piece in self.pieces(text, language):
            first = self._written(piece) if piece.phonemes is None else self._read_out(piece)
            optional = piece.optional and word < _MOST_MARKED
            word += optional
            ids += first
            words += [word if optional else 0] * len(first)
            if optional:
                second = self._written(piece)
                ids += second
                words += [-word] * len(second)
        return WordForms(np.array(ids, np.uint16), np.array(words, np.int16))

    def decode(self, ids: Iterable[int]) -> str:
        """Bytes as the text they are and phonemes as their symbols, special tokens left out."""
        parts, run = [], bytearray()
        for value in ids:
            if value < 256:
                run.append(value)
            elif value >= self.first_phoneme:
                parts += [run.decode(errors="replace"), self.symbols[value - self.first_phoneme]]
                run.clear()
        return "".join(parts) + run.decode(errors="replace")

    def pieces(self, text: str, language: str | None = None) -> tuple[Piece, ...]:
        """``text`` in words, marks and spaces with their readings."""
        super().encode(text)  # refuses what is not Unicode
        return self._pieces(text, language)

    def unknown_words(self, text: str, language: str | None = None) -> list[str]:
        """The words of an English ``text`` that are left as bytes because their reading is unknown; empty for other languages."""
        if not _is_english(text, language) or _engine() is None:
            return []
        left = (piece.written for piece in self.pieces(text, language) if piece.phonemes is None)
        return [word.strip(PUNCTUATION) for word in left if has_words(word)]

    def _read_out(self, piece: Piece) -> list[int]:
        assert piece.phonemes is not None
        return [self._ids[symbol] for symbol in piece.phonemes]

    @staticmethod
    def _written(piece: Piece) -> list[int]:
        return list(piece.written.encode())

    def _read(self, text: str, language: str | None) -> tuple[Piece, ...]:
        for link in _LINK.finditer(text):
            self._check_phonemes(link)
        engine = _engine() if _is_english(text, language) else None
        if engine is None:
            return tuple(_as_written(text))
        self._check_version()
        return tuple(_one_space(self._known(piece) for piece in _english(text, engine)))

    def _check_phonemes(self, link: re.Match[str]) -> None:
        wrong = [c for c in link[2] if c not in self._ids or c == '"']
        if wrong or not link[2].strip():
            got = f"{wrong[0]!r} (U+{ord(wrong[0]):04X}) in {link[0]!r}" if wrong else f"nothing in {link[0]!r}"
            raise UserError(
                f"bad phonemes: got {got}, expected symbols of misaki's English alphabet, such as həlˈO for hello "
                f"(A I O W Y Q stand for diphthongs): {self.symbols}; correct the symbol or leave the phonemes out"
            )

    def _known(self, piece: Piece) -> Piece:
        """``piece``, as bytes where its reading holds a symbol that the weights don't know."""
        known = piece.phonemes is None or all(symbol in self._ids for symbol in piece.phonemes)
        return piece if known else Piece(piece.written, None)

    def _check_version(self) -> None:
        installed = importlib.metadata.version(PACKAGE)
        if installed != self.version:
            _warn_once(
                f"these weights learnt the readings of {PACKAGE} {self.version}, and {installed} is installed; "
                f"some words may be read in another way: pip install {PACKAGE}=={self.version}"
            )


def prompt_forms(tokenizer: PhonemeTokenizer, text: str, language: str | None = None) -> WordForms:
    """``prompt_ids`` of ``text``, and beside its phonemes the bytes of each word that training may show instead."""
    check_text(text, "text")
    forms = tokenizer.forms(text.strip(), language)
    after = [tokenizer.special(name) for name in BEFORE_SPEECH]
    return WordForms(np.append(forms.ids, np.array(after, np.uint16)), np.append(forms.words, np.zeros(len(after), np.int16)))


@lru_cache(maxsize=1)
def _engine() -> G2P | None:
    """The front end, without its guesses; None and one warning where it is not installed."""
    try:
        from hibari.g2p import G2P
    except ImportError:
        _warn_once(f"every word is spoken from its letters: {PACKAGE} is not installed; run {install_command('phonemes')}")
        return None
    return G2P(oov=_first_sound)


def _first_sound(word: str) -> str:
    """A guess that is told from a reading by its rating: the article before the word depends on its first sound."""
    return "ə" if unicodedata.normalize("NFD", word[:1]).lower()[:1] in tuple("aeiou") else "t"


@lru_cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _is_english(text: str, language: str | None) -> bool:
    if language is not None:
        return language_of_name(language) == LANGUAGE
    return detect_language(_LINK.sub(r"\1", text)) == LANGUAGE


def _as_written(text: str) -> Iterator[Piece]:
    """``text`` as bytes but for the phonemes given in it."""
    place = 0
    for link in _LINK.finditer(text):
        yield Piece(text[place : link.start()], None)
        yield Piece(link[1], link[2])
        place = link.end()
    yield Piece(text[place:], None)


def _english(text: str, engine: G2P) -> Iterator[Piece]:
    """The pieces of ``text``, sentence by sentence."""
    text = unicodedata.normalize("NFC", _OTHER_LINK.sub(r"\1", text.translate(_DOUBLE_QUOTES)))
    links = [link.span() for link in _LINK.finditer(text)]
    edges = [0]
    for sentence in split_sentences(text, LANGUAGE):
        edges += [edge for edge in (sentence.start, sentence.end) if not any(start < edge < end for start, end in links)]
    for start, end in pairwise([*edges, len(text)]):
        yield from _sentence(text[start:end], engine)


def _sentence(text: str, engine: G2P) -> Iterator[Piece]:
    """The runs that the front end can read, and the words in other scripts between them as bytes."""
    run = ""
    for chunk in _CHUNK.findall(text):
        if chunk.isspace() or _LINK.search(chunk) or all(script_of(character) in (None, "LATIN") for character in chunk):
            run += chunk
        else:
            yield from _run(run, engine)
            yield Piece(chunk, None)
            run = ""
    yield from _run(run, engine)


def _run(text: str, engine: G2P) -> Iterator[Piece]:
    """The pieces of ``text``; a word that the package fails on, such as a number of 40 digits, is left as bytes."""
    try:
        pieces = list(_pieces_of_run(text, engine))
    except Exception:  # IndexError and whatever else it may raise
        chunks = _CHUNK.findall(text)
        pieces = [piece for chunk in chunks for piece in _run(chunk, engine)] if len(chunks) > 1 else list(_as_written(text))
    yield from pieces


def _pieces_of_run(text: str, engine: G2P) -> Iterator[Piece]:
    if not text.strip():
        yield Piece(text, None)
        return
    from hibari.g2p.normalize import normalize

    if text[0].isspace():
        yield Piece(" ", None)
    text = _EXCEPTIONS.sub(_with_phonemes, text)
    # The normaliser reads some symbols of the phoneme alphabet as words, so it sees a place holder.
    given = iter([link[2] for link in _LINK.finditer(text)])
    tokens = engine.tokenize(normalize(_LINK.sub(r"[\1](/q/)", text)))
    for token in tokens:
        if token.rating == _GIVEN:
            token.phonemes = next(given)
    before = None
    for token in engine.phonemize_tokens(tokens):
        yield _piece(token, before)
        if token.whitespace:
            yield Piece(" ", None)
        before = None if token.whitespace else token
    if text[-1].isspace():
        yield Piece(" ", None)


def _with_phonemes(match: re.Match[str]) -> str:
    """An exception to the lexicon with its phonemes; phonemes that were given stay."""
    if match["letter"] or match["word"]:
        return f"[{match[0]}](/{(_NAMES if match['letter'] else _ADDED)[match[0]]}/)"
    return match[0]


def _piece(token: Tok, before: Tok | None) -> Piece:
    if before is not None and before.rating == _GIVEN and token.text.lower() in ("'s", "’s"):
        return Piece(token.text, _ending(str(before.phonemes)))
    phonemes = (token.phonemes or "").translate(_DOUBLE_QUOTES)
    if has_words(token.text) and (token.rating == _GUESSED or not phonemes.strip()):
        return Piece(token.text, None)
    optional = token.rating != _GIVEN and _PLAIN_WORD.fullmatch(token.text) is not None
    return Piece(token.text, phonemes, optional)


def _ending(phonemes: str) -> str:
    """How the s after a word is said, which the front end always takes for voiceless where the phonemes were given."""
    last = phonemes.rstrip()[-1:]
    return "ᵻz" if last in "szʃʒʧʤ" else "s" if last in "ptkfθ" else "z"


def _one_space(pieces: Iterable[Piece]) -> Iterator[Piece]:
    """``pieces`` without the empty ones, with one space where there were several and none at the ends."""
    space, begun = False, False
    for piece in pieces:
        spoken = piece.written if piece.phonemes is None else piece.phonemes
        if not spoken.strip():
            space |= bool(spoken)
            continue
        if space and begun:
            yield Piece(" ", None)
        space, begun = False, True
        yield piece
