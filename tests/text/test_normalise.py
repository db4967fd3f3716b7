from __future__ import annotations

import builtins

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.text.english import english_words
from kalle.text.normalise import normalise

pytest.importorskip("inflect")
pytest.importorskip("wetext")


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("It costs $3.50.", "It costs three dollars and fifty cents."),
        ("$1, $1.01, £0.99", "one dollar, one dollar and one cent, ninety-nine pence"),
        ("€5, 5€, ¥500", "five euros, five euros, five hundred yen"),
        ("$1,000.50 or $1.5 million", "one thousand dollars and fifty cents or one point five million dollars"),
        ("$10-20", "ten to twenty dollars"),
        ("Dr. Smith, Mr. and Mrs. Lee", "Doctor Smith, Mister and Missus Lee"),
        ("e.g. this, i.e. that, etc. Then more etc., yes", "for example this, that is that, et cetera. Then more et cetera, yes"),
        ("12/05/2024", "December fifth, twenty twenty-four"),
        ("13/25/2024", "thirteen/twenty-five/twenty twenty-four"),
        ("2024-05-12", "May twelfth, twenty twenty-four"),
        ("On May 12, 2024 and on 3 June", "On May twelfth, twenty twenty-four and on the third of June"),
        ("the 3rd of May, Jan. 5", "the third of May, January fifth"),
        ("3.14 and 0.05", "three point one four and zero point zero five"),
        ("2nd, 21st, 100th, 1st-class", "second, twenty-first, one hundredth, first-class"),
        ("10km, 10 km, 1 kg, 5 ft, 10 m.", "ten kilometers, ten kilometers, one kilogram, five feet, ten meters."),
        ("5'6\" or 4 ft 2 in. above", "five feet six inches or four feet two inches above"),
        ("72°F, 5 °C, 50%", "seventy-two degrees Fahrenheit, five degrees Celsius, fifty percent"),
        ("at 5:30 pm, 5 p.m., 10:05, 12:00, 00:30", "at five thirty P M, five P M, ten oh five, twelve o'clock, zero thirty"),
        ("1,234,567", "one million two hundred thirty-four thousand five hundred sixty-seven"),
        ("1000 and 1,000 and 1100", "one thousand and one thousand and eleven hundred"),
        ("in 1905, 1995, 2005, 2024", "in nineteen oh five, nineteen ninety-five, two thousand five, twenty twenty-four"),
        ("the 1990s, 1900s, 2000s, '80s", "the nineteen nineties, nineteen hundreds, two thousands, eighties"),
        ("3/4, 1/2, 22/7, 2½", "three quarters, one half, twenty-two over seven, two and one half"),
        ("No. 7, #1, no. 3. No. I said", "number seven, number one, number three. No. I said"),
        ("call 555-1234", "call five five five, one two three four"),
        ("+1 555 123 4567", "plus one, five five five, one two three, four five six seven"),
        ("1914–1918, 10-15", "nineteen fourteen to nineteen eighteen, ten to fifteen"),
        ("-5, F-16", "minus five, F-sixteen"),
        ("A4, MP3, 007", "A four, MP three, zero zero seven"),
        ("version 2.0.1", "version two point zero point one"),
        ("World War II, Henry VIII", "World War two, Henry VIII"),
        ("AT&T 24/7", "AT and T twenty-four seven"),
        ("a 😀 “5” \"6\" [7] *8*", "a 😀 “five” \"six\" [seven] *eight*"),
        ("line\nbreaks  and\tspace", "line breaks and space"),
        ("don't change café, naïve", "don't change café, naïve"),
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
        ("价格是3.5元", "价格是三点五元"),
        ("占50%，是1/3", "占百分之五十，是三分之一"),
        ("他有3个苹果", "他有三个苹果"),
        ("第2名,共1,234元", "第二名,共一千二百三十四元"),
        ("下午5:30", "下午五点三十分"),
        ("走了10km，-5℃", "走了十公里，负五摄氏度"),
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
    kept = normalise("ten to the 10³", "en")
    assert kept.text == "ten to the ten³"
    assert kept.warnings == ("left as written: ³",)


@given(st.text(st.sampled_from("0123456789 .,:/-+$£€%'\"°stndrhamkgAVI½–&@=~#é中😀ش"), max_size=25))
@settings(max_examples=300, deadline=None)
def test_english_leaves_no_digit_and_drops_no_foreign_letter(text: str) -> None:
    spoken = english_words(text)
    assert not any(character in "0123456789" for character in spoken)
    assert [c for c in spoken if c in "é中😀ش"] == [c for c in text if c in "é中😀ش"]


@given(st.text(st.sampled_from('0123456789 .,:/-%元年月日个第"中文😀é،ش'), max_size=25))
@settings(max_examples=150, deadline=None)
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
