"""The text of `kalle say`: where it comes from, and how it would be spoken."""

from __future__ import annotations

import sys
from pathlib import Path

from kalle.errors import UserError

STDIN = "-"


def read_text(text: str | None, text_file: Path | None = None) -> str:
    """``text`` itself or the content of ``text_file``, from standard input where that is ``-``.

    A UserError for none or both, for a file that is missing, and for what is not UTF-8.
    """
    if (text is None) == (text_file is None):
        got = "none" if text is None else "TEXT and --text-file"
        raise UserError(f"what to say: got {got}, expected either TEXT or --text-file FILE; give one")
    if text_file is None or str(text_file) == STDIN:
        return _standard_input() if text in (None, STDIN) else str(text)
    try:
        # A byte order mark is no part of the text.
        return text_file.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"text file not found: got '{text_file}', expected a file of UTF-8 text; check --text-file") from None
    except IsADirectoryError:
        raise UserError(f"not a text file: '{text_file}' is a folder, expected a file of UTF-8 text; check --text-file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"'{text_file}' is not UTF-8: {error.reason} at byte {error.start}; convert the text") from None


def choose_language(language: str | None) -> str | None:
    """``language`` in lower case; a UserError unless it looks like an ISO 639 code."""
    if language is None:
        return None
    code = language.lower()
    if not (code.isascii() and code.isalpha() and 2 <= len(code) <= 3):
        raise UserError(f"unknown language: got '{language}', expected an ISO 639 code such as en or zh; leave --language out to guess it")
    return code


def wordless(text: str) -> list[str]:
    """The warning about a text, such as lone emoji, of which a long text would leave everything out; none for any other."""
    from kalle.text.languages import has_words

    return [] if has_words(text) else ["nothing in the text is a letter or number"]


def show_text(text: str, language: str | None, normalise: bool, longest_seconds: float | None = None) -> str:
    """``text`` as written, its sentences with their places, and each in words where ``normalise`` changes it; needs no model.

    ``longest_seconds`` is what the model keeps up in one request, where that is known.
    """
    from kalle.synthesis.longform_prompt import fits_one_request
    from kalle.text.languages import detect_language
    from kalle.text.normalise import normalise as in_words
    from kalle.text.sentences import split_sentences, unspoken

    def words(piece: str) -> str:
        return in_words(piece, language).text if normalise else piece

    sentences = split_sentences(text, language, lambda piece: fits_one_request(words(piece), longest_seconds))
    lines = ["original:", text.strip("\n"), ""]
    lines += [
        f"language: {language or detect_language(text) + ' (guessed)'}",
        f"normalisation: {'on' if normalise else 'off (--normalise)'}",
    ]
    lines += [f"sentences: {len(sentences)}"]
    for number, sentence in enumerate(sentences, start=1):
        lines.append(f"{number:4} [{sentence.start}:{sentence.end}] {sentence.spoken}")
        if normalise:
            spoken = in_words(sentence.text, language)
            lines += [f"     -> {spoken.text}"] if spoken.text != sentence.spoken else []
            lines += [f"     warning: {warning}" for warning in spoken.warnings]
        lines += ["     warning: too long for one request, cut after these words"] if sentence.cut else []
        lines += ["     (paragraph)"] if sentence.ends_paragraph and number < len(sentences) else []
    lines += [f"not spoken: {gap!r} at character {place + 1}" for place, gap in unspoken(text, sentences)]
    return "\n".join(lines)


def _standard_input() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8: {error.reason} at byte {error.start}; convert the text") from None
