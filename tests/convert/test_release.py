"""Released files to a weight folder and back: nothing changes on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from kalle.checkpoint import read_json, read_tensors, write_json
from kalle.convert.release import convert_release, convert_to_release
from kalle.errors import UserError
from kalle.models.flowvae import FlowConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.lm import KalleLM, KalleLMConfig

REFERENCE = Path(__file__).parents[1] / "reference"
FLOWVAE, FLOWVAE_JSON = REFERENCE / "flowvae_tiny.pt", REFERENCE / "flowvae_tiny.json"
LM, LM_JSON = REFERENCE / "lm_tiny.pt", REFERENCE / "lm_tiny.json"
LM_SPEAKER = REFERENCE / "lm_speaker_tiny.pt"
HEAD, EMBEDDING = "base_model.lm_head.weight", "base_model.model.embed_tokens.weight"


def _load(path):
    return torch.load(path, weights_only=True)


def _assert_identical(got, expected):
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        assert got[name].shape == tensor.shape, name
        assert got[name].numpy().tobytes() == tensor.numpy().tobytes(), name


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("lm", [LM, LM_SPEAKER], ids=["plain", "speaker"])
def test_there_and_back_is_identical(tmp_path, tokenizer_folder, lm):
    convert_release(tmp_path / "name", FLOWVAE, FLOWVAE_JSON, lm, LM_JSON, tokenizer_folder)
    written = read_json(tmp_path / "name" / "config.json")
    assert written == {"format_version": 1, "parts": ["flowvae", "lm", "tokenizer"], "sample_rate": 16000}
    FlowVAE.from_pretrained(tmp_path / "name")
    assert (KalleLM.from_pretrained(tmp_path / "name").speaker_encoder is None) == (lm == LM)
    convert_to_release(tmp_path / "name", tmp_path / "back")
    back = tmp_path / "back"
    tokenizer = ["tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"]
    assert _files(back) == ["flowvae.json", "flowvae.pt", "lm.json", "model.pt", *tokenizer]
    assert set(_load(back / "flowvae.pt")) == {"generator"}
    _assert_identical(_load(back / "flowvae.pt")["generator"], _load(FLOWVAE)["generator"])
    _assert_identical(_load(back / "model.pt"), _load(lm))
    assert json.loads((back / "flowvae.json").read_text()) == json.loads(FLOWVAE_JSON.read_text())
    assert json.loads((back / "lm.json").read_text()) == json.loads(LM_JSON.read_text())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (back / "tokenizer" / name).read_bytes() == (tokenizer_folder / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "name", "released tokenizer"]


def test_the_way_from_our_folder_and_back_is_identical_too(tmp_path):
    convert_release(tmp_path / "name", FLOWVAE, FLOWVAE_JSON, LM_SPEAKER, LM_JSON)
    convert_to_release(tmp_path / "name", tmp_path / "back")
    back = tmp_path / "back"
    convert_release(tmp_path / "again", back / "flowvae.pt", back / "flowvae.json", back / "model.pt", back / "lm.json")
    assert _files(tmp_path / "again") == _files(tmp_path / "name")
    for name in _files(tmp_path / "name"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "name" / name).read_bytes(), name


def test_training_keys_of_the_json_survive(tmp_path):
    released = json.loads((REFERENCE / "released_flowvae_config.json").read_text())
    values = {**released, **json.loads(FLOWVAE_JSON.read_text())}
    (tmp_path / "f.json").write_text(json.dumps(values))
    convert_release(tmp_path / "name", FLOWVAE, tmp_path / "f.json", None)
    convert_to_release(tmp_path / "name", tmp_path / "back")
    assert json.loads((tmp_path / "back" / "flowvae.json").read_text()) == values
    assert values["fmax"] == 12000


def test_dtypes_are_kept(tmp_path):
    released = _load(LM_SPEAKER)
    half = {name: tensor.half() if name.startswith("base_model.") else tensor for name, tensor in released.items()}
    half[HEAD] = half[EMBEDDING]
    torch.save(half, tmp_path / "model.pt")
    flowvae = {name: tensor.bfloat16() for name, tensor in _load(FLOWVAE)["generator"].items()}
    torch.save({"generator": flowvae}, tmp_path / "flowvae.pt")
    convert_release(tmp_path / "name", tmp_path / "flowvae.pt", FLOWVAE_JSON, tmp_path / "model.pt", LM_JSON)
    stored = read_tensors(tmp_path / "name" / "lm" / "model.safetensors")
    assert {tensor.dtype for name, tensor in stored.items() if name.startswith("backbone.")} == {torch.float16}
    assert stored["audio_linear.weight"].dtype == torch.float32
    convert_to_release(tmp_path / "name", tmp_path / "back")
    _assert_identical(_load(tmp_path / "back" / "model.pt"), half)
    got = _load(tmp_path / "back" / "flowvae.pt")["generator"]
    assert {tensor.dtype for tensor in got.values()} == {torch.bfloat16}
    assert all(torch.equal(got[name], tensor) for name, tensor in flowvae.items())


def test_shared_memory_is_kept(tmp_path):
    released = _load(LM)
    names = [name for name in released if name.endswith("layernorm.weight")][:2]
    shared = torch.arange(128.0)
    released[names[0]], released[names[1]] = shared[:64], shared[32:96]  # overlapping views of one storage
    torch.save(released, tmp_path / "model.pt")
    convert_release(tmp_path / "name", None, None, tmp_path / "model.pt", LM_JSON)
    convert_to_release(tmp_path / "name", tmp_path / "back")
    _assert_identical(_load(tmp_path / "back" / "model.pt"), released)


@pytest.mark.parametrize("alone", ["flowvae", "lm", "tokenizer"])
def test_any_part_alone(tmp_path, tokenizer_folder, alone):
    files = {
        "flowvae": (FLOWVAE, FLOWVAE_JSON, None),
        "lm": (None, None, LM, LM_JSON),
        "tokenizer": (None, None, None, None, tokenizer_folder),
    }
    convert_release(tmp_path / "name", *files[alone])
    config = read_json(tmp_path / "name" / "config.json")
    assert config["parts"] == [alone]
    assert ("sample_rate" in config) == (alone == "flowvae")
    assert sorted(path.name for path in (tmp_path / "name").iterdir()) == ["config.json", alone]
    convert_to_release(tmp_path / "name", tmp_path / "back")
    assert (tmp_path / "back" / {"flowvae": "flowvae.pt", "lm": "model.pt", "tokenizer": "tokenizer"}[alone]).exists()


def test_a_part_is_added_and_the_rest_kept(tmp_path, tokenizer_folder):
    out = tmp_path / "name"
    convert_release(out, FLOWVAE, FLOWVAE_JSON, None)
    write_json(out / "config.json", {**read_json(out / "config.json"), "voice": "anna"})
    before = (out / "flowvae" / "model.safetensors").read_bytes()
    convert_release(out, None, None, LM, LM_JSON, tokenizer_folder)
    assert read_json(out / "config.json") == {
        "format_version": 1,
        "parts": ["flowvae", "lm", "tokenizer"],
        "sample_rate": 16000,
        "voice": "anna",
    }
    assert (out / "flowvae" / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match=r"already there: .* has lm"):
        convert_release(out, None, None, LM_SPEAKER, LM_JSON)
    assert KalleLM.from_pretrained(out).speaker_encoder is None


def test_the_weights_are_readable_as_the_umask_says(tmp_path):
    before = os.umask(0o022)
    try:
        convert_release(tmp_path / "name", FLOWVAE, FLOWVAE_JSON, None)
    finally:
        os.umask(before)
    assert (tmp_path / "name" / "flowvae" / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_tied_head_may_have_its_own_memory_or_be_absent(tmp_path):
    for name, head in (("own", True), ("absent", False)):
        released = _load(LM)
        released[HEAD] = released[EMBEDDING].clone()
        if not head:
            del released[HEAD]
        torch.save(released, tmp_path / f"{name}.pt")
        convert_release(tmp_path / name, None, None, tmp_path / f"{name}.pt", LM_JSON)
        convert_to_release(tmp_path / name, tmp_path / f"{name} back")
        _assert_identical(_load(tmp_path / f"{name} back" / "model.pt"), released)


def test_a_model_of_our_own_goes_to_the_released_format(tmp_path, golden_own):
    convert_to_release(golden_own, tmp_path / "back")
    back = tmp_path / "back"
    convert_release(tmp_path / "again", back / "flowvae.pt", back / "flowvae.json", back / "model.pt", back / "lm.json")
    for part in ("flowvae", "lm"):
        ours, again = (read_tensors(folder / part / "model.safetensors") for folder in (golden_own, tmp_path / "again"))
        _assert_identical(again, ours)
        assert read_json(golden_own / part / "config.json") == read_json(tmp_path / "again" / part / "config.json")


@pytest.fixture
def golden_own(tmp_path) -> Path:
    """A folder that a training run could have written: without release.json."""
    convert_release(tmp_path / "own", FLOWVAE, FLOWVAE_JSON, LM, LM_JSON)
    for part in ("flowvae", "lm"):
        (tmp_path / "own" / part / "release.json").unlink()
    return tmp_path / "own"


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"decoder": ISTFTConfig(channels=8, blocks=1)}, "istft"),
        ({"flow": None}, "no flow"),
        ({"flow": FlowConfig(hidden_channels=8, couplings=2)}, "couplings"),
    ],
)
def test_what_the_release_cannot_express_is_refused(tmp_path, change, match):
    config = FlowVAEConfig.from_dict(read_json(_converted(tmp_path) / "flowvae" / "config.json"))
    FlowVAE(FlowVAEConfig(**{**vars(config), **change})).save_pretrained(tmp_path / "odd")
    with pytest.raises(UserError, match=match):
        convert_to_release(tmp_path / "odd", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def _converted(tmp_path) -> Path:
    convert_release(tmp_path / "converted", FLOWVAE, FLOWVAE_JSON, None)
    return tmp_path / "converted"


def test_normalised_latents_have_no_released_format(tmp_path):
    config = KalleLMConfig(json.loads(LM_JSON.read_text()), latent_dim=8, normalise_latents=True)
    KalleLM(config).save_pretrained(tmp_path / "name")
    with pytest.raises(UserError, match="normalise_latents"):
        convert_to_release(tmp_path / "name", tmp_path / "back")


def test_a_record_that_contradicts_the_configuration_is_refused(tmp_path):
    folder = _converted(tmp_path)
    values = json.loads(FLOWVAE_JSON.read_text())
    write_json(folder / "flowvae" / "release.json", {"config": {**values, "sampling_rate": 24000}})
    with pytest.raises(UserError, match="contradicts"):
        convert_to_release(folder, tmp_path / "back")
