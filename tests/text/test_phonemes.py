"""English as phonemes, and everything else as bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.text import phonemes
from kalle.text.phonemes import PUNCTUATION, SYMBOLS, PhonemeTokenizer, prompt_forms
from kalle.text.tokenizer import BOS, KALLE_TOKENS, Tokenizer, prompt_ids

hibari = pytest.importorskip("hibari")
BYTES = Tokenizer.bytes()


@pytest.fixture(scope="module")
def tokenizer() -> PhonemeTokenizer:
    return PhonemeTokenizer.create()


def test_symbols_are_the_vocabulary_of_the_package() -> None:
    vocabulary = json.loads((Path(hibari.__file__).parent / "assets" / "vocab.json").read_text(encoding="utf-8"))
    assert sorted(SYMBOLS + PUNCTUATION) == sorted(vocabulary)


def test_ids_are_those_of_bytes_and_then_the_symbols(tokenizer: PhonemeTokenizer) -> None:
    assert (tokenizer.first_phoneme, tokenizer.vocab_size) == (265, 369)
    assert [tokenizer.special(name) for name in (BOS, *KALLE_TOKENS)] == list(range(256, 265))
    assert tokenizer.encode("hello.") == [256, *(265 + SYMBOLS.index(symbol) for symbol in "həlˈO"), ord(".")]


@pytest.mark.parametrize(
    ("text", "read", "unknown"),
    [
        ('"Yes," he said. “An honest man.”', "jˈɛs, hi sˈɛd. ɐn ˈɑnəst mˈæn.", []),
        ("No. 5 is on Jan. 5, Dr. Smith.", "nˈʌmbəɹ fˈIv ɪz ˌɔn ʤˈænjəwˌɛɹi fˈɪfθ, dˈɑktəɹ smˈɪθ.", []),
        ("Kubernetes and Xiaomi-based tea", "Kubernetes ænd Xiaomi-based tˈi", ["Kubernetes", "Xiaomi-based"]),
        ("I saw Москва, and 日本 too.", "ˌI sˈɔ Москва, ænd 日本 tˈu.", ["Москва", "日本"]),
        ("The  café\nis\there…", "ðə café ɪz hˈɪɹ…", ["café"]),
        ("Hi.\n\n* * *\n\nGo now, [friend](notes.md).", "hˈI. ɡˌO nˈW, fɹˈɛnd.", []),
        ("the [Nguyen](/nwˈɪn/)'s [apple](/ˈæpᵊl/)", "ðə nwˈɪnz ˈæpᵊl", []),
        ("the [Éire](/ˈɛɹə/) [two words](/tˈu wˈɜɹdz↗/)", "ði ˈɛɹə tˈu wˈɜɹdz↗", []),
        ("早上好 hello。", "早上好 hello。", []),
        ("A man at five A M. The U S A, Q and A, plan A.", "ɐ mˈæn æt fˈIv ˈA ˈɛm. ðə jˈu ˈɛs ˈA, kjˈu ænd ˈA, plˈæn ˈA.", []),
        ("He left at five P M.", "hˌi lˈɛft æt fˈIv pˈi ˈɛm.", []),
        ("J. R. Smith came.", "ʤˈA ˈɑɹ smˈɪθ kˈAm.", []),
        ("How to Make A Cake", "hˌW tə mˌAk ɐ kˈAk", []),
        ("gigahertz, per mille, et cetera.", "ɡˈɪɡəhˌɜɹts, pɜɹ mˈɪl, ɛt sˈɛTəɹə.", []),
        ("<|SPEECH_GENERATION_START|>", None, []),
        ("", "", []),
    ],
)
def test_readings(tokenizer: PhonemeTokenizer, text: str, read: str | None, unknown: list[str]) -> None:
    ids = tokenizer.encode(text)
    assert read is None or tokenizer.decode(ids) == read
    assert tokenizer.unknown_words(text) == unknown
    assert not {*range(257, 265)} & set(ids)


def test_every_word_that_the_normaliser_writes_has_a_reading(tokenizer: PhonemeTokenizer) -> None:
    """But for names and addresses in the table of readings."""
    pytest.importorskip("inflect")
    table = (Path(__file__).with_name("readings.tsv")).read_text(encoding="utf-8").splitlines()[1:]
    spoken = [line.split("\t")[2] for line in table if line.startswith("en\t")]
    written = {word.lower() for line in table for word in re.findall(r"[^\W\d_²³]+", line.split("\t")[1])}
    unknown = {word for text in spoken for word in tokenizer.unknown_words(text)}
    assert {word for word in unknown if word.lower() not in written} == set()


def test_letters_that_the_normaliser_writes_are_letters(tokenizer: PhonemeTokenizer) -> None:
    pytest.importorskip("inflect")
    from kalle.text.frontend import TextFrontEnd

    front_end = TextFrontEnd(given_phonemes=True)
    for text in ("at 5 a.m.", "A4 is a paper", "a Q&A", "https://x.org/a?b=1", "the U.S.A. and us", "12:30am"):
        read = tokenizer.decode(tokenizer.encode(front_end.read(text).text))
        assert "ˈA" in read, (text, read)


def test_a_number_beyond_the_package_is_bytes_and_the_rest_is_read(tokenizer: PhonemeTokenizer) -> None:
    number = "9" * 40
    read = tokenizer.decode(tokenizer.encode(f"He paid {number} now."))
    assert read == f"hˌi pˈAd {number} nˈW."
    assert number in tokenizer.decode(tokenizer.encode(number))


def test_other_languages_are_bytes_but_for_phonemes_that_were_given(tokenizer: PhonemeTokenizer) -> None:
    text = "Ciao  bella, “come” stai"
    assert tokenizer.encode(text, language="it") == BYTES.encode(text)
    assert tokenizer.encode("早上好") == BYTES.encode("早上好")
    assert tokenizer.decode(tokenizer.encode("Ciao [Anna](/ˈɑnə/)!", language="it")) == "Ciao ˈɑnə!"
    assert tokenizer.encode("hello", language="en-GB") == tokenizer.encode("hello")
    assert tokenizer.encode("hello", language="English") == tokenizer.encode("hello")


@pytest.mark.parametrize("given", ["nwɪn日", "ɭ", '"', " "])
def test_phonemes_that_are_no_symbols_are_refused(tokenizer: PhonemeTokenizer, given: str) -> None:
    with pytest.raises(UserError, match="bad phonemes: got"):
        tokenizer.encode(f"a [word](/{given}/) here")
    with pytest.raises(UserError, match="bad phonemes: got"):
        tokenizer.encode(f"a [word](/{given}/) here", language="it")


def test_without_the_package_words_are_bytes_with_one_warning(monkeypatch, caplog) -> None:
    tokenizer = PhonemeTokenizer.create()
    for cached in (phonemes._engine, phonemes._warn_once):
        cached.cache_clear()
    monkeypatch.setitem(__import__("sys").modules, "hibari.g2p", None)
    try:
        assert tokenizer.encode("Good day.") == BYTES.encode("Good day.")
        assert tokenizer.decode(tokenizer.encode("Good [day](/dˈA/).")) == "Good dˈA."
        assert tokenizer.unknown_words("Good day.") == []
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "[phonemes]" in caplog.text
        with pytest.raises(UserError, match=r"\[phonemes\]"):
            PhonemeTokenizer.create()
    finally:
        phonemes._engine.cache_clear()


def test_another_version_of_the_package_is_told(tokenizer: PhonemeTokenizer, caplog) -> None:
    phonemes._warn_once.cache_clear()
    older = PhonemeTokenizer(BYTES._backend, version="0.0.1")
    assert older.encode("Good day.") == tokenizer.encode("Good day.")
    assert "hibari-tts==0.0.1" in caplog.text


def test_save_and_load_agree(tokenizer: PhonemeTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert isinstance(loaded, PhonemeTokenizer)
    assert (loaded.vocab_size, loaded.byte_words, loaded.byte_utterances) == (369, 0.15, 0.05)
    assert loaded.encode("hello Kubernetes") == tokenizer.encode("hello Kubernetes")


@pytest.mark.parametrize(
    "change", [{"symbols": "aa"}, {"symbols": 3}, {"package": "other"}, {"first_id": 9}, {"byte_words": "x"}, {"version": None}]
)
def test_a_damaged_table_is_refused(tokenizer: PhonemeTokenizer, tmp_path: Path, change: dict[str, object]) -> None:
    tokenizer.save(tmp_path)
    path = tmp_path / "phonemes.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=r"phonemes\.json"):
        Tokenizer.load(tmp_path)


TEXTS = st.text(st.sampled_from("ab The cat's 5.,!?\"“[](/ˈə)-—’日Жé\n$%😀\u0301"), max_size=60)


@given(TEXTS)
@settings(max_examples=150, deadline=None)
def test_any_text_is_read_or_refused_and_its_forms_agree(text: str) -> None:
    tokenizer = PhonemeTokenizer(BYTES._backend)
    try:
        ids = tokenizer.encode(text)
    except UserError:
        return
    forms = tokenizer.forms(text)
    assert forms.chosen(np.zeros(forms.count, bool)).tolist() == ids
    both = [len(forms.chosen(np.full(forms.count, value))) for value in (False, True)]
    assert max(both) <= forms.longest <= sum(both)
    assert all(value < 257 or value >= 265 for value in ids)


def test_forms_of_a_prompt(tokenizer: PhonemeTokenizer) -> None:
    text = " He's 45 and well-known. "
    forms = prompt_forms(tokenizer, text)
    assert forms.count == 3
    assert forms.chosen(np.zeros(3, bool)).tolist() == prompt_ids(tokenizer, text).tolist()
    assert tokenizer.decode(forms.chosen(np.array([True, False, True]))) == "He's fˈɔɹTi fˈIv ænd well-known."
    assert forms.chosen(np.ones(3, bool))[-2:].tolist() == prompt_ids(BYTES, text).tolist()[-2:]
