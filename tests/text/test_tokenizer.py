from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.text.tokenizer import BOS, KALLE_TOKENS, Tokenizer, prompt_ids

TEXTS = [
    "Hello, world.",
    "你好，世界",
    "naïve  café\n\ttabs",
    "👩‍🚀🚀",
    "1234567 3.14",
    "\x00\x07",
    " ",
    "<|SPEECH_GENERATION_START|>x<|begin_of_text|>",
]
BYTES = Tokenizer.bytes()


def test_bytes_ids_are_the_bytes_then_the_specials() -> None:
    assert BYTES.encode("aé") == [256, 97, 0xC3, 0xA9]
    assert BYTES.special(BOS) == 256
    assert [BYTES.special(name) for name in KALLE_TOKENS] == list(range(257, 265))
    assert BYTES.vocab_size == 265


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_encode_utf8_and_never_a_special(text: str) -> None:
    assert BYTES.encode(text)[1:] == list(text.encode())
    assert BYTES.decode(BYTES.encode(text)) == text


@given(st.text(alphabet=st.characters(codec="utf-8"), max_size=60))
def test_bytes_round_trip(text: str) -> None:
    assert BYTES.decode(BYTES.encode(text)) == text


def test_long_text_is_encoded_whole() -> None:
    assert len(BYTES.encode("ab" * 50_000)) == 100_001


def test_save_and_load_agree(tmp_path) -> None:
    BYTES.save(tmp_path / "tokenizer")
    loaded = Tokenizer.load(tmp_path / "tokenizer")
    assert [loaded.encode(text) for text in TEXTS] == [BYTES.encode(text) for text in TEXTS]
    assert sorted(path.name for path in (tmp_path / "tokenizer").iterdir()) == ["tokenizer.json"]


def test_tokens_added_without_the_special_mark_cannot_be_injected(tmp_path) -> None:
    BYTES.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    for token in content["added_tokens"]:
        token["special"] = False
    path.write_text(json.dumps(content))
    text = "a<|SPEECH_GENERATION_START|>b"
    assert Tokenizer.load(tmp_path).encode(text)[1:] == list(text.encode())


def test_bad_input(tmp_path) -> None:
    with pytest.raises(UserError, match="no tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="surrogate"):
        BYTES.encode("a\ud800")
    with pytest.raises(KeyError):
        BYTES.special("a")


def test_a_vocabulary_without_the_tokens_of_kalle_is_refused(tmp_path) -> None:
    BYTES.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = content["added_tokens"][:-1]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"lacks <\|SPEECH_UNDERSTANDING_END\|>"):
        Tokenizer.load(tmp_path)


def test_a_vocabulary_that_cannot_hold_a_text_is_one_line(tmp_path) -> None:
    BYTES.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["unk_token"] = "none"
    del content["model"]["vocab"]["a"]
    path.write_text(json.dumps(content))
    damaged = Tokenizer.load(tmp_path)
    assert damaged.encode("b")[1:] == BYTES.encode("b")[1:]
    with pytest.raises(UserError, match="cannot read the text") as caught:
        damaged.encode("a")
    assert "\n" not in str(caught.value)


SPECIALS = [264, 261]


def test_order_without_a_prompt() -> None:
    ids = prompt_ids(BYTES, "Hi.")
    assert ids.dtype == torch.int64
    assert ids.tolist() == [256, *b"Hi.", *SPECIALS]


def test_prompt_and_text_are_joined_with_one_space() -> None:
    assert prompt_ids(BYTES, " there ", "Hi.\n").tolist() == [256, *b"Hi. there", *SPECIALS]


def test_tokenise_separately_joins_the_ids_with_nothing_between() -> None:
    assert prompt_ids(BYTES, " there ", "Hi. ", tokenise_separately=True).tolist() == [256, *b"Hi.  there ", *SPECIALS]
    assert prompt_ids(BYTES, "there", tokenise_separately=True).tolist() == [256, *b"there", *SPECIALS]


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
