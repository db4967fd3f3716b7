"""Weight folders: writing whole or not at all, strict reading, and the hash."""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from kalle import checkpoint
from kalle.checkpoint import (
    dataclass_from_dict,
    load_module,
    load_strict,
    mismatches,
    part_folder,
    read_json,
    read_tensors,
    resolve_device,
    save_part,
    weights_hash,
    write_json,
    write_tensors,
)
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAEConfig


def _module() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def _names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_part_round_trip_keeps_values_and_dtypes(tmp_path):
    module = _module()
    module[0].half()
    save_part(tmp_path / "name" / "lm", {"size": 3}, module)
    assert _names(tmp_path / "name" / "lm") == ["config.json", "model.safetensors"]
    assert read_json(tmp_path / "name" / "lm" / "config.json") == {"size": 3}
    tensors = read_tensors(tmp_path / "name" / "lm" / "model.safetensors")
    state = module.state_dict()
    assert set(tensors) == set(state)
    assert all(tensors[name].dtype == state[name].dtype and torch.equal(tensors[name], state[name]) for name in state)


def test_part_folder_takes_the_whole_folder_or_the_part(tmp_path):
    save_part(tmp_path / "name" / "lm", {}, _module())
    assert part_folder(tmp_path / "name", "lm") == part_folder(tmp_path / "name" / "lm", "lm") == tmp_path / "name" / "lm"
    save_part(tmp_path / "renamed", {}, _module())
    assert part_folder(tmp_path / "renamed", "lm") == tmp_path / "renamed"
    for folder, part, lacks in (
        (tmp_path / "name", "flowvae", r"no Flow-VAE \(flowvae/\) in"),
        (tmp_path, "lm", r"no language model \(lm/\) in"),
        (tmp_path / "none", "lm", "there is no folder"),
    ):
        with pytest.raises(UserError, match=rf"not a weight folder: {lacks} '{re.escape(str(folder))}', expected {part}/config.json"):
            part_folder(folder, part)


def test_tensors_that_share_memory_are_stored_each(tmp_path):
    base = torch.arange(12.0)
    tensors = {"whole": base, "same": base, "middle": base[3:9], "turned": base.view(3, 4).t()}
    tensors |= {"empty": torch.empty(0), "none": torch.empty(0, 2)}
    write_tensors(tmp_path / "x.safetensors", tensors)
    stored = read_tensors(tmp_path / "x.safetensors")
    assert set(stored) == set(tensors)
    assert all(torch.equal(stored[name], tensor) for name, tensor in tensors.items())


def test_written_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    finally:
        os.umask(before)
    assert (tmp_path / "x.safetensors").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*x.safetensors.*make room"):
            write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert _names(tmp_path) == ["x.safetensors"]
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["x"], torch.ones(2))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write"):
        write_tensors(tmp_path / "file" / "x.safetensors", {"x": torch.ones(2)})


def test_an_interrupted_write_leaves_no_partial_file(tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "save_file", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(2)})
    assert _names(tmp_path) == []


def test_json_is_written_whole_and_read_with_the_place_of_the_mistake(tmp_path):
    write_json(tmp_path / "deep" / "x.json", {"name": "Käthe"})
    assert _names(tmp_path / "deep") == ["x.json"]
    assert "Käthe" in (tmp_path / "deep" / "x.json").read_text(encoding="utf-8")
    for content, match in ((b"{", "not valid JSON.*line 1"), (b"[1]", "holds a list"), (b"\xff\xfe\x00", "not valid JSON")):
        (tmp_path / "bad.json").write_bytes(content)
        with pytest.raises(UserError, match=match):
            read_json(tmp_path / "bad.json")
    with pytest.raises(UserError, match="file not found"):
        read_json(tmp_path / "none.json")


