from __future__ import annotations

import pytest

from kalle.errors import UserError, one_line
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.weights import resolve_weights


@pytest.mark.parametrize("character", ["\n", "\r", "\x1b", "\x85", "\u2028", "\u2029"])
def test_the_text_of_an_error_is_one_line(character: str) -> None:
    message = str(UserError(f"unknown dtype: got 'a{character}b', expected auto"))
    assert message == f"unknown dtype: got 'a{ascii(character)[1:-1]}b', expected auto"
    assert message.splitlines() == [message] == [one_line(message)]


def test_a_long_text_of_an_error_keeps_its_beginning_and_its_remedy() -> None:
    message = str(UserError(f"bad value: got {'9' * 50_000}, expected a number; correct it"))
    assert message.startswith("bad value: got 999")
    assert message.endswith("999, expected a number; correct it")
    assert "characters left out" in message
    assert len(message) <= 2000
    assert str(UserError(message)) == message
    assert str(UserError("9" * 2000)) == "9" * 2000


def test_letters_of_any_script_stay_as_they_are() -> None:
    assert str(UserError("没有 'café  x'")) == "没有 'café  x'"


@pytest.mark.parametrize("read", [resolve_weights, Kalle.from_pretrained])
def test_a_path_that_cannot_exist_is_a_line(read: object) -> None:
    with pytest.raises(UserError, match=r"bad path: got 'é+' .*correct it"):
        read("é" * 300)  # type: ignore[operator]
