"""Which recording becomes a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from kalle.evaluation.test_list import TestItem, choose_prompt


def item(name: str, seconds: float | None, text: str = "four words are enough", speaker: str = "a") -> TestItem:
    return TestItem(name, text, Path(f"{name}.wav"), speaker, duration_s=seconds)


def test_the_nearest_length_wins_whatever_the_order() -> None:
    items = [item("far", 9.0), item("b", 4.0), item("a", 6.0), item("word", 5.0, "one"), item("unknown", None)]
    assert choose_prompt(items).id == "a"
    assert choose_prompt(items[::-1]).id == "a"
    assert choose_prompt(items, seconds=8.5).id == "far"


def test_only_the_speaker_asked_for() -> None:
    items = [item("a", 5.0), item("b", 9.0, speaker="b")]
    assert choose_prompt(items, speaker="b").id == "b"
    with pytest.raises(ValueError, match="a recording of 'c'"):
        choose_prompt(items, speaker="c")


def test_a_list_without_recordings_is_refused() -> None:
    with pytest.raises(ValueError, match="a recording of anybody"):
        choose_prompt([TestItem("a", "four words are enough", duration_s=5.0)])
