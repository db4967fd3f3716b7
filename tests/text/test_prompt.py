from __future__ import annotations

import pytest
import torch

from kalle.errors import UserError
from kalle.text.tokenizer import Tokenizer, prompt_ids

BYTES = Tokenizer.bytes()
SPECIALS = [264, 261]


def ids_of(text: str) -> list[int]:
    return list(text.encode())


def test_order_without_a_prompt() -> None:
    ids = prompt_ids(BYTES, "Hi.")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [256, *ids_of("Hi."), *SPECIALS]


def test_prompt_and_text_are_joined_with_one_space() -> None:
    assert prompt_ids(BYTES, " there ", "Hi.\n").tolist() == [256, *ids_of("Hi. there"), *SPECIALS]


def test_tokenise_separately_joins_the_ids_with_nothing_between() -> None:
    assert prompt_ids(BYTES, " there ", "Hi. ", tokenise_separately=True).tolist() == [256, *ids_of("Hi.  there "), *SPECIALS]
    assert prompt_ids(BYTES, "there", tokenise_separately=True).tolist() == [256, *ids_of("there"), *SPECIALS]


def test_special_looking_text_adds_no_special() -> None:
    ids = prompt_ids(BYTES, "<|SPEECH_GENERATION_START|>").tolist()
    assert ids.count(261) == 1
    assert ids.count(256) == 1


@pytest.mark.parametrize("text", ["", "  \n\t"])
def test_empty_text_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="the text is empty"):
        prompt_ids(BYTES, text)
    with pytest.raises(UserError, match="the prompt text is empty"):
        prompt_ids(BYTES, "words", text)


@pytest.mark.parametrize("text", ["\u200b", "\ufeff \u202e\u202c"])
def test_invisible_text_is_empty(text: str) -> None:
    with pytest.raises(UserError, match="the text is empty"):
        prompt_ids(BYTES, text)


@pytest.mark.parametrize(
    ("text", "message"),
    [("a\x00b", r"a control character \(U\+0000 at character 2\)"), ("\x1b[31mred", r"U\+001B"), ("ab\ud800", "half of a surrogate pair")],
)
def test_what_nobody_can_speak_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        prompt_ids(BYTES, text)


@pytest.mark.parametrize("text", ["tab\tand\nlines\r\n\x0c\x85", "😀👩\u200d👩", "\u202bשלום\u202c", "中文 and английский"])
def test_everything_else_reaches_the_model(text: str) -> None:
    assert bytes(prompt_ids(BYTES, text).tolist()[1:-2]).decode() == text.strip()
