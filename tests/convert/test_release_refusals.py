"""What is refused when released files are converted: with one line, and without a trace on the disk."""

from __future__ import annotations

import json
import os
import pickle
import resource
from pathlib import Path

import pytest
import torch

from kalle.convert.release import convert_release, convert_to_release
from kalle.errors import UserError
from kalle.files import MARKER
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
FLOWVAE, FLOWVAE_JSON = REFERENCE / "flowvae_tiny.pt", REFERENCE / "flowvae_tiny.json"
LM, LM_JSON = REFERENCE / "lm_tiny.pt", REFERENCE / "lm_tiny.json"
LM_SPEAKER = REFERENCE / "lm_speaker_tiny.pt"
HEAD, EMBEDDING = "base_model.lm_head.weight", "base_model.model.embed_tokens.weight"


def _load(path):
    return torch.load(path, weights_only=True)


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _fails(tmp_path, *arguments, match: str = "[a-z]") -> str:
    """The one-line error; neither the folder nor anything beside it may have appeared."""
    before = _files(tmp_path)
    with pytest.raises(UserError, match=match) as caught:
        convert_release(tmp_path / "deep" / "name", *arguments)
    assert _files(tmp_path) == before
    assert not (tmp_path / "deep").exists()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_every_lm_tensor_that_does_not_fit_is_listed(tmp_path):
    released = _load(LM)
    del released["audio_linear.bias"], released["base_model.model.norm.weight"]
    released["distribution_linear.bias"] = torch.zeros(3)
    released["base_model.model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    torch.save(released, tmp_path / "model.pt")
    message = _fails(tmp_path, None, None, tmp_path / "model.pt", LM_JSON, match="4 tensors")
    for line in (
        "missing: audio_linear.bias (64,)",
        "missing: base_model.model.norm.weight (64,)",
        "misshapen: distribution_linear.bias is (3,), expected (16,)",
        "superfluous: base_model.model.layers.7.mlp.up_proj.weight (2, 2)",
    ):
        kind, _, what = line.partition(": ")
        assert what in message[message.index(f"{kind}: ") :]
    assert "model.pt" in message


def test_every_flowvae_tensor_that_does_not_fit_is_listed(tmp_path):
    released = _load(FLOWVAE)["generator"]
    del released["conv_pre.bias"], released["flow.flows.0.pre.weight"]
    released["conv_post.bias"] = torch.zeros(4)
    released["flow.flows.1.pre.weight"] = torch.zeros(2)
    torch.save({"generator": released}, tmp_path / "flowvae.pt")
    message = _fails(tmp_path, tmp_path / "flowvae.pt", FLOWVAE_JSON, None, match="4 tensors")
    for line in (
        "missing: conv_pre.bias",
        "missing: flow.flows.0.pre.weight",
        "misshapen: conv_post.bias is (4,), expected (1,)",
        "superfluous: flow.flows.1.pre.weight (2,)",
    ):
        kind, _, what = line.partition(": ")
        assert what in message[message.index(f"{kind}: ") :]


def test_without_a_configuration_the_released_one_is_expected(tmp_path):
    message = _fails(tmp_path, None, None, LM, match="lm_config=")
    assert "misshapen: base_model.model.embed_tokens.weight is (320, 64), expected (128264, 2048)" in message


@pytest.mark.parametrize("change", ["bit", "dtype"])
def test_an_untied_head_is_refused(tmp_path, change):
    released = _load(LM)
    head = released[EMBEDDING].clone()
    if change == "bit":
        head.view(torch.int32)[5, 3] ^= 1
    released[HEAD] = head if change == "bit" else head.double()
    torch.save(released, tmp_path / "model.pt")
    assert HEAD in _fails(tmp_path, None, None, tmp_path / "model.pt", LM_JSON, match="not tied")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch '{self.target}'",)


@pytest.mark.parametrize("kind", ["torch", "pickle", "hidden in the state"])
def test_a_pickle_that_wants_to_run_code_is_refused(tmp_path, kind):
    evil, target = tmp_path / "evil.pt", tmp_path / "ran"
    if kind == "pickle":
        with evil.open("wb") as file:
            pickle.dump(Malicious(target), file, protocol=2)
    else:
        torch.save(Malicious(target) if kind == "torch" else {**_load(LM), "extra": Malicious(target)}, evil)
    for arguments in ((None, None, evil, LM_JSON), (evil, FLOWVAE_JSON, None)):
        message = _fails(tmp_path, *arguments, match="refused")
        assert "evil.pt" in message
        assert "system" in message
    assert not target.exists()


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a PyTorch file"),
        (b"hello world", "begins with b'hello world'"),
        (LFS_POINTER, "the real file is stored with LFS"),
        (b"PK\x03\x04 torn", "is cut off"),
        (LM.read_bytes()[:-2000], "is cut off"),
        (pickle.dumps({"a": list(range(999))}, protocol=2)[:-200], "is cut off"),
    ],
)
def test_torn_and_foreign_files_are_named(tmp_path, content, words):
    path = tmp_path / "model.pt"
    path.write_bytes(content)
    message = _fails(tmp_path, None, None, path, LM_JSON, match="PyTorch file")
    assert "model.pt" in message
    assert words in message
    assert "`kalle download`" in message
    assert "run code" not in message


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ([1, 2], "holds a list"),
        ({"state": {}}, r"state \(dict\)"),
        ({"generator": {}, "step": 3}, r"generator \(dict\), step \(int\)"),
        ({"generator": 3}, r"generator \(int\)"),
        ({"generator": {"x": torch.zeros(2)}}, r"missing: .* and \d+ more; superfluous: x \(2,\)"),
        ({"generator": {"conv_pre.bias": 3}}, r"conv_pre.bias \(int\)"),
    ],
)
def test_other_contents_are_not_the_released_format(tmp_path, content, match):
    torch.save(content, tmp_path / "flowvae.pt")
    _fails(tmp_path, tmp_path / "flowvae.pt", FLOWVAE_JSON, None, match=match)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent": 8}, ["unknown key 'latent'", "latent_dim", "fmax_for_loss"]),
        ({"latent_dim": None, "upsample_rates": None}, ["missing key 'latent_dim', 'upsample_rates'"]),
        ({"activation": "snake"}, ["activation", "'snake'", "'snakebeta'"]),
        ({"causal": False}, ["causal is False"]),
        ({"upsample_kernel_sizes": [10, 8, 8, 8, 4, 5]}, ["upsample_kernel_sizes"]),
        ({"resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 7]]}, ["resblock_dilation_sizes"]),
        ({"latent_dim": "8"}, ["latent_dim is '8'", "positive integer"]),
        ({"downsample_rates": [2, 2, 4, 4, 4, 2.5]}, ["downsample_rates"]),
        ({"downsample_rates": [2, 2, 4, 4, 4, 2]}, ["512 and 1280"]),
    ],
)
def test_a_json_that_does_not_describe_the_released_kind(tmp_path, change, words):
    values = {**json.loads(FLOWVAE_JSON.read_text()), **change}
    (tmp_path / "f.json").write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    message = _fails(tmp_path, FLOWVAE, tmp_path / "f.json", None)
    assert all(word in message for word in words), message


