"""Speaking with 8-bit weights: every path of synthesis goes on, and what cannot be is said."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from kalle.errors import UserError
from kalle.models.int8 import Int8Backbone
from kalle.models.int8_weights import FILE_NAME
from kalle.models.lm import KalleLM
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.longform import LongForm
from kalle.synthesis.longform_files import settings_of
from kalle.synthesis.options import GenerationOptions, SpeechRequest
from kalle.synthesis.release_compat import ReleaseCompatibility

engine = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))), reason="the extra 'fast' is not installed")
TEXT = "Lift the box."


@pytest.fixture
def int8(weight_folder: Path) -> Kalle:
    return Kalle.from_pretrained(weight_folder, "cpu", quantize="int8")


@engine
def test_a_seed_means_the_same_alone_in_a_batch_and_in_a_stream(int8: Kalle) -> None:
    assert isinstance(int8.lm.backbone, Int8Backbone)
    request = SpeechRequest(TEXT, seed=3, max_seconds=1, retries=0)
    alone = int8.speak(request)
    first, _ = int8.synthesize_batch([request, SpeechRequest("Another, longer text.", seed=4, max_seconds=1, retries=0)])
    streamed = np.concatenate(list(int8.stream(TEXT, seed=3, max_seconds=1)))
    # Activations are rounded to 8 bits, which makes a difference in the last bit of torch's layers one of a step.
    np.testing.assert_allclose(first.audio, alone.audio, atol=1e-2)
    np.testing.assert_allclose(streamed, alone.audio, atol=1e-2)


@engine
def test_guidance_and_the_algorithm_without_a_cache_work(int8: Kalle) -> None:
    uncached = ReleaseCompatibility(no_cache=True)
    for options in ({"guidance": 1.5}, {"compatibility": uncached}):
        assert np.isfinite(int8.synthesize(TEXT, seed=3, max_seconds=0.5, retries=0, **options).audio).all()


@engine
def test_what_needs_the_weights_themselves_is_refused(int8: Kalle) -> None:
    with pytest.raises(UserError, match="load the model without quantize"):
        int8.synthesize(TEXT, compatibility=ReleaseCompatibility(config_dtype=True))
    with pytest.raises(UserError, match="load the model without quantize"):
        _ = int8.lm_hash


@engine
def test_other_layers_are_another_model_to_a_continued_long_text(weight_folder: Path, tmp_path: Path) -> None:
    def model() -> object:
        kalle = Kalle.from_pretrained(folder, "cpu", quantize="int8")
        return settings_of(LongForm(kalle, TEXT, options=GenerationOptions(seed=1, max_seconds=1)))["model"]

    folder = Path(shutil.copytree(weight_folder, tmp_path / "weights"))
    before = model()
    assert model() == before
    lm = KalleLM.from_pretrained(folder)
    with torch.no_grad():
        lm.backbone.layers[0].mlp.up_proj.weight.mul_(2)
    lm.save_pretrained(folder)
    assert model() != before


def test_auto_leaves_a_small_model_as_it_is(weight_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    kalle = Kalle.from_pretrained(weight_folder, "cpu", quantize="auto")
    assert not isinstance(kalle.lm.backbone, Int8Backbone)
    assert "too few to gain" in caplog.text
    assert not (weight_folder / "lm" / FILE_NAME).exists()


@engine
def test_auto_takes_8_bits_where_the_model_is_large(
    weight_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kalle.synthesis.kalle.QUANTIZE_FROM", 1)
    caplog.set_level(logging.INFO)
    assert isinstance(Kalle.from_pretrained(weight_folder, "cpu", quantize="auto").lm.backbone, Int8Backbone)
    assert "8-bit weights" in caplog.text


@engine
def test_auto_goes_on_where_the_engine_does_not_run(
    weight_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as an onnxruntime without these operators; here it is given a network that it does not know."""
    monkeypatch.setattr("kalle.synthesis.kalle.QUANTIZE_FROM", 1)
    monkeypatch.setattr("kalle.models.int8._graph", lambda config: b"no network")
    caplog.set_level(logging.INFO)
    assert not isinstance(Kalle.from_pretrained(weight_folder, "cpu", quantize="auto").lm.backbone, Int8Backbone)
    assert "do not run here" in caplog.text
    with pytest.raises(UserError, match="leave quantize out"):
        Kalle.from_pretrained(weight_folder, "cpu", quantize="int8")


def test_auto_without_the_library_says_what_is_missing(
    weight_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kalle.synthesis.kalle.QUANTIZE_FROM", 1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    caplog.set_level(logging.INFO)
    assert not isinstance(Kalle.from_pretrained(weight_folder, "cpu", quantize="auto").lm.backbone, Int8Backbone)
    assert "'fast'" in caplog.text
    with pytest.raises(UserError, match="'fast'"):
        Kalle.from_pretrained(weight_folder, "cpu", quantize="int8")


@pytest.mark.parametrize(
    ("arguments", "remedy"), [({"quantize": "int4"}, "expected int8"), ({"quantize": "int8", "dtype": "bfloat16"}, "leave dtype out")]
)
def test_what_does_not_fit_is_refused_before_anything_is_loaded(arguments: dict[str, str], remedy: str) -> None:
    with pytest.raises(UserError, match=remedy):
        Kalle.from_pretrained("no such folder", "cpu", **arguments)


def test_half_speaks(weight_folder: Path) -> None:
    """With the clock of this machine, whichever it finds faster."""
    kalle = Kalle.from_pretrained(weight_folder, "cpu", dtype="half")
    assert kalle.lm.backbone.embed_tokens.weight.dtype in (torch.float16, torch.bfloat16)
    assert len(kalle.synthesize("Lift the box.", seed=3, max_seconds=0.4, retries=0).audio)