def test_torn_tensors_are_named(tmp_path):
    write_tensors(tmp_path / "x.safetensors", {"x": torch.ones(100)})
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "x.safetensors").read_bytes()[:-50])
    with pytest.raises(UserError, match=r"not a readable safetensors file: .*torn"):
        read_tensors(tmp_path / "torn.safetensors")
    with pytest.raises(UserError, match="file not found"):
        read_tensors(tmp_path / "none.safetensors")


def test_strict_loading_lists_everything_and_changes_nothing_on_failure():
    module = _module()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    tensors = {name: tensor + 1 for name, tensor in before.items()}
    del tensors["0.bias"]
    tensors["1.weight"] = torch.zeros(9)
    tensors["2.weight"] = torch.zeros(1)
    tensors["0.weight"] = tensors["0.weight"].int()
    tensors["1.num_batches_tracked"] = torch.tensor(1.5)
    with pytest.raises(UserError) as caught:
        load_strict(module, tensors, "here")
    message = str(caught.value)
    for words in ("'here'", "5 tensors", "missing: 0.bias (4,)", "misshapen: 1.weight is (9,), expected (4,)"):
        assert words in message
    for words in (
        "superfluous: 2.weight (1,)",
        "mistyped: 0.weight is int32, expected float32",
        "1.num_batches_tracked is float32, expected int64",
    ):
        assert words in message
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


def test_strict_loading_copies_every_tensor():
    module = _module()
    tensors = {name: torch.full_like(tensor, 2) for name, tensor in module.state_dict().items()}
    load_strict(module, tensors, "here")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())
    assert mismatches(module.state_dict(), tensors) == []


def test_an_unknown_key_lists_the_valid_ones():
    @dataclasses.dataclass(frozen=True)
    class Config:
        width: int = 1
        depth: int = 2

    assert dataclass_from_dict(Config, {"depth": 5}, "x.json") == Config(1, 5)
    with pytest.raises(UserError, match=r"unknown key 'deep', 'wide' in 'x.json'; valid keys: width, depth"):
        dataclass_from_dict(Config, {"wide": 1, "deep": 2}, "x.json")


def test_a_wrong_type_is_named_with_its_place():
    good = {"latent_dim": 8, "encoder": {"channels": [1, 2], "strides": [1280]}, "flow": None, "decoder": {"kind": "istft"}}
    assert FlowVAEConfig.from_dict(good).encoder.channels == (1, 2)
    for values, words in (
        ({"latent_dim": "x"}, "latent_dim is 'x', expected a whole number"),
        ({"latent_dim": True}, "latent_dim is True"),
        ({"encoder": 3}, "encoder is 3, expected an object"),
        ({"encoder": {"channels": [1, "2"]}}, r"encoder\.channels is \[1, '2'\], expected a list, each a whole number"),
        ({"flow": {"couplings": 1.5}}, r"flow\.couplings is 1\.5"),
        ({"decoder": [1]}, r"decoder is \[1\], expected an object"),
        ({"decoder": {"kind": ["istft"]}}, "unknown decoder.kind"),
        ({"decoder": {"kind": "istft", "blocks": None}}, r"decoder\.blocks is None"),
        ({"encoder": {"width": 1}}, r"unknown key 'encoder\.width' in 'x'; valid keys: encoder\.channels, "),
    ):
        with pytest.raises(UserError, match=words):
            FlowVAEConfig.from_dict({**good, **values}, "x")
    with pytest.raises(UserError, match=r"the whole is \[1\]"):
        dataclass_from_dict(FlowVAEConfig, [1], "x")


