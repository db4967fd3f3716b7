from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from kalle.evaluation.intelligibility import (
    alignment,
    judge,
    last_word_heard,
    length_curve,
    repeated_words,
    row_alignment,
    sound_classes,
    sound_confusions,
    word_facts,
    word_table,
)
from kalle.evaluation.word_errors import corpus_style

TEXT = "the boat went down the river"


def judged(transcript: str | None, **more: Any) -> dict[str, Any]:
    row = {"system": "s", "id": "1", "text": TEXT, "audio_s": 2.0} | ({} if transcript is None else {"transcript": transcript}) | more
    judge([row], corpus_style)
    return row


def test_alignment_names_every_word() -> None:
    edits = alignment(TEXT.split(), ["the", "coat", "went", "went", "down", "river"])
    kinds = [(edit.kind, edit.word, edit.heard) for edit in edits if edit.kind != "equal"]
    assert kinds == [("substitute", "boat", "coat"), ("insert", "", "went"), ("delete", "the", "")]
    assert [edit.word for edit in edits if edit.kind != "insert"] == TEXT.split()
    assert [edit.heard for edit in edits if edit.kind != "delete"] == ["the", "coat", "went", "went", "down", "river"]
    assert [edit.kind for edit in alignment([], ["uh"])] == ["insert"]
    assert [edit.kind for edit in alignment(["a"], [])] == ["delete"]


@pytest.mark.parametrize(
    ("transcript", "more", "wrong"),
    [
        (TEXT, {}, {}),
        ("The boat went down the rivers!", {}, {"substituted": 1}),
        ("the boat went down the", {}, {"deleted": 1, "last_word_missing": 1, "early_stop": 1}),
        ("the boat went", {"stop_reason": "max_frames"}, {"deleted": 3, "last_word_missing": 1}),
        (TEXT + " river river river", {}, {"inserted": 3, "repetition": 1}),
        (TEXT + " again", {}, {"inserted": 1, "last_word_missing": 0}),
        (TEXT, {"stop_reason": "repetition"}, {"repetition": 1}),
        (TEXT, {"early_stop": 1.0, "stop_reason": "end"}, {"early_stop": 1}),
        ("", {}, {"deleted": 6, "last_word_missing": 1, "early_stop": 1}),
    ],
)
def test_what_a_transcript_shows(transcript: str, more: dict[str, Any], wrong: dict[str, int]) -> None:
    row = judged(transcript, **more)
    clean = dict.fromkeys(("inserted", "deleted", "substituted", "last_word_missing", "early_stop", "repetition"), 0)
    assert {key: row[key] for key in clean} == clean | wrong
    assert row["spoken_words"] == 6


def test_without_transcript_or_words_there_is_nothing_to_judge() -> None:
    assert "early_stop" not in judged(None)
    assert "spoken_words" not in judged("noise", text="...")
    assert row_alignment({"text": "a"}, corpus_style) is None


def test_far_too_short_for_the_pace_of_its_system() -> None:
    rows = [{"system": "s", "id": str(n), "text": TEXT, "transcript": TEXT, "audio_s": 2.0 if n else 0.9} for n in range(6)]
    judge(rows, corpus_style)
    assert [row["early_stop"] for row in rows] == [1, 0, 0, 0, 0, 0]
    few = [row | {"early_stop": 0.0} for row in rows[:2]]
    judge(few, corpus_style)
    assert [row["early_stop"] for row in few] == [0, 0], "two items tell no pace"


@pytest.mark.parametrize(("words", "repeated"), [("a b c", 0), ("go on go on go on", 4), ("no no no", 2), ("a b a c", 0), ("", 0)])
def test_repeated_words(words: str, repeated: int) -> None:
    assert repeated_words(words.split()) == repeated


def test_the_last_word_may_be_spelled_otherwise() -> None:
    assert last_word_heard(["harbour"], ["the", "harbor"])
    assert not last_word_heard(["harbour"], ["the"])
    assert not last_word_heard(["down"], ["down", "a", "b", "c"])


def test_the_curve_counts_errors_over_words() -> None:
    pairs = [("boat", "boat"), ("coat", "boat"), (TEXT, TEXT), ("the boat went down the", TEXT)]
    rows = [judged(heard, text=text, id=str(index)) for index, (heard, text) in enumerate(pairs)]
    points = {(p.first, p.last): (p.wer.value, p.wer.count) for p in length_curve(rows)}
    assert points == {(1, 1): (0.5, 2), (6, 6): (pytest.approx(1 / 12), 2)}


def test_facts_of_every_system_are_json() -> None:
    rows = [judged(TEXT), judged("the coat", system="other"), judged(None, system="silent")]
    facts = word_facts(rows, corpus_style)
    assert list(facts) == ["s", "other"]
    assert json.loads(json.dumps(facts))["other"]["by_word"][0]["spoken"] == 1
    assert facts["s"]["by_word"] == []


def test_words_with_most_errors_come_first() -> None:
    pairs = [("a boat", "a coat"), ("a boat", "a goat"), ("a boat", "a boat uh"), ("the sea", "the")]
    table = word_table([alignment(text.split(), heard.split()) for text, heard in pairs])
    assert [(w.word, w.spoken, w.deleted, w.substituted) for w in table.words] == [("boat", 3, 0, 2), ("sea", 1, 1, 0)]
    assert dict(table.words[0].heard_as) == {"coat": 1, "goat": 1}
    assert table.inserted == [("uh", 1)]


def test_classes_of_sounds() -> None:
    phonemes = {"boat": "bˈOt", "sea": "sˈi"}
    found = sound_classes([alignment(["boat", "sea", "xyz"], ["boat", "tea", "xyz"])], phonemes.get)
    assert found == [("stop", 1, 0), ("fricative", 1, 1), ("long vowel", 1, 1), ("diphthong", 1, 0)]


def test_sounds_heard_for_sounds() -> None:
    phonemes = {"boat": "bˈOt", "coat": "kˈOt", "goes": "ɡˈOz", "sea": "sˈi", "uh": "ˈʌ"}
    pairs = [("boat", "coat"), ("sea boat", "boat"), ("boat xyz", "boat abc"), ("boat", "boat uh"), ("goes", "coat")]
    names, counts = sound_confusions([alignment(text.split(), heard.split()) for text, heard in pairs], phonemes.get)
    found = {(names[heard], names[said]): int(counts[heard, said]) for heard, said in np.argwhere(counts)}
    assert found.pop(("stop", "fricative")) == 1, "the end of goes, heard as that of coat"
    assert found == {
        ("stop", "stop"): 9, ("diphthong", "diphthong"): 5, ("nothing", "fricative"): 1, ("nothing", "long vowel"): 1,
        ("short vowel", "nothing"): 1,
    }  # fmt: skip
