from __future__ import annotations

import builtins

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.text.languages import LONGEST_CHARACTERS, Sentence, detect_language, has_words, split_sentences, unspoken, weight

MIXED = st.text(
    st.sampled_from("ab AB.!?,;:…\n\r\t\"'“”()«»。！？；，「」中文字かな한국שלוםПр😀\u200d\u0301\u202e0123-—*#\u2029\x0b\x85"), max_size=200
)


def texts(text: str, language: str | None = None) -> list[str]:
    return [sentence.text for sentence in split_sentences(text, language)]


def check_accounted(text: str, sentences: list[Sentence]) -> None:
    """Sentences and gaps make the text, and a gap holds space or what ``unspoken`` tells."""
    place, told = 0, dict(unspoken(text, sentences))
    for sentence in sentences:
        assert place <= sentence.start < sentence.end
        assert text[sentence.start : sentence.end] == sentence.text == sentence.text.strip()
        assert has_words(sentence.text)
        place = sentence.end
    assert place <= len(text)
    gaps = [text[a:b] for a, b in zip([0, *(s.end for s in sentences)], [*(s.start for s in sentences), len(text)], strict=True)]
    assert [gap.strip() for gap in gaps if gap.strip()] == list(told.values())
    assert not any(has_words(gap) for gap in gaps)


@given(MIXED, st.integers(1, 40))
@settings(max_examples=100, deadline=None)
def test_nothing_is_lost_and_all_pieces_fit(text: str, limit: int) -> None:
    sentences = split_sentences(text, None, lambda piece: len(piece) <= limit)
    check_accounted(text, sentences)
    assert all(len(sentence.text) <= limit for sentence in sentences)


