from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from speech_requests import request_of

from kalle.errors import UserError
from kalle.synthesis import speech as speech_module
from kalle.synthesis.generate import Request
from kalle.synthesis.options import GenerationOptions, StopRule
from kalle.synthesis.release_compat import ReleaseCompatibility
from kalle.synthesis.speech import (
    Attempt,
    Speech,
    allowed_retries,
    keep_best,
    needs_retry,
    next_seed,
    retry_request,
    speak,
    speak_with_retries,
)

ENDINGS = ("end", "silence", "repetition", "max_frames")


def speech_of(ending: str, frames: int = 5, seed: int = 0) -> Speech:
    rows = np.zeros((frames, 8), np.float32)
    warnings = () if ending == "end" else (f"ended with {ending}",)
    return Speech(
        np.zeros(frames * 1280, np.float32),
        16000,
        ending,  # type: ignore[arg-type]
        seed,
        rows,
        rows,
        np.zeros(frames, np.float32),
        100,
        attempts=(Attempt(seed, ending, frames),),  # type: ignore[arg-type]
        warnings=warnings,
    )


def request(**options) -> Request:
    return request_of(torch.arange(5, 20), 6, **{"seed": 3, "retries": 0} | options)


def scripted(monkeypatch, *endings: str | tuple[str, int]) -> list[int]:
    """``speak`` gives these endings one after the other; returns the list of the seeds it was given."""
    seeds: list[int] = []

    def spoken(lm: object, flowvae: object, asked: Request, converted: object) -> Speech:
        ending = endings[len(seeds)]
        seeds.append(asked.seed)
        return speech_of(ending, seed=asked.seed) if isinstance(ending, str) else speech_of(*ending, seed=asked.seed)

    monkeypatch.setattr(speech_module, "speak", spoken)
    return seeds


def test_a_good_ending_is_not_tried_again(monkeypatch) -> None:
    seeds = scripted(monkeypatch, "end", "end")
    speech = speak_with_retries(None, None, request(retries=5))  # type: ignore[arg-type]
    assert seeds == [3]
    assert speech.attempts == (Attempt(3, "end", 5, kept=True),)
    assert speech.warnings == ()


def test_a_bad_ending_is_tried_again_and_both_are_told(monkeypatch, caplog) -> None:
    seeds = scripted(monkeypatch, "max_frames", "end", "end")
    with caplog.at_level(logging.WARNING):
        speech = speak_with_retries(None, None, request(retries=2))  # type: ignore[arg-type]
    assert seeds == [3, next_seed(3, 1)]
    assert (speech.stop_reason, speech.seed) == ("end", 3)
    assert speech.attempts == (Attempt(3, "max_frames", 5, kept=False), Attempt(seeds[1], "end", 5, kept=True))
    assert speech.warnings == ("2 attempts were made and number 2 was kept",)
    assert f"ended with max_frames; trying again with seed {seeds[1]} (1 of 2)" in caplog.text


def test_an_end_without_a_frame_is_a_bad_ending(monkeypatch) -> None:
    scripted(monkeypatch, ("end", 0), "max_frames")
    speech = speak_with_retries(None, None, request(retries=1))  # type: ignore[arg-type]
    assert (speech.stop_reason, speech.frames) == ("max_frames", 5)


def test_the_number_of_tries_is_bounded(monkeypatch) -> None:
    seeds = scripted(monkeypatch, *["max_frames"] * 9)
    speech = speak_with_retries(None, None, request(retries=3))  # type: ignore[arg-type]
    assert len(seeds) == len(set(seeds)) == 4
    assert speech.attempts[0].kept
    assert sum(attempt.kept for attempt in speech.attempts) == 1


def test_no_retries_is_one_plain_try(lm_tiny, flowvae_tiny) -> None:
    plain, once = speak(lm_tiny, flowvae_tiny, request()), speak_with_retries(lm_tiny, flowvae_tiny, request())
    assert plain.stop_reason == "max_frames"
    np.testing.assert_array_equal(plain.audio, once.audio)
    assert plain.attempts == once.attempts
    assert plain.warnings == once.warnings


def test_a_retry_is_the_speech_of_its_own_seed(lm_tiny, flowvae_tiny) -> None:
    asked = request(seed=0, retries=1, stop=StopRule(0.62, -1))
    speech = speak_with_retries(lm_tiny, flowvae_tiny, asked)
    assert [attempt.stop_reason for attempt in speech.attempts] == ["max_frames", "end"]
    again = speak(lm_tiny, flowvae_tiny, retry_request(asked, 1))
    assert speech.frames == 5
    np.testing.assert_array_equal(speech.audio, again.audio)


@pytest.mark.parametrize(
    "options",
    [{"compatibility": ReleaseCompatibility.release()}, {"noise": torch.zeros(6, 8)}, {"stop": StopRule(0.0)}, {"temperature": 0.0}],
    ids=["compatibility", "noise", "never", "no noise"],
)
def test_where_another_try_makes_no_sense_there_is_none(options: dict) -> None:
    assert allowed_retries(request(retries=3, **options)) == 0
    assert allowed_retries(request(retries=3)) == 3


@pytest.mark.parametrize("retries", [-1, 1.5, "2", None])
def test_bad_retries_are_refused(retries) -> None:
    with pytest.raises(UserError, match=f"bad retries: got {retries!r}, expected an integer of at least 0"):
        GenerationOptions(retries=retries)


def test_speeches_can_be_compared_and_collected() -> None:
    one, other = speech_of("end"), speech_of("end")
    assert one != other
    assert len({one, other, one}) == 2


@given(seed=st.integers(0, 2**63 - 1), attempt=st.integers(1, 50))
def test_seeds_of_retries_are_a_function_of_the_first(seed: int, attempt: int) -> None:
    assert next_seed(seed, 0) == seed
    assert next_seed(seed, attempt) == next_seed(seed, attempt)
    assert 0 <= next_seed(seed, attempt) < 2**31
    assert next_seed(seed, attempt) != next_seed(seed, attempt + 1)


def test_seeds_of_retries_stay_as_they_are() -> None:
    assert [next_seed(0, 1), next_seed(7, 2)] == SEEDS


SEEDS = [403838482, 1106746197]


@given(st.lists(st.tuples(st.sampled_from(ENDINGS), st.integers(0, 3)), min_size=1, max_size=5))
def test_the_best_try_is_kept(tries: list[tuple[str, int]]) -> None:
    speeches = [speech_of(ending, frames, seed=i) for i, (ending, frames) in enumerate(tries)]
    best = keep_best(speeches)
    kept = next(i for i, attempt in enumerate(best.attempts) if attempt.kept)
    assert sum(attempt.kept for attempt in best.attempts) == 1
    assert (best.stop_reason, best.frames, best.seed) == (*tries[kept], 0)
    assert best.frames or not any(frames for _, frames in tries)
    spoken = [ENDINGS.index(ending) for ending, frames in tries if bool(frames) == bool(best.frames)]
    assert ENDINGS.index(best.stop_reason) == min(spoken)
    assert len(best.attempts) == len(tries)
    assert needs_retry(best) == all(map(needs_retry, speeches))
