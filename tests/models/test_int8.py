"""The 8-bit engine against the reference backbone with the same, dequantised, weights."""

from __future__ import annotations

import importlib.util
import logging
import resource
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kalle.checkpoint import read_weights, write_tensors
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.backbone import Backbone, BackboneConfig
from kalle.models.int8 import Int8Backbone, Int8State
from kalle.models.int8_weights import BLOCK, FILE_NAME, RECORD_NAME, dequantise, expected_tensors, quantise, quantised_backbone
from kalle.models.lm import KalleLM, KalleLMConfig, int8_backbone
from kalle.models.lm_state import KVCache, LMState

engine = pytest.mark.skipif(not all(map(importlib.util.find_spec, ("onnx", "onnxruntime"))), reason="the extra 'fast' is not installed")
# 72 is no multiple of the block, and the heads share keys.
CONFIG = BackboneConfig(
    vocab_size=10, hidden_size=72, intermediate_size=100, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2, head_dim=16
)
ROUNDING = 0.02
"""Relative error that rounding activations to 8 bits may cause over these two layers."""


@pytest.fixture(scope="module")
def fp32() -> Backbone:
    torch.manual_seed(0)
    return Backbone(CONFIG).eval()


@pytest.fixture(scope="module")
def quantised(fp32: Backbone) -> dict[str, Tensor]:
    return dict(quantised_backbone(CONFIG, fp32.state_dict()))


@pytest.fixture(scope="module")
def reference(fp32: Backbone) -> Backbone:
    """The fp32 backbone, its linear layers rounded as the engine's are."""
    rounded = Backbone(CONFIG).eval()
    rounded.load_state_dict(fp32.state_dict())
    for layer in rounded.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = dequantise(*quantise(module.weight.data), module.in_features)
    return rounded


@pytest.fixture(scope="module")
def int8(quantised: dict[str, Tensor]) -> Int8Backbone:
    return Int8Backbone(CONFIG, quantised, threads=1)


def embeddings(rows: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, width, CONFIG.hidden_size, generator=torch.Generator().manual_seed(seed))


def relative_error(got: Tensor, expected: Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def test_a_weight_is_within_half_a_step_of_itself() -> None:
    weight = torch.randn(7, 100, generator=torch.Generator().manual_seed(0))
    codes, scales = quantise(weight)
    assert codes.shape == (7, 4, BLOCK)
    steps = torch.from_numpy(scales).repeat_interleave(BLOCK, 1)[:, :100]
    assert ((dequantise(codes, scales, 100) - weight).abs() <= steps / 2 + 1e-7).all()


def test_a_block_of_zeros_stays_zero() -> None:
    weight = torch.zeros(2, 40)
    assert torch.equal(dequantise(*quantise(weight), 40), weight)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError):
        quantise(torch.tensor([[1.0, float("nan")]]))


def test_the_tensors_are_those_announced(quantised: dict[str, Tensor]) -> None:
    assert {name: (tuple(value.shape), value.dtype) for name, value in quantised.items()} == expected_tensors(CONFIG)


@engine
@torch.no_grad()
def test_a_prompt_and_steps_equal_the_reference(int8: Int8Backbone, reference: Backbone) -> None:
    cache, state = KVCache(), Int8State()
    for width in (9, 1, 1, 3):
        x = embeddings(1, width, seed=width)
        hidden, state = int8.advance(x, state)
        expected = reference(x, past_key_values=cache).last_hidden_state[:, -1]
        assert relative_error(hidden, expected) < ROUNDING
    assert state.lengths == (14,)


@engine
def test_a_long_prompt_is_read_in_chunks(int8: Int8Backbone, reference: Backbone) -> None:
    x = embeddings(1, 1025)
    hidden, state = int8.advance(x, Int8State())
    with torch.no_grad():
        expected = reference(x).last_hidden_state[:, -1]
    assert state.lengths == (1025,)
    assert relative_error(hidden, expected) < ROUNDING


@engine
def test_rows_are_the_same_alone_and_together(int8: Int8Backbone) -> None:
    alone = [int8.advance(embeddings(1, width, seed=width), Int8State())[1] for width in (3, 100, 20)]
    together = LMState.join(alone)
    for index in range(70):  # beyond the first buffer
        z = embeddings(3, 1, seed=1000 + index)
        hidden, together = int8.advance(z, together)
        for row in range(3):
            single, alone[row] = int8.advance(z[row : row + 1], alone[row])
            assert torch.equal(hidden[row : row + 1], single)
    assert together.lengths == (73, 170, 90)


@engine
def test_a_selected_row_goes_on_as_it_would_have(int8: Int8Backbone) -> None:
    states = [int8.advance(embeddings(1, width, seed=width), Int8State())[1] for width in (5, 8)]
    both = LMState.join(states)
    z = embeddings(1, 1, seed=3)
    expected, _ = int8.advance(z, both.select([1, 0]).select([0]))
    assert torch.equal(int8.advance(z, states[1])[0], expected)


