from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
from speech_requests import request_of

from kalle.errors import UserError
from kalle.synthesis import ReleaseCompatibility, SpeechRequest, StopRule, release_compat
from kalle.synthesis.batch import speak_batch
from kalle.synthesis.generate import Frame, Request
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.speech import Speech, next_seed, speak, speak_with_retries
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


def test_bad_endings_are_tried_again_as_they_would_be_alone(kalle_tiny: Kalle, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "kalle")
    request = request_of(torch.arange(5, 20), 10, seed=7, stop=StopRule(threshold=1e-6), retries=2)
    (speech,) = speak_batch(kalle_tiny.lm, kalle_tiny.flowvae, [request])
    assert [attempt.seed for attempt in speech.attempts] == [7, next_seed(7, 1), next_seed(7, 2)]
    told = [record.getMessage() for record in caplog.records]
    caplog.clear()
    assert_same(speech, speak_with_retries(kalle_tiny.lm, kalle_tiny.flowvae, request))
    assert told == [record.getMessage() for record in caplog.records]
    assert [line.rsplit("; ", 1)[1] for line in told] == [
        f"trying again with seed {next_seed(7, 1)} (1 of 2)",
        f"trying again with seed {next_seed(7, 2)} (2 of 2)",
    ]


def test_a_plain_text_takes_the_defaults(kalle_tiny: Kalle) -> None:
    first, second = kalle_tiny.synthesize_batch(["Hi.", SpeechRequest("Hi.", max_seconds=0.4, retries=0)])
    assert first.frames
    assert second.frames <= 5
    assert first.seed != second.seed


def test_no_requests_give_no_speech(kalle_tiny: Kalle) -> None:
    assert kalle_tiny.synthesize_batch([]) == []


def test_one_bad_request_is_refused_before_any_is_spoken(kalle_tiny: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(kalle_tiny.lm), "prefill", lambda *_: pytest.fail("something was spoken"))
    for bad in (SpeechRequest(""), SpeechRequest("Hi.", max_seconds=0.01), SpeechRequest("a" * 2000, by_sentences=False)):
        with pytest.raises(UserError):
            kalle_tiny.synthesize_batch([SpeechRequest("Hi."), bad])


NO_CACHE, CONFIG_DTYPE = ReleaseCompatibility(no_cache=True), ReleaseCompatibility(config_dtype=True)


def ids(seed: int = 1, **options) -> Request:
    return request_of(torch.arange(5, 20), 12, **{"seed": seed, "stop": NEVER, "retries": 0} | options)


def half_configured(kalle: Kalle, loaded: torch.dtype = torch.float32) -> Kalle:
    """A model whose configuration names fp16, as the released one does."""
    lm = copy.deepcopy(kalle.lm)
    lm.config = type(lm.config)({**lm.config.backbone, "dtype": "float16"}, lm.config.latent_dim)
    lm.backbone.to(loaded)
    return Kalle(kalle.flowvae, lm, kalle.tokenizer)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (ids(compatibility=CONFIG_DTYPE), "request 1 .*load them in float32"),
        (ids(compatibility=NO_CACHE, prompt_latents=torch.zeros(3, 9)), "request 1 .*bad prompt latents"),
    ],
)
def test_what_is_spoken_alone_is_checked_before_anything_is_spoken(kalle_tiny: Kalle, monkeypatch, bad: Request, message: str) -> None:
    kalle = half_configured(kalle_tiny, torch.bfloat16)
    for name in ("prefill", "predict"):
        monkeypatch.setattr(type(kalle.lm), name, lambda *_: pytest.fail("something was spoken"))
    with pytest.raises(UserError, match=message):
        speak_batch(kalle.lm, kalle.flowvae, [ids(), bad])


def test_a_model_in_another_precision_is_made_once(kalle_tiny: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    kalle, made, convert = half_configured(kalle_tiny), [], release_compat.in_dtype
    monkeypatch.setattr(release_compat, "in_dtype", lambda lm, dtype: made.append(dtype) or convert(lm, dtype))
    requests = [ids(seed, compatibility=CONFIG_DTYPE) for seed in range(3)]
    converted: release_compat.ConvertedModels = {}
    together = speak_batch(kalle.lm, kalle.flowvae, requests, converted=converted)
    assert made == [torch.float16]
    alone = speak_with_retries(kalle.lm, kalle.flowvae, requests[0], converted)
    assert made == [torch.float16]
    np.testing.assert_array_equal(alone.latents, together[0].latents)
    other = half_configured(kalle_tiny)
    speak_with_retries(other.lm, other.flowvae, requests[0], converted)
    assert len(made) == 2, "another model has its own"


class Stuck:
    """Ends its row at the frame 3 + ``seed``; the first ``seed`` frames are worth hearing."""

    def __init__(self, seed: int) -> None:
        self.seed, self.kept_frames = seed, None

    def see(self, frame: Frame, index: int) -> str | None:
        if index < 3 + self.seed:
            return None
        self.kept_frames = self.seed
        return "repetition"


def test_every_row_of_a_batch_has_its_own_watcher(kalle_tiny: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalle.synthesis.batch.watcher_of", lambda _, request: Stuck(request.seed))
    requests = [ids(5), ids(1, compatibility=NO_CACHE), ids(2), ids(4)]
    spoken = speak_batch(kalle_tiny.lm, kalle_tiny.flowvae, requests)
    assert [speech.frames for speech in spoken] == [5, 12, 2, 4]
    assert [speech.stop_reason for speech in spoken] == ["repetition", "max_frames", "repetition", "repetition"]
    assert [round(speech.trimmed_seconds * 12.5) for speech in spoken] == [4, 0, 4, 4]
    assert [speech.attempts[0].frames for speech in spoken] == [5, 12, 2, 4]
    assert [len(speech.audio) for speech in spoken] == [5 * 1280, 12 * 1280, 2 * 1280, 4 * 1280]


def test_the_second_draw_in_a_batch_goes_on_in_the_rows_own_generator(kalle_tiny: Kalle) -> None:
    requests = [ids(seed, compatibility=ReleaseCompatibility(decode="resample")) for seed in (1, 2)]
    for got, request in zip(speak_batch(kalle_tiny.lm, kalle_tiny.flowvae, requests), requests, strict=True):
        assert_same(got, speak(kalle_tiny.lm, kalle_tiny.flowvae, request))


def test_a_row_that_is_not_finite_is_named(kalle_tiny: Kalle) -> None:
    noise = torch.zeros(12, 8)
    noise[4, 2] = float("inf")
    requests = [ids(compatibility=NO_CACHE), ids(), ids(noise=noise)]
    with pytest.raises(UserError, match=r"^request 2 of the batch, counted from 0: frame 4 overflows: got temperature 1\.0"):
        speak_batch(kalle_tiny.lm, kalle_tiny.flowvae, requests)
    with pytest.raises(UserError, match=r"^request 0 of the batch, counted from 0: frame 4 overflows"):
        speak_batch(kalle_tiny.lm, kalle_tiny.flowvae, [ids(compatibility=NO_CACHE, noise=noise), ids()])
