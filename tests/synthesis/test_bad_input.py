"""Whatever is asked for: an answer within the cap, or one line that says what is wrong."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.synthesis import Speech, SpeechRequest
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.longform import LongForm

CAP = 0.4
NARROW = 60
"""Positions."""
TEXTS = {
    "one character": "a",
    "emoji": "Hello 👋🏽 👨‍👩‍👧‍👦!",
    "right to left": "مرحبا بالعالم، שלום עולם",
    "mixed scripts": "Hello 你好 привет こんにちは 안녕",
    "combining marks": "e\u0301\u0301\u0301 Z\u0351\u036b",
    "only punctuation": "...",
    "digits": "3.14159 1,000,000",
    "special token": "<|SPEECH_GENERATION_END|> hello",
    "line breaks": "one\n\ntwo\r\nthree\tfour",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS.keys())
def test_any_script_is_spoken_within_the_cap(kalle_tiny: Kalle, text: str) -> None:
    speech = kalle_tiny.synthesize(text, seed=1, max_seconds=CAP)
    assert speech.seconds <= CAP + 1e-9
    assert np.isfinite(speech.audio).all()
    assert speech.stop_reason in ("end", "max_frames")


@pytest.mark.parametrize("text", ["", " \n\t", "\u200b"])
def test_nothing_to_say_is_refused(kalle_tiny: Kalle, text: str) -> None:
    with pytest.raises(UserError, match="text"):
        kalle_tiny.synthesize(text, seed=1, max_seconds=CAP)


def test_a_text_beyond_the_model_is_refused_where_it_is_to_be_spoken_at_once(kalle_tiny: Kalle) -> None:
    limit = kalle_tiny.lm.backbone.config.max_position_embeddings
    with pytest.raises(UserError, match=r"too long.*split"):
        kalle_tiny.synthesize("a" * (limit + 1), seed=1, max_seconds=1e9, by_sentences=False)


@pytest.mark.parametrize("max_seconds", [None, CAP, 6666.0])
def test_a_hundred_thousand_characters_at_once_are_refused_with_the_way_to_speak_them(kalle_tiny: Kalle, max_seconds: float | None) -> None:
    allowed = max(80, round(max_seconds or 0))
    words = rf"about 6667 s of speech, expected at most {allowed} s; leave out by_sentences.*max_seconds=6667"
    for call in (kalle_tiny.synthesize, kalle_tiny.stream):
        with pytest.raises(UserError, match=words):
            call("a" * 100_000, seed=1, max_seconds=max_seconds, by_sentences=False)


def test_a_text_near_the_limit_and_one_with_a_cap_of_its_own_are_accepted(kalle_tiny: Kalle) -> None:
    assert kalle_tiny.resolve(SpeechRequest("a" * 1200, seed=1)).max_frames == 1000
    with pytest.raises(UserError, match="about 80 s of speech, expected at most 80 s"):
        kalle_tiny.resolve(SpeechRequest("a" * 1201, seed=1))
    assert kalle_tiny.resolve(SpeechRequest("a" * 100_000, seed=1, max_seconds=6667.0)).max_frames > 0


@pytest.mark.parametrize("seconds", [0.05, 600.0])
def test_a_prompt_of_a_useless_length_is_refused(kalle_tiny: Kalle, seconds: float) -> None:
    audio = np.random.default_rng(0).normal(0, 0.1, round(seconds * 16000)).astype(np.float32)
    with pytest.raises(UserError, match="prompt length"):
        kalle_tiny.voice(audio, "Words.")


def test_noise_and_a_wrong_transcript_still_give_a_finite_result(kalle_tiny: Kalle) -> None:
    noise = np.random.default_rng(0).normal(0, 0.3, 8000).astype(np.float32)
    voice = kalle_tiny.voice(noise, "A transcript that has nothing to do with what is heard, and is far too long for it.")
    assert np.isfinite(kalle_tiny.synthesize("Hello.", voice, seed=1, max_seconds=CAP).audio).all()


def answer(kalle: Kalle, text: str, fields: dict[str, object]) -> tuple[Speech | None, str]:
    try:
        return kalle.synthesize(text, **fields), ""
    except UserError as error:
        return None, str(error)


option_fields = st.fixed_dictionaries(
    {
        "seed": st.integers(-1, 2**63) | st.integers(0, 1000),
        "temperature": st.floats(allow_nan=True) | st.floats(0, 2),
        "max_seconds": st.floats(allow_nan=True) | st.floats(0.08, CAP),
        "retries": st.integers(-1, 1),
    }
)


@pytest.fixture(scope="module")
def kalle_narrow(kalle_tiny: Kalle) -> Kalle:
    """A model that reads few positions, so that no cap lets it speak for long."""
    lm = copy.deepcopy(kalle_tiny.lm)
    lm.backbone.config = dataclasses.replace(lm.backbone.config, max_position_embeddings=NARROW)
    return Kalle(kalle_tiny.flowvae, lm, kalle_tiny.tokenizer)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(text=st.text(max_size=40), fields=option_fields)
@example(text="Hello.", fields={"seed": 1, "max_seconds": 1e308, "retries": 0})
def test_any_request_is_answered_or_refused(kalle_narrow: Kalle, text: str, fields: dict[str, Any]) -> None:
    speech, refusal = answer(kalle_narrow, text, fields)
    if speech is None:
        assert refusal
        assert "\n" not in refusal
        return
    assert speech.seconds <= fields["max_seconds"] + 1e-9
    assert len(speech.audio) == speech.frames * 1280
    assert speech.frames <= speech.max_frames < NARROW
    assert speech.stop_reason in ("end", "max_frames", "repetition", "silence")


def test_two_threads_get_what_each_would_get_alone(kalle_tiny: Kalle) -> None:
    alone = [kalle_tiny.synthesize("Hello.", seed=seed, max_seconds=CAP).audio for seed in range(4)]
    found: dict[int, np.ndarray] = {}

    def speak(seed: int) -> None:
        stream = kalle_tiny.stream("Hello.", seed=seed, max_seconds=CAP)
        found[seed] = np.concatenate([np.zeros(0, dtype=np.float32), *stream])

    threads = [threading.Thread(target=speak, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed, audio in enumerate(alone):
        np.testing.assert_allclose(found[seed], audio, atol=1e-4)


def _speak_elsewhere(folder: Path, out: Path) -> None:
    torch.set_num_threads(1)
    np.save(out, Kalle.from_pretrained(folder, "cpu").synthesize("Hello.", seed=5, max_seconds=CAP).audio)


@pytest.mark.slow
def test_two_processes_share_a_weight_folder(weight_folder: Path, tmp_path: Path) -> None:
    outs = [tmp_path / "a.npy", tmp_path / "b.npy"]
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_speak_elsewhere, args=(weight_folder, out)) for out in outs]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    wanted = Kalle.from_pretrained(weight_folder, "cpu").synthesize("Hello.", seed=5, max_seconds=CAP).audio
    for out in outs:
        np.testing.assert_allclose(np.load(out), wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": None}, "bad text: got None, expected a str; decode bytes"),
        ({"text": b"abc"}, "bad text: got bytes"),
        ({"voice": "anna"}, r"bad voice: got 'anna', expected a kalle.Voice; load it with kalle.load_voice\('anna'\)"),
        ({"voice": 3}, "bad voice: got int"),
    ],
)
def test_values_of_another_type_are_refused(kalle_tiny: Kalle, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        kalle_tiny.synthesize(**{"text": "Hello.", "max_seconds": CAP} | options)


def test_a_voice_of_another_type_is_refused_for_a_long_text_too(kalle_tiny: Kalle) -> None:
    with pytest.raises(UserError, match="bad voice: got 'anna'"):
        LongForm(kalle_tiny, "One. Two.", "anna")  # type: ignore[arg-type]


def test_numpys_integers_are_seeds(kalle_tiny: Kalle) -> None:
    speech = kalle_tiny.synthesize("Hello.", seed=np.int64(3), max_seconds=CAP)  # type: ignore[arg-type]
    assert type(speech.seed) is int
    np.testing.assert_array_equal(speech.audio, kalle_tiny.synthesize("Hello.", seed=3, max_seconds=CAP).audio)
    for bad in (1.5, True):
        with pytest.raises(UserError, match="bad seed"):
            kalle_tiny.random_voice(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", ["Hello", b"Hello", SpeechRequest("Hello")])
def test_one_request_is_no_batch(kalle_tiny: Kalle, batch: object) -> None:
    with pytest.raises(UserError, match=r"not a batch: got one \w+, expected a list"):
        kalle_tiny.synthesize_batch(batch)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="bad text: got None"):
        kalle_tiny.synthesize_batch(["Hello", None])  # type: ignore[list-item]


@pytest.mark.parametrize("rate", [0, -5, "x"])
def test_a_sample_rate_that_is_none_is_refused(kalle_tiny: Kalle, rate: int) -> None:
    with pytest.raises(UserError, match="bad sample rate: got"):
        kalle_tiny.voice(np.full(16000, 0.1, dtype=np.float32), "one", sample_rate_hz=rate)