@engine
def test_foreign_tensors_are_refused(quantised: dict[str, Tensor]) -> None:
    fewer = {name: value for name, value in quantised.items() if name != "norm"}
    with pytest.raises(UserError, match=r"norm.*quantise them again"):
        Int8Backbone(CONFIG, fewer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small model that has been trained a little on nothing, so that its predictions differ."""
    torch.manual_seed(1)
    backbone = {key: value for key, value in asdict(CONFIG).items() if key != "scaling"}
    lm = KalleLM(KalleLMConfig(backbone, latent_dim=4))
    path = tmp_path_factory.mktemp("weights")
    lm.save_pretrained(path)
    return path


@pytest.fixture
def own_folder(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "weights", ignore=shutil.ignore_patterns("int8*")))


def predictions(lm: KalleLM) -> DiagGaussian:
    """Of some frames after a forced prefix, (T + 1, D)."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        return lm.predict_all(torch.arange(9)[None], torch.randn(1, 30, 4, generator=generator))[0]


def changed(folder: Path) -> tuple[KalleLM, Tensor]:
    """The model in ``folder`` with other layers, and its predictions, which are clearly others."""
    lm = KalleLM.from_pretrained(folder)
    before = predictions(lm).mean
    with torch.no_grad():
        lm.backbone.layers[0].mlp.up_proj.weight.mul_(1000)
    after = predictions(lm).mean
    assert relative_error(before, after) > 2 * ROUNDING
    return lm, after


@engine
def test_the_language_model_predicts_nearly_the_same(folder: Path) -> None:
    exact, int8 = predictions(KalleLM.from_pretrained(folder)), predictions(KalleLM.from_pretrained(folder, quantize="int8"))
    divergence = int8.kl_to(exact)
    assert 0 < divergence.mean() < 1e-3
    assert divergence.max() < 0.02


@engine
def test_embeddings_stay_as_the_file_has_them(own_folder: Path) -> None:
    """At full size they are half a gigabyte in 16 bits, of which a text reads a few rows."""
    part = own_folder / "lm"
    halved = {name: tensor.bfloat16() if "embed_tokens" in name else tensor for name, tensor in read_weights(part).items()}
    write_tensors(part / "model.safetensors", halved)
    lm = KalleLM.from_pretrained(own_folder, quantize="int8")
    assert lm.backbone.embed_tokens.weight.dtype == torch.bfloat16
    whole = KalleLM.from_pretrained(own_folder, quantize="int8")
    whole.backbone.embed_tokens.weight.data = whole.backbone.embed_tokens.weight.data.float()
    assert torch.equal(predictions(lm).mean, predictions(whole).mean)


def test_steps_equal_the_whole_prefix(folder: Path) -> None:
    lm = KalleLM.from_pretrained(folder, quantize="int8")
    latents = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = lm.predict_all(torch.arange(9)[None], latents)
        prediction, state = lm.prefill(torch.arange(9)[None])
        stepwise = [prediction.mean]
        for z in latents.unbind(1):
            prediction, state = lm.step(z, state)
            stepwise.append(prediction.mean)
    # Activations are rounded to 8 bits, which makes a difference in the last bit one of a step.
    assert relative_error(torch.stack(stepwise, 1), together.mean) < ROUNDING


@engine
def test_the_file_is_made_once(own_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    KalleLM.from_pretrained(own_folder, quantize="int8")
    assert "to 8 bits" in caplog.text
    made = {path.name: path.stat().st_mtime_ns for path in (own_folder / "lm").iterdir()}
    assert {FILE_NAME, RECORD_NAME} < set(made)
    caplog.clear()
    KalleLM.from_pretrained(own_folder, quantize="int8")
    assert not caplog.text
    assert {path.name: path.stat().st_mtime_ns for path in (own_folder / "lm").iterdir()} == made


@engine
@pytest.mark.parametrize("harm", ["cut", "bit", "other weights", "no record", "foreign record"])
def test_a_file_that_does_not_belong_is_made_anew(own_folder: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = predictions(KalleLM.from_pretrained(own_folder, quantize="int8")).mean
    part = own_folder / "lm"
    stored = (part / FILE_NAME).read_bytes()
    if harm == "cut":
        (part / FILE_NAME).write_bytes(stored[:-100])
    elif harm == "bit":
        (part / FILE_NAME).write_bytes(stored[:-1] + bytes([stored[-1] ^ 64]))
    elif harm == "other weights":
        other, expected = changed(own_folder)
        other.save_pretrained(own_folder)
    elif harm == "no record":
        (part / RECORD_NAME).unlink()
    else:
        (part / RECORD_NAME).write_text('{"format": "another"}')
    caplog.set_level(logging.INFO)
    again = predictions(KalleLM.from_pretrained(own_folder, quantize="int8")).mean
    assert "to 8 bits" in caplog.text
    assert relative_error(again, expected) < ROUNDING


@engine
def test_weights_that_are_replaced_meanwhile_are_quantised_again(own_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, expected = changed(own_folder)

    def written_late(path: Path, tensors: dict[str, Tensor]) -> None:
        monkeypatch.undo()
        other.save_pretrained(own_folder)
        write_tensors(path, tensors)

    monkeypatch.setattr("kalle.models.int8_weights.write_tensors", written_late)
    for _ in range(2):
        assert relative_error(predictions(KalleLM.from_pretrained(own_folder, quantize="int8")).mean, expected) < ROUNDING


@engine
def test_a_copied_folder_keeps_its_file(own_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    KalleLM.from_pretrained(own_folder, quantize="int8")
    copied = shutil.copytree(own_folder, tmp_path / "copy", copy_function=shutil.copyfile)
    caplog.set_level(logging.INFO)
    caplog.clear()
    KalleLM.from_pretrained(copied, quantize="int8")
    assert not caplog.text


@engine
def test_a_full_disk_leaves_nothing_behind(own_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The system takes no more than the beginning of the file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        lm = KalleLM.from_pretrained(own_folder, quantize="int8")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "not kept" in caplog.text
    assert predictions(lm).mean.isfinite().all()
    assert not list((own_folder / "lm").glob("*int8*"))
    KalleLM.from_pretrained(own_folder, quantize="int8")
    assert (own_folder / "lm" / FILE_NAME).stat().st_size > 2**16


def test_another_device_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalle.models.lm.resolve_device", torch.device)
    with pytest.raises(UserError, match="quantize"):
        int8_backbone(folder, "cuda")
