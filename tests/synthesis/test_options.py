from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.adapter import Adapter
from kalle.synthesis.generate import generate
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import (
    BASE_SECONDS,
    LONGEST_SECONDS,
    GenerationOptions,
    SpeechRequest,
    StopRule,
    cap_frames,
    cap_seconds,
    fits_one_request,
    usual_seconds,
)
from kalle.synthesis.voice import Voice
from kalle.text.tokenizer import Tokenizer


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


def test_a_text_is_spoken_at_once_only_within_the_longest_request() -> None:
    assert usual_seconds("字" * 400) == pytest.approx(80)
    assert fits_one_request("a" * 380)
    assert not fits_one_request("a" * 390)
    assert fits_one_request("a" * 120, 8.0)
    assert not fits_one_request("a" * 121, 8.0)


@pytest.mark.parametrize("seconds", [0.0, -1.0, 0.079, float("nan"), float("inf")])
def test_a_cap_without_a_frame_is_refused(seconds: float) -> None:
    with pytest.raises(UserError, match=r"bad max_seconds: got .*, expected at least one frame of 0\.08 s"):
        cap_frames("x", 12.5, seconds)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"seed": -1}, "bad seed: got -1"),
        ({"seed": 1.5}, "bad seed: got 1.5, expected an integer"),
        ({"seed": True}, "bad seed: got True"),
        ({"temperature": math.nan}, "bad temperature: got nan, expected a finite number of at least 0"),
        ({"temperature": "hot"}, "bad temperature: got 'hot'"),
        ({"guidance": math.inf}, "bad guidance: got inf"),
        ({"guidance": None}, "bad guidance: got None"),
        ({"max_seconds": 0.0}, r"bad max_seconds: got 0\.0"),
        ({"max_seconds": "3"}, "bad max_seconds: got '3'"),
        ({"retries": -1}, "bad retries: got -1, expected an integer of at least 0"),
        ({"retries": None}, "bad retries: got None"),
        ({"chunk_frames": 2.5}, r"bad chunk_frames: got 2\.5, expected an integer of at least 1"),
        ({"latency_frames": -1}, "bad latency_frames: got -1"),
        ({"pause_s": 61}, "bad pause_s: got 61, expected a number from 0 to 60"),
        ({"retries": True}, "bad retries: got True"),
        ({"temperature": True}, "bad temperature: got True"),
        ({"temperature": 10**400}, "bad temperature: got 1000"),
        ({"chunk_frames": 10**400}, "bad chunk_frames"),
        ({"watch": "no"}, "bad watch: got 'no', expected True or False"),
        ({"normalise": 1}, "bad normalise: got 1"),
        ({"rolling": None}, "bad rolling: got None"),
        ({"by_sentences": "yes"}, "bad by_sentences: got 'yes'"),
        ({"language": 5}, "bad language: got 5"),
        ({"options": 5}, "bad options: got 5"),
        ({"language": "english!"}, "unknown language: got 'english!'"),
        ({"stop": 0.5}, "bad stop: got 0.5"),
        ({"compatibility": True}, "bad compatibility: got True"),
        ({"sed": 1}, "unknown option: got sed, expected some of seed, temperature, guidance"),
    ],
)
def test_bad_options_are_refused_with_their_name(fields: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SpeechRequest("Hello.", **fields)


def test_options_take_what_numpy_counts_with_and_leave_the_rest_alone() -> None:
    options = GenerationOptions(seed=np.int64(3), retries=np.int32(2), temperature=np.float32(0.5), language="EN")
    assert (type(options.seed), type(options.retries), options.language) == (int, int, "en")
    changed = options.changed(guidance=2.0)
    assert (changed.guidance, changed.seed, options.guidance) == (2.0, 3, 1.0)
    assert SpeechRequest("Hi.", seed=3) == SpeechRequest("Hi.", options=GenerationOptions(seed=3))
    assert dataclasses.replace(SpeechRequest("Hi.", seed=3), text="Ho.").options.seed == 3


WRONG = [5, 1.5, True, b"kalle-nano", ["kalle-nano"], {"a": 1}, None, object()]


@pytest.mark.parametrize("value", WRONG)
def test_loaders_name_what_is_no_path(value: object, kalle_tiny: Kalle, tmp_path: Path) -> None:
    for load in (Kalle.from_pretrained, FlowVAE.from_pretrained, KalleLM.from_pretrained, Tokenizer.load, Voice.load, Adapter.load):
        with pytest.raises(UserError, match="expected"):
            load(value)
    for load in (kalle_tiny.load_voice, kalle_tiny.load_adapter, kalle_tiny.random_voice(1).save):
        with pytest.raises(UserError, match="expected"):
            load(value)


@pytest.mark.parametrize("value", [5, True, b"text", ["text"], {"a": 1}])
def test_a_model_names_what_it_cannot_take(value: object, kalle_tiny: Kalle) -> None:
    voice = kalle_tiny.random_voice(1)
    calls = [
        lambda: kalle_tiny.synthesize(value),
        lambda: kalle_tiny.synthesize("text", value),
        lambda: kalle_tiny.stream("text", options=value),
        lambda: kalle_tiny.synthesize_batch(value if value != ["text"] else [["text"]]),
        lambda: kalle_tiny.voice(value, "text"),
        lambda: kalle_tiny.voice(np.ones(16000, np.float32), value),
        lambda: kalle_tiny.voice(np.ones(16000, np.float32), "text", language=value),
        lambda: kalle_tiny.load_voice(value),
        lambda: Voice(value, speaker_latent=voice.speaker_latent),
        lambda: Voice(voice.bound_to, prompt_latents=value, text="text"),
        lambda: kalle_tiny.synthesize_batch(["text"], frame_budget="many"),
        lambda: generate(kalle_tiny.lm, value),
        lambda: generate(kalle_tiny.lm, torch.tensor([1, 2]), prompt_latents=value),
        lambda: generate(kalle_tiny.lm, torch.tensor([1, 2]), max_frames="3"),
        lambda: generate(kalle_tiny.lm, torch.tensor([1, 2]), options=value),
        lambda: StopRule(threshold="0.5"),
        lambda: StopRule(min_index=True),
        lambda: StopRule(probability=True),
    ]
    for call in calls:
        with pytest.raises(UserError, match="expected"):
            call()


@pytest.mark.parametrize(("given", "code"), [("en-US", "en"), ("zh_CN", "zh"), ("ENG", "en"), ("fr", "fr")])
def test_a_locale_is_its_language(given: str, code: str) -> None:
    assert GenerationOptions(language=given).language == code
