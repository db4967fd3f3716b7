"""Weights in shards are read as one file is, and a missing, torn or lying shard is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaModel

from kalle.checkpoint import WEIGHTS_NAME, read_json, read_tensors, read_weights, weight_files, write_json, write_tensors, write_weights
from kalle.errors import UserError

INDEX = "model.safetensors.index.json"


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.full((100,), float(value)) for value, name in enumerate("zyxwv")}


def test_small_weights_are_one_file(tensors, tmp_path: Path) -> None:
    assert write_weights(tmp_path, tensors, 10_000) == [tmp_path / WEIGHTS_NAME]
    assert sorted(path.name for path in tmp_path.iterdir()) == [WEIGHTS_NAME]


@pytest.mark.parametrize("limit", [900, 1300, 2000])
def test_no_file_is_larger_than_the_limit(tensors, tmp_path: Path, limit: int) -> None:
    files = write_weights(tmp_path, tensors, limit)
    assert len(files) > 1
    assert all(path.stat().st_size <= limit for path in files)
    index = read_json(tmp_path / INDEX)
    assert index["metadata"] == {"total_size": 2000}
    assert list(index["weight_map"]) == list(tensors)
    assert (
        sorted(weight_files(tmp_path))
        == files
        == [tmp_path / f"model-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)]
    )
    read = read_weights(tmp_path)
    assert set(read) == set(tensors)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_a_tensor_larger_than_the_limit_is_refused(tensors, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"too large for a file: z takes .* raise max_bytes"):
        write_weights(tmp_path, tensors, 500)


def test_the_hugging_face_libraries_read_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = LlamaModel(LlamaConfig(**size, head_dim=8, vocab_size=90))
    model.config.save_pretrained(tmp_path)
    assert len(write_weights(tmp_path, model.state_dict(), 8_000)) > 1
    read = LlamaModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(tensor, read[name]) for name, tensor in model.state_dict().items())


def test_one_file_wins_over_shards(tensors, tmp_path: Path) -> None:
    write_weights(tmp_path, tensors, 900)
    write_tensors(tmp_path / WEIGHTS_NAME, {"other": torch.ones(1)})
    assert set(read_weights(tmp_path)) == {"other"}


def test_a_missing_shard(tensors, tmp_path: Path) -> None:
    write_weights(tmp_path, tensors, 1400)[1].unlink()
    with pytest.raises(UserError, match=r"weights are missing: got no model-00002-of-00003.safetensors in .*, which .*index.json lists"):
        read_weights(tmp_path)


def test_a_torn_shard(tensors, tmp_path: Path) -> None:
    shard = write_weights(tmp_path, tensors, 1400)[1]
    shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"not a readable safetensors file: '.*model-00002-of-00003"):
        read_weights(tmp_path)


def test_a_shard_of_other_weights(tensors, tmp_path: Path) -> None:
    shard = write_weights(tmp_path, tensors, 1400)[1]
    write_tensors(shard, {name: tensor for name, tensor in read_tensors(shard).items() if name != "x"})
    with pytest.raises(UserError, match=r"00002-of-00003.safetensors' lacks 1 tensors that .* expects there, such as x"):
        read_weights(tmp_path)


@pytest.mark.parametrize("places", [None, {}, {"x": 3}, {"x": "../model.safetensors"}, {"x": "a/b"}, {"x": ".."}])
def test_an_index_that_is_none(places, tmp_path: Path) -> None:
    write_json(tmp_path / INDEX, {"weight_map": places})
    with pytest.raises(UserError, match="no usable 'weight_map'"):
        read_weights(tmp_path)


def test_a_shard_whose_name_no_file_can_have_is_missing(tmp_path: Path) -> None:
    write_json(tmp_path / INDEX, {"weight_map": {"x": "9" * 300}})
    with pytest.raises(UserError, match="weights are missing"):
        read_weights(tmp_path)
