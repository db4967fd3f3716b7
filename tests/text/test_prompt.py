from __future__ import annotations

import pytest
import torch

from kalle.errors import UserError
from kalle.text.prompt import prompt_ids
from kalle.text.tokenizer import Tokenizer

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
