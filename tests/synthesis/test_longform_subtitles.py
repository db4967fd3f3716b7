from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.synthesis.longform_files import Cue, srt, timestamp, wrap


def test_the_format() -> None:
    assert srt([Cue("Hello  there.", 0, 1.2345), Cue("Bye.", 1.5, 3661.9996)]) == (
        "1\n00:00:00,000 --> 00:00:01,234\nHello there.\n\n2\n00:00:01,500 --> 01:01:02,000\nBye.\n"
    )
    assert srt([]) == ""


@pytest.mark.parametrize(("seconds", "text"), [(0, "00:00:00,000"), (59.9996, "00:01:00,000"), (360_000, "100:00:00,000")])
def test_timestamps(seconds: float, text: str) -> None:
    assert timestamp(seconds) == text


def test_long_lines_are_wrapped() -> None:
    assert wrap("one two three four", 9) == ["one two", "three", "four"]
    assert wrap("太阳慢慢升起，好", 12) == ["太阳慢慢升", "起，好"]
    assert wrap("x" * 10, 4) == ["xxxx", "xxxx", "xx"]


def columns(line: str) -> int:
    return sum(2 if ord(c) > 0x2E80 else 1 for c in line)


@given(st.text(st.sampled_from("ab cd,.!中文，。 "), max_size=80), st.integers(4, 20))
@settings(max_examples=200, deadline=None)
def test_wrapping_keeps_every_character_and_no_blank_line(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(line.strip() and columns(line) <= width for line in lines)


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0.08, 9)), max_size=8))
@settings(max_examples=50, deadline=None)
def test_times_are_ordered(steps: list[tuple[float, float]]) -> None:
    cues, now = [], 0.0
    for gap, length in steps:
        cues.append(Cue("x", now + gap, now + gap + length))
        now += gap + length
    found = re.findall(r"(\d+):(\d\d):(\d\d),(\d{3})", srt(cues))
    times = [((int(h) * 60 + int(m)) * 60 + int(s)) * 1000 + int(ms) for h, m, s, ms in found]
    assert times == sorted(times)
    assert len(times) == 2 * len(cues)
