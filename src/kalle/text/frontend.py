"""The spoken form of a text: numbers in words, and characters that the weights were trained on."""

from __future__ import annotations

from dataclasses import dataclass, field

from kalle.errors import UserError
from kalle.text.characters import GIVEN_PHONEMES, LearntTexts, MappedText, map_characters, without_markup
from kalle.text.languages import detect_language
from kalle.text.normalise import LANGUAGES, normalise


@dataclass(frozen=True)
class TextFrontEnd:
    """From a text as it is written to the text that the tokenizer gets, the same for every command."""

    learnt: LearntTexts = field(default_factory=LearntTexts)
    """Characters that the weights were trained on."""
    language: str | None = None
    """ISO 639-1 code of the texts; None guesses it from each text's script."""
    normalise: bool = False
    """Whether numbers, amounts, dates, units and abbreviations become words. Figures that the weights never learnt always do."""
    given_phonemes: bool = False
    """Whether the tokenizer reads ``[word](/phonemes/)``; without it the word alone is kept."""

    def read(self, text: str) -> MappedText:
        """``text`` as it is spoken, with warnings about what is not; it stays as it is where nothing is known of the weights."""
        if not self.learnt.languages and not self.normalise:
            return MappedText(text if self.given_phonemes else GIVEN_PHONEMES.sub(r"\1", text))
        plain = GIVEN_PHONEMES.sub(r"\1", text)
        language = self.language or detect_language(plain, self.learnt.languages[0] if self.learnt.languages else "en")
        known = self.learnt.of(language)
        figures = known is not None and any(character.isdecimal() and character not in known for character in plain)
        warnings: tuple[str, ...] = ()
        if self.normalise or (figures and language in LANGUAGES):
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
