"""Texts whose words training reads now as phonemes and now as bytes, drawn again for every sample."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kalle.data.latents.table import Ragged, Table, Texts, starts_of
from kalle.files import atomic_file
from kalle.seeds import numpy_generator
from kalle.text.phonemes import LANGUAGE, PhonemeTokenizer, WordForms, prompt_forms
from kalle.text.tokenizer import BEFORE_SPEECH

logger = logging.getLogger(__name__)
_MOST_NAMED = 10


class TextForms:
    """N prompts in which some words have two forms (`WordForms`); ``draw`` makes one choice of them.

    The choice is a function of its key: with ``byte_utterances`` the whole text is bytes, else each word with ``byte_words``.
    """

    def __init__(self, tokenizer: PhonemeTokenizer, texts: Texts, ids: Ragged, words: np.ndarray, longest: np.ndarray) -> None:
        self.tokenizer, self.texts, self.ids, self.words, self.longest = tokenizer, texts, ids, words, longest
        self._after = [tokenizer.special(name) for name in BEFORE_SPEECH]

    @classmethod
    def of(cls, table: Table, tokenizer: PhonemeTokenizer) -> TextForms:
        """The forms of the texts of ``table``, from the cache of ``tokenizer`` when it has one with just these texts."""
        texts, languages = table.texts, [table.language_of(index) for index in range(len(table))]
        path = None if tokenizer.cache is None else Path(tokenizer.cache) / f"{_fingerprint(texts, languages, tokenizer)}.npz"
        if path is not None and path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                return cls(tokenizer, texts, Ragged(stored["ids"], stored["starts"]), stored["words"], stored["longest"])
        forms = _read(list(zip(texts, languages, strict=True)), tokenizer)
        ids = Ragged(np.concatenate([form.ids for form in forms]), starts_of(np.array([len(form.ids) for form in forms], np.int64)))
        words, longest = np.concatenate([form.words for form in forms]), np.array([form.longest for form in forms], np.int64)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, ids=ids.values, starts=ids.starts, words=words, longest=longest)
        return cls(tokenizer, texts, ids, words, longest)

    @property
    def lengths(self) -> np.ndarray:
        """Ids of the longest form of each prompt, (N,) int64."""
        as_bytes = self.texts.rows.lengths + 1 + len(self._after)
        return np.maximum(self.longest, as_bytes) if self.tokenizer.byte_utterances else self.longest

    def first(self) -> Ragged:
        """The prompts with every word in its first form, as synthesis reads them."""
        keep = self.words >= 0
        counts = np.concatenate([[0], np.cumsum(keep)])[self.ids.starts]
        return Ragged(self.ids.values[keep], counts.astype(np.int64))

    def take(self, keep: np.ndarray) -> TextForms:
        """Those that the mask ``keep`` (N,) bool marks."""
        words = Ragged(self.words, self.ids.starts).take(keep).values
        return TextForms(self.tokenizer, Texts(self.texts.rows.take(keep)), self.ids.take(keep), words, self.longest[keep])

    def draw(self, index: int, *key: int | str) -> np.ndarray:
        """Ids of prompt ``index`` (L,), chosen by ``key``."""
        generator = numpy_generator("text forms", *key)
        form = WordForms(self.ids.row(index), self.words[self.ids.starts[index] : self.ids.starts[index + 1]])
        if generator.random() < self.tokenizer.byte_utterances:
            return np.array([*self.tokenizer.encode_bytes(self.texts[index].strip()), *self._after])
        return form.chosen(generator.random(form.count) < self.tokenizer.byte_words)


def _fingerprint(texts: Texts, languages: Sequence[str | None], tokenizer: PhonemeTokenizer) -> str:
    digest = hashlib.blake2b(f"1 {tokenizer.version} {tokenizer.first_phoneme} {tokenizer.symbols}".encode(), digest_size=16)
    for array in (texts.rows.starts, texts.rows.values):
        digest.update(np.ascontiguousarray(array).tobytes())
    if any(language not in (None, LANGUAGE) for language in languages):
        digest.update("\0".join(language or "" for language in languages).encode())
    return digest.hexdigest()


def _read(texts: Sequence[tuple[str, str | None]], tokenizer: PhonemeTokenizer) -> list[WordForms]:
    """The forms of each text in its language."""
    known: dict[tuple[str, str | None], WordForms] = {}
    unknown: Counter[str] = Counter()
    for text, language in dict.fromkeys(texts):
        known[text, language] = prompt_forms(tokenizer, text, language)
        unknown.update(tokenizer.unknown_words(text.strip(), language))
    words = sum(form.count for form in known.values())
    most = ", ".join(word for word, _ in unknown.most_common(_MOST_NAMED))
    logger.info("%d words of %d texts as phonemes, %d left as bytes (%s)", words, len(known), unknown.total(), most)
    return [known[text] for text in texts]