def test_an_unknown_key_of_the_lm_configuration(tmp_path):
    (tmp_path / "lm.json").write_text(json.dumps({**json.loads(LM_JSON.read_text()), "hidden_sise": 64}))
    assert "hidden_size" in _fails(tmp_path, None, None, LM, tmp_path / "lm.json", match="unknown key 'hidden_sise'")


def test_requests_that_lack_something(tmp_path, tokenizer_folder):
    _fails(tmp_path, None, None, None, match="nothing to convert")
    _fails(tmp_path, FLOWVAE, None, None, match="flowvae_config= is missing")
    _fails(tmp_path, None, FLOWVAE_JSON, LM, LM_JSON, match="flowvae= is missing")
    _fails(tmp_path, None, None, None, LM_JSON, tokenizer_folder, match="lm= is missing")
    _fails(tmp_path, tmp_path / "none.pt", FLOWVAE_JSON, None, match="file not found: got .*none.pt")
    _fails(tmp_path, FLOWVAE, tmp_path / "none.json", None, match="file not found: got .*none.json")
    _fails(tmp_path, None, None, None, None, tmp_path / "none", match="no such tokenizer folder")


def test_a_tokenizer_folder_needs_its_json(tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.model").write_text("x")
    assert "tokenizer.model" in _fails(tmp_path, None, None, None, None, folder, match="no tokenizer.json")
    (folder / "tokenizer.json").write_text("{}")
    _fails(tmp_path, None, None, None, None, folder, match=r"tokenizer")


def test_parts_that_do_not_fit_each_other_are_refused(tmp_path):
    KalleLM(KalleLMConfig({**json.loads(LM_JSON.read_text()), "vocab_size": 100}, latent_dim=6)).save_pretrained(tmp_path / "other")
    KalleLM(KalleLMConfig({**json.loads(LM_JSON.read_text()), "vocab_size": 100}, latent_dim=8)).save_pretrained(tmp_path / "small")
    Tokenizer.bytes().save(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="latent_dim 8, the language model 6"):
        convert_release(tmp_path / "other", FLOWVAE, FLOWVAE_JSON, None)
    with pytest.raises(UserError, match=r"the tokenizer has 265 ids, the language model 100"):
        convert_release(tmp_path / "small", None, None, None, None, tmp_path / "tokenizer")
    assert [path.name for path in (tmp_path / "other").iterdir()] == ["lm"]
    assert [path.name for path in (tmp_path / "small").iterdir()] == ["lm"]


def test_a_folder_with_other_things_is_left_alone(tmp_path):
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(UserError):
        convert_release(tmp_path, FLOWVAE, FLOWVAE_JSON, None)
    with pytest.raises(UserError):
        convert_release(tmp_path / "letter.txt", FLOWVAE, FLOWVAE_JSON, None)
    with pytest.raises(UserError):
        convert_to_release(tmp_path, tmp_path / "back")
    convert_release(tmp_path / "name", FLOWVAE, FLOWVAE_JSON, None)
    with pytest.raises(UserError):
        convert_to_release(tmp_path / "name", tmp_path)
    assert _files(tmp_path)[0] == "letter.txt"


@pytest.fixture
def little_disk():
    """Files may not grow beyond 400 kB: writing more fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_disk_space(tmp_path, little_disk):
    _fails(tmp_path, FLOWVAE, FLOWVAE_JSON, None, match=r"cannot write .*make room on the disk")


def test_no_disk_space_on_the_way_back(tmp_path):
    convert_release(tmp_path / "name", FLOWVAE, FLOWVAE_JSON, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*make room on the disk"):
            convert_to_release(tmp_path / "name", tmp_path / "back")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_a_failure_while_a_part_is_added_leaves_the_folder_as_it_was(tmp_path, monkeypatch):
    out = tmp_path / "name"
    convert_release(out, FLOWVAE, FLOWVAE_JSON, None)
    before = {name: (out / name).read_bytes() for name in _files(out)}
    replace = os.replace

    def failing(source, target):
        if Path(target) == out / "config.json":
            raise OSError(28, "No space left on device", str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(UserError, match="No space left on device"):
        convert_release(out, None, None, LM, LM_JSON)
    assert {name: (out / name).read_bytes() for name in _files(tmp_path / "name")} == before
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


def test_what_a_killed_run_left_goes(tmp_path):
    left = tmp_path / "name.0123456789abcdef.partial" / "flowvae"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    convert_release(tmp_path / "name", FLOWVAE, FLOWVAE_JSON, None)
    assert (left / "model.safetensors").read_bytes() == b"half", "not known to be ours"
    (left.parent / MARKER).touch()
    os.utime(left.parent / MARKER, (0, 0))
    convert_release(tmp_path / "other", FLOWVAE, FLOWVAE_JSON, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["name", "other"]
    FlowVAE.from_pretrained(tmp_path / "name")


def _nested(parts: dict) -> dict:
    """As weight norm spells its parts since it is a parametrization."""
    return {
        key.replace("weight_g", "parametrizations.weight.original0").replace("weight_v", "parametrizations.weight.original1"): value
        for key, value in parts.items()
    }


WRAPPINGS = {
    "bare": lambda state: state,
    "DataParallel": lambda state: {"generator": {f"module.{name}": value for name, value in state.items()}},
    "Lightning": lambda state: {"state_dict": {f"net.{name}": value for name, value in state.items()}, "epoch": 3, "global_step": 7},
    "with discriminators": lambda state: {
        "state_dict": {**{f"generator.{name}": value for name, value in state.items()}, "discriminator.a": torch.zeros(2)}
    },
    "compiled": lambda state: {"model": {f"_orig_mod.{name}": value for name, value in state.items()}},
    "average": lambda state: {"ema": {f"ema_model.module.{name}": value for name, value in state.items()}, "step": 1},
    "average beside": lambda state: {"state_dict": state, "ema": {name: 0 * value for name, value in state.items()}},
    "weight norm": lambda state: {"generator": _nested(state)},
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_what_trainers_wrap_weights_in_is_understood(tmp_path, wrapping, caplog):
    released = _load(FLOWVAE)["generator"]
    torch.save(WRAPPINGS[wrapping](released), tmp_path / "flowvae.pt")
    convert_release(tmp_path / "name", tmp_path / "flowvae.pt", FLOWVAE_JSON, None)
    convert_release(tmp_path / "plain", FLOWVAE, FLOWVAE_JSON, None)
    ours, plain = (tmp_path / name / "flowvae" / "model.safetensors" for name in ("name", "plain"))
    assert ours.read_bytes() == plain.read_bytes()
    assert ("discriminator.a" in caplog.text) == (wrapping == "with discriminators")


def test_a_wrapped_language_model_is_understood(tmp_path):
    torch.save({f"module.{name}": value for name, value in _load(LM).items()}, tmp_path / "model.pt")
    convert_release(tmp_path / "name", None, None, tmp_path / "model.pt", LM_JSON)
    convert_release(tmp_path / "plain", None, None, LM, LM_JSON)
    assert (tmp_path / "name/lm/model.safetensors").read_bytes() == (tmp_path / "plain/lm/model.safetensors").read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    released = _load(LM)
    name = "base_model.model.layers.0.self_attn.v_proj.weight"
    released[name] = released[name].clone()
    released[name][1, 2] = value
    torch.save(released, tmp_path / "model.pt")
    message = _fails(tmp_path, None, None, tmp_path / "model.pt", LM_JSON, match="not finite")
    assert f"in 1 of {len(released) - (HEAD in released)} tensors ({name})" in message


def test_errors_about_many_tensors_are_short(tmp_path):
    torch.save({f"a.very.long.name.of.a.tensor.{number}": torch.zeros(1) for number in range(3000)}, tmp_path / "model.pt")
    assert len(_fails(tmp_path, None, None, tmp_path / "model.pt", LM_JSON)) < 1500
    torch.save({str(number): number for number in range(3000)}, tmp_path / "model.pt")
    assert len(_fails(tmp_path, None, None, tmp_path / "model.pt", LM_JSON)) < 500
