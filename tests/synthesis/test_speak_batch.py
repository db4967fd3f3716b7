from __future__ import annotations

import numpy as np
import pytest
import torch

from kalle.errors import UserError
from kalle.synthesis import SpeechRequest, StopRule
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.retry import next_seed
from kalle.synthesis.speech import Speech
from kalle.synthesis.voice import Voice

NEVER = StopRule(threshold=0.0)
ALWAYS = StopRule(threshold=1e9, min_index=2)


@pytest.fixture
def voice(kalle_tiny: Kalle) -> Voice:
    audio = 0.1 * torch.randn(16000, generator=torch.Generator().manual_seed(0))
    return kalle_tiny.voice(audio.numpy(), "A prompt.")


def assert_same(got: Speech, wanted: Speech) -> None:
    assert got.stop_reason == wanted.stop_reason
    assert (got.seed, got.frames, got.max_frames, got.attempts) == (wanted.seed, wanted.frames, wanted.max_frames, wanted.attempts)
    assert got.warnings == wanted.warnings
    for name in ("audio", "latents", "log_std", "end_kl", "log_likelihood"):
        np.testing.assert_allclose(getattr(got, name), getattr(wanted, name), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("frame_budget", [1, 80, 10_000])
def test_a_batch_of_all_sorts_equals_one_by_one(kalle_tiny: Kalle, voice: Voice, frame_budget: int) -> None:
    requests = [
        SpeechRequest("Hello.", seed=1, max_seconds=1.2, stop=NEVER),
        SpeechRequest("A much longer text than the others have, by far.", voice, seed=2, max_seconds=2.4, stop=NEVER),
        SpeechRequest("x", seed=3, stop=ALWAYS),
        SpeechRequest("Cold.", seed=4, temperature=0.0, max_seconds=0.8, stop=NEVER),
        SpeechRequest("With a prompt.", voice, seed=5, max_seconds=0.08, stop=NEVER),
        SpeechRequest("Hello.", seed=6, max_seconds=1.2),
    ]
    batch = kalle_tiny.synthesize_batch(requests, frame_budget=frame_budget)
    for got, request in zip(batch, requests, strict=True):
        assert_same(got, kalle_tiny.speak(request))
    assert [speech.frames for speech in batch][:5] == [15, 30, 3, 10, 1]


def test_bad_endings_are_tried_again_as_they_would_be_alone(kalle_tiny: Kalle) -> None:
    request = SpeechRequest("Hello.", seed=7, max_seconds=0.8, stop=StopRule(threshold=1e-6), retries=2)
    (speech,) = kalle_tiny.synthesize_batch([request])
    assert [attempt.seed for attempt in speech.attempts] == [7, next_seed(7, 1), next_seed(7, 2)]
    assert_same(speech, kalle_tiny.speak(request))


def test_a_plain_text_takes_the_defaults(kalle_tiny: Kalle) -> None:
    first, second = kalle_tiny.synthesize_batch(["Hi.", SpeechRequest("Hi.", max_seconds=0.4, retries=0)])
    assert first.frames
    assert second.frames <= 5
    assert first.seed != second.seed


def test_no_requests_give_no_speech(kalle_tiny: Kalle) -> None:
    assert kalle_tiny.synthesize_batch([]) == []


def test_one_bad_request_is_refused_before_any_is_spoken(kalle_tiny: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(kalle_tiny.lm), "prefill", lambda *_: pytest.fail("something was spoken"))
    for bad in (SpeechRequest(""), SpeechRequest("Hi.", seed=-1), SpeechRequest("Hi.", temperature=-1.0), SpeechRequest("Hi.", retries=-1)):
        with pytest.raises(UserError):
            kalle_tiny.synthesize_batch([SpeechRequest("Hi."), bad])
