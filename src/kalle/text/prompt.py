"""The order of tokens in front of the speech; nothing else in the project knows it."""

from __future__ import annotations

import re

import numpy as np
import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.text.phonemes import PhonemeTokenizer, WordForms
from kalle.text.tokenizer import Tokenizer

BEFORE_SPEECH = ("<|SPEECH_UNDERSTANDING_END|>", "<|SPEECH_GENERATION_START|>")
"""The two tokens between the text and the first frame; the position of the last one predicts that frame."""

_UNSPEAKABLE = re.compile(r"[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ud800-\udfff]")
# Characters with neither shape nor width, which str.strip leaves: joiners, direction marks, byte order marks.
_INVISIBLE = re.compile("[\u00ad\u200b-\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def prompt_ids(
    tokenizer: Tokenizer, text: str, prompt_text: str | None = None, tokenise_separately: bool = False, language: str | None = None
) -> Tensor:
    """The ids of beginning of text, the transcript of the prompt, the text, and the two tokens before speech: (L,) int64.

    Both texts are stripped, joined by one space and tokenised at once. With ``tokenise_separately`` they are left as
    they are, tokenised each on its own, and their ids joined with nothing in between, as the release does.
    ``language`` (ISO 639-1) is that of both, by default guessed from the script. A UserError when a text is empty.
    """
    check_text(text, "text")
    if prompt_text is not None:
        check_text(prompt_text, "prompt text")
    if tokenise_separately:
        ids = tokenizer.encode(text, language)
        if prompt_text is not None:
            ids = tokenizer.encode(prompt_text, language) + ids[1:]
    else:
        ids = tokenizer.encode(" ".join(part.strip() for part in (prompt_text, text) if part is not None), language)
    return torch.tensor(ids + [tokenizer.special(name) for name in BEFORE_SPEECH], dtype=torch.int64)


def prompt_forms(tokenizer: PhonemeTokenizer, text: str, language: str | None = None) -> WordForms:
    """``prompt_ids`` of ``text``, and beside its phonemes the bytes of each word that training may show instead."""
    check_text(text, "text")
    forms = tokenizer.forms(text.strip(), language)
    after = [tokenizer.special(name) for name in BEFORE_SPEECH]
    return WordForms(np.append(forms.ids, np.array(after, np.uint16)), np.append(forms.words, np.zeros(len(after), np.int16)))


def without_text(ids: Tensor) -> Tensor:
    """``ids`` (..., L) of ``prompt_ids`` without their words: beginning of text and the two tokens before speech, (..., 3)."""
    assert ids.shape[-1] > len(BEFORE_SPEECH), f"{ids.shape[-1]} ids hold no prompt"
    return torch.cat([ids[..., :1], ids[..., -len(BEFORE_SPEECH) :]], dim=-1)


def check_text(text: str, name: str) -> None:
    """A UserError when ``text`` has nothing to say, is no Unicode, or has a control character other than white space."""
    found = _UNSPEAKABLE.search(text)
    if found is not None:
        what = "half of a surrogate pair" if "\ud800" <= found[0] <= "\udfff" else "a control character"
        place = f"U+{ord(found[0]):04X} at character {found.start() + 1}"
        raise UserError(
            f"the {name} is not valid Unicode text to speak: got {what} ({place}), expected words; take it out or read the file as UTF-8"
        )
    if not _INVISIBLE.sub("", text).strip():
        raise UserError(f"the {name} is empty: got {text[:20]!r}, expected words to speak; give a {name}")
