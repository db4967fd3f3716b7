"""Characters that weights never learnt."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.text.frontend import LearntTexts, TextFrontEnd, check_language, learnt_characters, map_characters

ENGLISH = string.ascii_letters + ",;:'!?.-"
RUSSIAN = "абвгдежзийклмнопрстуфхцчшщъыьэюяё,.!?"
LEARNT = LearntTexts({"en": ENGLISH, "ru": RUSSIAN}, capital_words=False)


@pytest.mark.parametrize(
    ("written", "spoken"),
    [
        ("“Ten years,” he said. “He doesn’t walk.”", "Ten years, he said. He doesn't walk."),
        ('"They have been living here."', "They have been living here."),
        ("«Yes», „no“ and ‘well, don’t’", "Yes, no and well, don't"),
        ("The children like\nto go\tto\u00a0school\u2009now.\r\n", "The children like to go to school now."),
        ("He — the man – came -- late - yes…", "He, the man, came, late, yes..."),
        ("well‑known, well-known", "well-known, well-known"),
        ("(See below.) [Or] {not}, he said (twice)!", "See below. Or, not, he said, twice!"),
        ("STOP THE CAR NOW. NASA met the FBI and I. It is THE END!", "Stop the car now. Nasa met the F B I and I. It is the end!"),
        ("The Children Like to Go to School", "The children like to go to school"),
        ("I met John Smith in London.", "I met John Smith in London."),
        ("**Bold** _it_ `code` ~~old~~ <b>html</b><br/> <a href='x y'>a</a> &amp; [link](http://x.y)", "Bold it code old html a and link"),
        ("# Heading\n\n- one\n- two.\n1. three\n***\nend", "Heading. one, two. three. end"),
        ("if a <b and c> d", "if a b and c d"),
        ("snake_case and/or a|b", "snake case and or a, b"),
        ("café Ærø naïve ﬁsh ｆｕｌｌ Straße e\u0301", "cafe Aero naive fish full Strasse e"),
        ("100 % & a=b @ home", "100 percent and a equals b at home"),
        ("soft\u00adhyphen, zero\u200bwidth\ufeff", "softhyphen, zerowidth"),
        ("Привет, Мир", "привет, мир"),
        ("the word привет", "the word привет"),
        ("[Nguyen](/nwˈɪn/) came", "Nguyen came"),
    ],
)
def test_unlearnt_characters_are_written_in_learnt_ones(written: str, spoken: str) -> None:
    assert map_characters(written, LEARNT).text == spoken
    assert map_characters(spoken, LEARNT).text == spoken


def test_plain_text_stays_as_it_is() -> None:
    text = "The children like to go to school; I don't, he said: well-known 'words'... Why? Yes!"
    assert map_characters(text, LEARNT) == map_characters(text, LearntTexts())
    assert map_characters(text, LEARNT).text == text


def test_nothing_is_known_of_the_weights() -> None:
    text = "你好 *x* “y” — 5 [z](/k/)"
    assert map_characters(f" {text}\n", LearntTexts(), given_phonemes=True).text == text
    assert TextFrontEnd().read(text).text == "你好 *x* “y” — 5 z"
    assert TextFrontEnd(given_phonemes=True).read(text).text == text
    assert map_characters(text, LearntTexts({"zh": None})).warnings == ()


@pytest.mark.parametrize(
    ("text", "spoken", "named"),
    [
        ("I ❤ you 😀", "I you", ["signs, which are left out: ❤ 😀"]),
        ("你好，世界", "你好,世界", ["language 'zh', and these weights speak en, ru"]),
        ("The word 日本 here", "The word 日本 here", ["letters (Cjk): 日 本"]),
        ("5 котов", "5 котов", ["figures: 5"]),
    ],
)
def test_what_nothing_stands_for_is_named(text: str, spoken: str, named: list[str]) -> None:
    mapped = map_characters(text, LEARNT)
    assert mapped.text == spoken
    assert len(mapped.warnings) == len(named)
    assert all(name in warning for name, warning in zip(named, mapped.warnings, strict=True))


def test_what_the_weights_say_goes_before_the_table() -> None:
    assert map_characters("a — b & c", LearntTexts({"en": ENGLISH + "—"}, replace={"&": "n"})).text == "a — b n c"
    assert map_characters('"A" & é', LearntTexts({"en": ENGLISH + '"é'})).text == '"A" and é'
    assert map_characters("AB, Ç; d", LearntTexts({"en": "abcd"})).text == "ab c d"


def test_a_language_that_the_weights_lack_is_refused() -> None:
    for language in (None, "en", "RU"):
        check_language(language, LEARNT)
    check_language("zh", LearntTexts())
    with pytest.raises(UserError, match="do not speak 'zh': expected en or ru"):
        check_language("zh", LEARNT)


@pytest.mark.parametrize(
    "wrong", [{"characters": {"english": "a"}}, {"characters": {"en": 3}}, {"replace": {"ab": ""}}, {"replace": {"a": 1}}]
)
def test_a_table_of_other_things_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(UserError, match="expected"):
        LearntTexts(**wrong)  # type: ignore[arg-type]


def test_figures_that_were_never_learnt_are_read_out() -> None:
    pytest.importorskip("inflect")
    front_end = TextFrontEnd(LEARNT, given_phonemes=True)
    assert front_end.read("I have 5 cats — *3* [dogs](/dˈɔɡz/) 2.").text == "I have five cats, three [dogs](/dˈɔɡz/) two."
    assert TextFrontEnd(LEARNT, language="ru").read("5 котов").warnings != ()
    assert TextFrontEnd(LearntTexts({"en": ENGLISH + string.digits})).read("5 cats").text == "5 cats"
    assert TextFrontEnd(normalise=True).read("5 cats").text == "five cats"


def test_a_tokenizer_that_reads_phonemes_gets_our_reading_of_english() -> None:
    pytest.importorskip("inflect")
    learnt = LearntTexts({"en": ENGLISH + string.digits + "$"})
    written = "Agent 007 paid US$5 for [dogs](/dˈɔɡz/)."
    assert TextFrontEnd(learnt, given_phonemes=True).read(written).text == "Agent zero zero seven paid five US dollars for [dogs](/dˈɔɡz/)."
    assert TextFrontEnd(given_phonemes=True).read("Agent 007").text == "Agent zero zero seven"
    assert TextFrontEnd(learnt, given_phonemes=True, normalise=False).read(written).text == written
    assert TextFrontEnd(LEARNT, normalise=False).read("5 cats").text == "5 cats"
    for language in ("de", "zh"):
        assert TextFrontEnd(LearntTexts({language: None}), language, given_phonemes=True).read("5 A").text == "5 A"


@given(st.text(st.sampled_from("abC'’‘ “\"—-,.;(é日Ж5*_#`>[]()/\n😀\u0301&x"), max_size=50))
@settings(max_examples=100, deadline=None)
def test_only_what_is_named_stays_unlearnt(text: str) -> None:
    mapped = map_characters(text, LEARNT, "en")
    named = {character for warning in mapped.warnings for character in warning.partition(": ")[2].split()}
    assert set(mapped.text) - named <= set(ENGLISH + RUSSIAN + " ")
    assert mapped.text == " ".join(mapped.text.split())
    assert [c for c in mapped.text if c in "日Ж5"] == [c for c in text if c in "日Ж5"] or "](" in text or "\n" in text


def test_learnt_characters_are_those_of_enough_texts() -> None:
    texts = ["A plain text."] * 100 + ["a rare ×"] * 3
    assert learnt_characters(texts) == ".Aaeilnptx"
    assert learnt_characters(["ab"]) == "ab"
    assert learnt_characters([]) == ""
