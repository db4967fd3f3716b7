from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.synthesis.length import BASE_SECONDS, LONGEST_SECONDS, cap_frames, cap_seconds, check_length, usual_seconds


@given(st.text(), st.text())
def test_the_cap_grows_with_the_text_within_its_bounds(first: str, second: str) -> None:
    assert BASE_SECONDS <= cap_seconds(first) <= cap_seconds(first + second) <= LONGEST_SECONDS
    assert cap_seconds(first + second) == pytest.approx(min(cap_seconds(first) + cap_seconds(second) - BASE_SECONDS, LONGEST_SECONDS))
    assert 1 <= cap_frames(first, 12.5) <= LONGEST_SECONDS * 12.5


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("", 3.0), ("I", 3.2), ("字", 3.6), ("カ", 3.6), ("ｶ", 3.6), ("한", 3.6), ("7", 3.9), ("７", 3.9), ("🙂", 3.2), ("\u200f", 3.2)],
)
def test_one_character_of_each_kind(text: str, seconds: float) -> None:
    assert cap_seconds(text) == pytest.approx(seconds)


@given(st.floats(0.08, 80))
def test_the_users_cap_holds_whatever_the_text(seconds: float) -> None:
    assert cap_frames("x" * 1000, 12.5, seconds) == int(seconds * 12.5 + 1e-6)


@pytest.mark.parametrize("seconds", [1e12, 1e307, 1.7e308])
def test_a_cap_beyond_everything_is_no_overflow(seconds: float) -> None:
    assert cap_frames("x", 12.5, seconds) == 2**31


def test_a_text_is_held_against_the_longest_request_or_a_longer_cap() -> None:
    assert usual_seconds("字" * 400) == pytest.approx(80)
    check_length("字" * 400)
    for seconds in (None, 1.0, 80.0):
        with pytest.raises(UserError, match="got about 80 s of speech, expected at most 80 s"):
            check_length("字" * 401, seconds)
    check_length("字" * 401, 80.2)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.079, float("nan"), float("inf")])
def test_a_cap_without_a_frame_is_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"bad length cap: got .*, expected at least one frame of 0\.08 s"):
        cap_frames("x", 12.5, seconds)
