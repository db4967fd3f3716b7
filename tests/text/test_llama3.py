from __future__ import annotations

import base64
import importlib.util
from pathlib import Path

import pytest

from kalle.errors import UserError
from kalle.text.tokenizer import BOS, KALLE_TOKENS, SPLIT_PATTERN, Tokenizer, llama3_specials, llama3_tokenizer

TEXTS = [
    "Hello, world! I've been told it's 3.14159 and 1234567.",
    "今天天气很好，我们去公园散步吧。",
    "混合 mixed 文本 with 数字 2024 年",
    "emoji 👩‍🚀🚀🇩🇪 done",
    "line\n\n  next\r\n\ttab   trailing   ",
    "don't DON'T we'LL",
    "ÄÖÜ ß éàç русский עברית العربية",
    "a" * 300,
    "\x00\x01",
    "",
    "<|SPEECH_GENERATION_START|> and <|begin_of_text|><|eot_id|>",
]


@pytest.fixture(scope="module")
def model_file() -> Path:
    spec = importlib.util.find_spec("llama_models")
    if spec is None or spec.origin is None:
        pytest.skip("the package llama-models, which holds Llama 3's tokenizer.model, is not installed")
    return Path(spec.origin).parent / "llama3" / "tokenizer.model"


@pytest.fixture(scope="module")
def llama3(model_file: Path) -> Tokenizer:
    return llama3_tokenizer(model_file)


def test_special_ids_are_those_of_the_release(llama3: Tokenizer) -> None:
    assert llama3.special(BOS) == 128000
    assert [llama3.special(name) for name in KALLE_TOKENS] == list(range(128256, 128264))
    assert llama3.vocab_size == 128264
    assert llama3_specials()[4:6] == ["<|finetune_right_pad_id|>", "<|reserved_special_token_2|>"]
    assert llama3_specials()[-1] == "<|reserved_special_token_247|>"


def test_ids_equal_tiktoken(llama3: Tokenizer, model_file: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in (line.split() for line in model_file.read_bytes().splitlines())}
    reference = tiktoken.Encoding("llama3", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={BOS: 128000})
    for text in TEXTS:
        assert llama3.encode(text) == [128000, *reference.encode_ordinary(text)], text


def test_user_text_never_becomes_a_special_and_round_trips(llama3: Tokenizer) -> None:
    for text in TEXTS:
        ids = llama3.encode(text)
        assert max(ids[1:], default=0) < 128000
        assert llama3.decode(ids) == text


def test_save_and_load_keep_ids_and_safety(llama3: Tokenizer, tmp_path: Path) -> None:
    llama3.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert [loaded.encode(text) for text in TEXTS] == [llama3.encode(text) for text in TEXTS]


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="file not found"):
        llama3_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x0b not base64")
    with pytest.raises(UserError, match="not a tiktoken file"):
        llama3_tokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"YQ== 0\nYg== 1\n")
    with pytest.raises(UserError, match="2 ranks"):
        llama3_tokenizer(tmp_path / "tokenizer.model")