@given(st.text(max_size=300))
@settings(max_examples=100, deadline=None)
def test_nothing_is_lost_of_any_text(text: str) -> None:
    check_accounted(text, split_sentences(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "The ratio is about 3.14 today. Dr. Smith came, e.g. by car. He said: “Go now. At once!” Then he left us.",
            ["The ratio is about 3.14 today.", "Dr. Smith came, e.g. by car.", "He said: “Go now. At once!”", "Then he left us."],
        ),
        (
            "今天天气很好。你要出去吗？我们走得太远了！回家吧，好吗。",
            ["今天天气很好。", "你要出去吗？", "我们走得太远了！", "回家吧，好吗。"],
        ),
        ("春天来了花都开了；夏天来了天气热了。", ["春天来了花都开了；", "夏天来了天气热了。"]),
        ("他说：“你好。我走了。”然后离开了这里。", ["他说：“你好。我走了。”", "然后离开了这里。"]),
        ("Wait for it... what was that? No way in the world!!", ["Wait for it... what was that?", "No way in the world!!"]),
        ("Привет, мой друг. Как твои дела?", ["Привет, мой друг.", "Как твои дела?"]),
        ("שלום לכולם היום. מה שלומך היום?", ["שלום לכולם היום.", "מה שלומך היום?"]),
        ("彼は「はい。」と言った。そして帰りました。", ["彼は「はい。」と言った。", "そして帰りました。"]),
        ("Pi is 3.14159265. 1,234 is much bigger.", ["Pi is 3.14159265.", "1,234 is much bigger."]),
        ("It is approx. 3.5 kg of it. It is new and heavy.", ["It is approx. 3.5 kg of it.", "It is new and heavy."]),
        (
            "Version 1.2.3. is out for all. We took the version 1.2.3. It is all so very new.",
            ["Version 1.2.3. is out for all.", "We took the version 1.2.3.", "It is all so very new."],
        ),
        ("a", ["a"]),
        ("", []),
        ("😀 … !", []),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert texts(text) == expected


ONE_PIECE = [
    ("10:45:30", "The train leaves at {} sharp."),
    ("5 p.m.", "He came at {} yesterday."),
    ("$1,234,567.89", "They paid {} for it."),
    ("3.5 million", "About {} people live there."),
    ("Ms. Johnson", "I asked {} about the plan."),
    ("Prof. St. John", "We met {} in town."),
    ("Mr. T. J. Smith", "We met {} in town."),
    ("No. 5", "This is {} of the list."),
    ("Jan. 5, 2024", "On {} it rained a lot."),
    ("+44 20 7946 0958", "Please call {} at once."),
    ("https://a.example.com/b.c?d=e,f;g", "Read {} now please."),
    ("bob.smith@example.co.uk", "Write to {} now please."),
    ("「今日は。行きましょう！」と", "彼は{}言った。"),
    ("『元気？』って", "昨日{}聞いた。"),
]


@pytest.mark.parametrize(("whole", "sentence"), ONE_PIECE)
def test_times_numbers_names_addresses_and_quotations_are_not_cut(whole: str, sentence: str) -> None:
    """Neither as the end of a sentence nor where a sentence is too long, whatever stands before."""
    text = sentence.format(whole)
    assert texts(text) == [text]
    for before in range(0, 40, 5):
        longer = "word " * before + text
        pieces = [s.text for s in split_sentences(longer, None, lambda piece: len(piece) <= 45)]
        assert sum(whole in piece for piece in pieces) == 1, pieces


def test_short_sentences_join_their_neighbour_in_the_paragraph() -> None:
    assert texts("It was very dark. No. He waited for us. Yes.") == ["It was very dark.", "No. He waited for us. Yes."]
    assert texts("Chapter One\n\nIt was very dark.") == ["Chapter One", "It was very dark."]
    assert weight("Ab1 中!") == 6


def test_paragraphs_and_line_breaks() -> None:
    text = "The first line\r\ngoes on here. It ends.\r\n \r\nThe second paragraph.\n* * *\n\n\n* * *\n\nThe third one."
    found = split_sentences(text)
    assert [(s.spoken, s.ends_paragraph) for s in found] == [
        ("The first line goes on here. It ends.", True),
        ("The second paragraph. * * *", True),
        ("The third one.", True),
    ]
    assert unspoken(text, found) == [(text.rindex("* * *"), "* * *")]


def test_a_long_sentence_is_cut_at_the_best_place_and_says_so() -> None:
    def cuts(text: str, limit: int) -> list[tuple[str, bool]]:
        return [(s.text, s.cut) for s in split_sentences(text, "en", lambda piece: len(piece) <= limit)]

    assert cuts("one two three; four five, six seven eight nine ten", 30) == [
        ("one two three; four five,", True),
        ("six seven eight nine ten", False),
    ]
    assert cuts("aaaa bbbb cccc dddd eeee; ffff gggg", 28) == [("aaaa bbbb cccc dddd eeee;", True), ("ffff gggg", False)]
    assert cuts("one two three four five six", 20)[0] == ("one two three", True)
    assert [text for text, _ in cuts("x" * 25, 10)] == ["x" * 10, "x" * 10, "x" * 5]
    assert cuts("e\u0301" * 6, 5)[0][0] == "e\u0301" * 2


def test_sentences_inside_a_long_quotation_are_found() -> None:
    text = "“" + "He went to the market to buy some milk. " * 14 + "“He never came home.”” she said."
    found = split_sentences(text)
    assert len(text) > LONGEST_CHARACTERS
    assert not any(sentence.cut for sentence in found)
    assert found[1].text == "He went to the market to buy some milk."
    assert found[-1].text.startswith("“He never")


@pytest.mark.parametrize(
    "text",
    [
        "a" * 100_000,
        "This is a sentence with words. " * 3226,
        "字" * 100_000,
        "(a. " * 25_000,
        '"( ' * 33_000,
        "\n\n" * 50_000,
        "e\u0301" * 50_000,
    ],
)
def test_a_hundred_thousand_characters(text: str) -> None:
    check_accounted(text, split_sentences(text))


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Hello", "en"),
        ("你好 hello", "zh"),
        ("A long English sentence with 你 in it", "en"),
        ("これはペンです", "ja"),
        ("漢字とかな", "ja"),
        ("안녕하세요", "ko"),
        ("Привет", "ru"),
        ("שלום", "he"),
        ("سلام", "ar"),
        ("123 😀", "en"),
        ("", "en"),
    ],
)
def test_language_by_script(text: str, language: str) -> None:
    assert detect_language(text) == language


def test_the_language_of_latin_script_can_be_given() -> None:
    assert detect_language("Guten Tag", default="de") == "de"


def test_without_the_library_the_message_names_it(monkeypatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: object, **named: object) -> object:
        if name == "sentencex":
            raise ImportError(name)
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(UserError, match="pip install sentencex"):
        split_sentences("One. Two.")
