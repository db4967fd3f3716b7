from __future__ import annotations

import builtins
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.text.english import english_words
from kalle.text.normalise import normalise

pytest.importorskip("inflect")
pytest.importorskip("wetext")


READINGS = [line.split("\t") for line in Path(__file__).with_name("readings.tsv").read_text(encoding="utf-8").splitlines()[1:]]
"""Language, text as written, text as spoken."""


def test_the_table_is_long_and_has_no_text_twice() -> None:
    texts = [(language, written) for language, written, _ in READINGS]
    assert len(texts) == len(set(texts)) >= 200


@pytest.mark.parametrize("language", ["en", "zh"])
def test_readings(language: str) -> None:
    """Each alone, and in a sentence where its end allows that."""
    for _, written, spoken in (reading for reading in READINGS if reading[0] == language):
        assert normalise(written, language).text == spoken
        assert normalise(spoken, language).text == spoken, "reading a text twice changes nothing"


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("1,999 in 1999, 1,200 points", "one thousand nine hundred ninety-nine in nineteen ninety-nine, one thousand two hundred points"),
        ("at 5 p.m. on 2 Main St. He left", "at five P M on two Main Street. He left"),
        ("Dr. Wu, Mr. and Mrs. Lee, etc. Then more etc., yes", "Doctor Wu, Mister and Missus Lee, et cetera. Then more et cetera, yes"),
        ("a 😀 “5” \"6\" [7] *8*", "a 😀 “five” \"six\" [seven] *eight*"),
        ("line\nbreaks  and\tspace", "line breaks and space"),
        ("don't change café, naïve", "don't change café, naïve"),
        ("No. I said no. 3. No.", "No. I said number three. No."),
        ("13/25/2024", "thirteen/twenty-five/twenty twenty-four"),
        ("It costs $1,234.50, or £0.99.", "It costs one thousand two hundred thirty-four dollars and fifty cents, or ninety-nine pence."),
    ],
)  # fmt: skip
def test_english(written: str, spoken: str) -> None:
    result = normalise(written, "en")
    assert result.text == spoken
    assert result.warnings == ()


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("今天是2024年5月12日。", "今天是二零二四年五月十二日。"),
        ("第2名,共1,234元", "第二名,共一千二百三十四元"),
        ("上世纪80-90年代,他2次去北京。", "上世纪八十到九十年代,他两次去北京。"),
        ('他说"5"个😀', '他说"五"个😀'),
        ("你好，世界！", "你好，世界！"),
        ("全角１２３", "全角一百二十三"),
    ],
)
def test_chinese(written: str, spoken: str) -> None:
    assert normalise(written).text == spoken


def test_what_cannot_be_read_is_kept_and_told() -> None:
    assert normalise("Привет 5").text == "Привет 5"
    assert "no rules for language 'ru'" in normalise("Привет 5").warnings[0]
    kept = normalise("page Ⅷ of 10", "en")
    assert kept.text == "page Ⅷ of ten"
    assert kept.warnings == ("left as written: Ⅷ",)


@given(st.text(st.sampled_from("0123456789 .,:/-+$£€%'\"°stndrhamkgAVI½–&@=~#é中😀ش"), max_size=25))
@settings(max_examples=150, deadline=None)
def test_english_leaves_no_digit_and_drops_no_foreign_letter(text: str) -> None:
    spoken = english_words(text)
    assert not any(character in "0123456789" for character in spoken)
    assert [c for c in spoken if c in "é中😀ش"] == [c for c in text if c in "é中😀ش"]


@given(st.text(st.sampled_from('0123456789 .,:/-%元年月日个第"中文😀é،ش'), max_size=25))
@settings(max_examples=60, deadline=None)
def test_chinese_drops_no_foreign_letter(text: str) -> None:
    spoken = normalise(text, "zh").text
    assert [c for c in spoken if c in "é😀ش"] == [c for c in text if c in "é😀ش"]
    assert "\\" not in spoken


def test_a_long_text_is_read_in_pieces() -> None:
    assert normalise("5 " * 3000, "en").text == " ".join(["five"] * 3000)
    assert normalise("a" * 3000 + " 5", "en").text == "a" * 3000 + " five"


@pytest.mark.parametrize(("language", "library"), [("en", "inflect"), ("zh", "wetext")])
def test_without_the_library_the_message_names_the_extra(monkeypatch, language: str, library: str) -> None:
    from kalle.text import english
    from kalle.text import normalise as module

    for cached in (english._engine, module._wetext):
        cached.cache_clear()
    real = builtins.__import__

    def missing(name: str, *rest: object, **named: object) -> object:
        if name == library:
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match=rf"needs {library}.*\[text\]"):
        normalise("5 个", language)