def test_a_missing_key_is_named():
    @dataclasses.dataclass(frozen=True)
    class Config:
        width: int
        depth: int = 2

    with pytest.raises(UserError, match=r"missing key 'at\.width' in 'x'"):
        dataclass_from_dict(Config, {}, "x", "at")


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="no CUDA device: got 'cuda:1'"):
        resolve_device("cuda:1")
    for unknown in ("gpu", None, "cuda:x"):
        with pytest.raises(UserError, match=f"unknown device: got '{unknown}', expected auto, cpu, cuda, cuda:N, or mps"):
            resolve_device(unknown)
    for unsupported in ("xpu", "meta"):
        with pytest.raises(UserError, match=f"unsupported device: got '{unsupported}', expected auto, cpu"):
            resolve_device(unsupported)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="no MPS device: got 'mps'"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("mps") == torch.device("mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="no CUDA device: got 'cuda:2', but torch sees 2 here"):
        resolve_device("cuda:2")


def _forbid(monkeypatch, forbidden):
    """Opening the file ``forbidden`` is not permitted."""
    original = Path.open

    def open_(self, *args, **kwargs):
        if self == forbidden:
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)


@pytest.mark.parametrize("read", [read_json, read_tensors])
def test_a_file_that_may_not_be_read_is_told_with_the_reason(tmp_path, monkeypatch, read):
    path = tmp_path / "x"
    path.write_bytes(b"{}")
    _forbid(monkeypatch, path)
    with pytest.raises(UserError, match=r"cannot read '.*x': Permission denied, expected a readable file; check its permissions"):
        read(path)


def test_a_folder_that_may_not_be_entered_is_told(tmp_path, monkeypatch):
    def stat(self, **_):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "stat", stat)
    with pytest.raises(UserError, match=r"cannot read '.*lm/config.json': Permission denied"):
        part_folder(tmp_path, "lm")


def test_a_folder_is_no_json_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*: Is a directory"):
        read_json(tmp_path)


def test_the_hash_depends_on_names_shapes_and_values_only():
    module = _module()
    same = _module()
    assert weights_hash(module) == weights_hash(same) == weights_hash(same.double())
    assert len(weights_hash(module)) == 64
    with torch.no_grad():
        same[0].weight[0, 0] += 1e-3
    assert weights_hash(same) != weights_hash(module)
    flat, square = nn.ParameterDict({"x": torch.zeros(4)}), nn.ParameterDict({"x": torch.zeros(2, 2)})
    assert weights_hash(flat) != weights_hash(square) != weights_hash(nn.ParameterDict({"y": torch.zeros(2, 2)}))


@pytest.mark.parametrize(("stored", "kept"), [(torch.float16, 0), (torch.float32, 7)])
def test_a_file_is_kept_in_memory_only_where_most_of_it_is_used(stored: torch.dtype, kept: int, tmp_path, monkeypatch) -> None:
    """In 16 bit the weights are converted; the few fp32 and whole numbers beside them would keep the whole file mapped."""
    state = {name: value.to(stored) if value.ndim == 2 else value for name, value in _wide().state_dict().items()}
    write_tensors(tmp_path / "model.safetensors", state)
    read: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(checkpoint, "read_weights", lambda folder: read.update(read_tensors(folder / "model.safetensors")) or dict(read))
    loaded = checkpoint.load_module(_wide, tmp_path).state_dict()
    assert len(loaded) == 7
    assert sum(value.data_ptr() == read[name].data_ptr() for name, value in loaded.items()) == kept
    for name, value in state.items():
        torch.testing.assert_close(loaded[name], value.to(loaded[name].dtype), rtol=0, atol=0)


def _wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_that_are_not_finite_are_not_loaded(tmp_path: Path, dtype: torch.dtype) -> None:
    module = nn.Linear(3, 4).to(dtype)
    save_part(tmp_path / "part", {}, module)
    load_module(lambda: nn.Linear(3, 4), tmp_path / "part")
    for value in (float("nan"), float("inf")):
        with torch.no_grad():
            module.bias[2] = value
        save_part(tmp_path / "part", {}, module)
        with pytest.raises(UserError, match=r"not finite: '.*part' holds NaN or infinity in 1 of 2 tensors \(bias\)"):
            load_module(lambda: nn.Linear(3, 4), tmp_path / "part")
