"""8-bit weights of the backbone: how they are rounded, and the file beside the weights that keeps them.

``int8.safetensors`` holds the tensors and ``int8.json`` says which weights they were made of; both can be deleted at any time.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kalle.checkpoint import read_json, read_tensors, read_weights, tensors_hash, weight_files, write_json, write_tensors
from kalle.errors import UserError
from kalle.files import DiskError, disk_errors
from kalle.models.backbone import BackboneConfig

logger = logging.getLogger(__name__)
BLOCK = 32
"""Values that share a scale, along the input of a linear layer."""
ZERO = 128
"""The code of 0: a code c means (c - 128) * scale."""
FILE_NAME, RECORD_NAME = "int8.safetensors", "int8.json"
_FORMAT = 1
_TRIES = 3
"""How often 8-bit weights are made where the weights are replaced meanwhile."""
_PREFIX = "backbone."
_QUANTISED = (f"{_PREFIX}layers.", f"{_PREFIX}norm.")
"""Beginnings of the names of the weights that the 8-bit file replaces."""


def quantise(weight: Tensor) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Codes (N, ceil(K / 32), 32) uint8 and scales (N, ceil(K / 32)) fp32 of ``weight`` (N, K).

    A block's scale is its largest magnitude over 127; a block of zeros has scale 1. UserError unless all values are finite.
    """
    rows, columns = weight.shape
    blocks = -(-columns // BLOCK)
    padded = torch.zeros(rows, blocks * BLOCK)
    padded[:, :columns] = weight.float()
    padded = padded.view(rows, blocks, BLOCK)
    if not padded.isfinite().all():
        raise UserError("weights that are not finite cannot be quantised: got infinite or undefined values; check the weights")
    scales = padded.abs().amax(dim=-1) / 127
    scales = torch.where(scales > 0, scales, 1.0)
    codes = (padded / scales[..., None]).round().add_(ZERO).to(torch.uint8)
    return codes.numpy(), scales.numpy()


def dequantise(codes: NDArray[np.uint8], scales: NDArray[np.float32], columns: int) -> Tensor:
    """The weight (N, ``columns``) fp32 that ``quantise`` stored."""
    values = (torch.from_numpy(codes).float() - ZERO) * torch.from_numpy(scales)[..., None]
    return values.flatten(1)[:, :columns].contiguous()


def products(config: BackboneConfig) -> dict[str, tuple[tuple[str, ...], int, int]]:
    """The linear layers of one decoder layer: name -> (weights put one below the other, inputs K, outputs N)."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    attention = tuple(f"self_attn.{name}_proj.weight" for name in "qkv")
    return {
        "qkv": (attention, hidden, queries + 2 * keys),
        "o": (("self_attn.o_proj.weight",), queries, hidden),
        "gate": (("mlp.gate_proj.weight",), hidden, inner),
        "up": (("mlp.up_proj.weight",), hidden, inner),
        "down": (("mlp.down_proj.weight",), inner, hidden),
    }


_NORMS = {"before": "input_layernorm.weight", "after": "post_attention_layernorm.weight"}


def quantised_backbone(config: BackboneConfig, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `Int8Backbone` runs on, one after the other, from the ``weights`` of a `Backbone` by name."""
    for layer in range(config.num_hidden_layers):
        for name, (parts, _, _) in products(config).items():
            codes, scales = quantise(torch.cat([weights[f"layers.{layer}.{part}"] for part in parts]))
            yield f"{layer}.{name}.codes", torch.from_numpy(codes)
            yield f"{layer}.{name}.scales", torch.from_numpy(scales)
        for name, norm in _NORMS.items():
            yield f"{layer}.{name}", weights[f"layers.{layer}.{norm}"].float().contiguous()
    yield "norm", weights["norm.weight"].float().contiguous()


def expected_tensors(config: BackboneConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and types of what ``quantised_backbone`` yields."""
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for layer in range(config.num_hidden_layers):
        for name, (_, inputs, outputs) in products(config).items():
            blocks = -(-inputs // BLOCK)
            expected[f"{layer}.{name}.codes"] = ((outputs, blocks, BLOCK), torch.uint8)
            expected[f"{layer}.{name}.scales"] = ((outputs, blocks), torch.float32)
        for name in _NORMS:
            expected[f"{layer}.{name}"] = ((config.hidden_size,), torch.float32)
    expected["norm"] = ((config.hidden_size,), torch.float32)
    return expected


def check_tensors(config: BackboneConfig, tensors: Mapping[str, Tensor]) -> None:
    """UserError unless ``tensors`` have the names, shapes and types of ``expected_tensors``."""
    expected = expected_tensors(config)
    wrong = [
        name
        for name, (shape, dtype) in expected.items()
        if name not in tensors or tensors[name].shape != shape or tensors[name].dtype != dtype
    ]
    wrong += [name for name in tensors if name not in expected]
    if wrong:
        raise UserError(f"the quantised weights do not fit the model: {len(wrong)} tensors differ, such as {wrong[0]}; quantise them again")


def is_quantised(name: str) -> bool:
    """Whether the weight ``name`` of a `KalleLM` is one that the 8-bit file holds in its place."""
    return name.startswith(_QUANTISED)


def int8_tensors(part: Path, config: BackboneConfig) -> dict[str, Tensor]:
    """The 8-bit backbone of the language model in the folder ``part``, from the file beside its weights where that belongs to them.

    A file that is missing, damaged or made of other weights is made (anew), with a line in the log; where the folder cannot be written,
    the tensors are made in memory. UserError for weights that are not finite.
    """
    for _ in range(_TRIES):
        try:
            return _read(part, config)
        except _UnusableError as unusable:
            logger.info("quantising the language model of '%s' to 8 bits: %s", part, unusable)
        before = _stamps(weight_files(part))
        weights = {name: tensor for name, tensor in read_weights(part).items() if is_quantised(name)}
        tensors = dict(quantised_backbone(config, {name.removeprefix(_PREFIX): tensor for name, tensor in weights.items()}))
        try:
            _write(part, weights, tensors, before)
        except DiskError as error:
            logger.warning("the 8-bit weights are not kept, so that this takes as long the next time: %s", error)
            break
    return tensors


class _UnusableError(Exception):
    """Why the stored 8-bit weights cannot be used."""


def _read(part: Path, config: BackboneConfig) -> dict[str, Tensor]:
    """The stored tensors, mapped; `_UnusableError` unless they are whole and of the weights beside them."""
    path, record_path = part / FILE_NAME, part / RECORD_NAME
    if not path.is_file() or not record_path.is_file():
        raise _UnusableError("this is done once")
    try:
        record = read_json(record_path)
        tensors = read_tensors(path)
        check_tensors(config, tensors)
    except UserError as error:
        raise _UnusableError(f"what is stored is damaged ({error})") from None
    if record.get("format") != _FORMAT:
        raise _UnusableError("what is stored has another format")
    # Hashing takes seconds at full size: files that have not been touched since they were compared are not compared again.
    stamps = _stamps((*weight_files(part), path))
    if record.get("files") == stamps:
        return tensors
    if record.get("file_sha256") != _file_hash(path):
        raise _UnusableError("what is stored is damaged (its hash is not the recorded one)")
    if record.get("weights_sha256") != _weights_hash(part):
        raise _UnusableError("the weights have changed")
    try:
        write_json(record_path, {**record, "files": stamps})
    except DiskError:
        logger.debug("the record of the 8-bit weights in '%s' cannot be written", part)
    return tensors


def _write(part: Path, weights: Mapping[str, Tensor], tensors: Mapping[str, Tensor], before: Mapping[str, list[int]]) -> None:
    """Keep ``tensors``, made of ``weights`` of the files stamped ``before``: such as are replaced meanwhile must not pass for these."""
    path = part / FILE_NAME
    with disk_errors(part):
        (part / RECORD_NAME).unlink(missing_ok=True)
    write_tensors(path, tensors)
    record = {
        "format": _FORMAT,
        "weights_sha256": tensors_hash(weights),
        "file_sha256": _file_hash(path),
        "files": {**before, **_stamps((path,))},
    }
    write_json(part / RECORD_NAME, record)


def _weights_hash(part: Path) -> str:
    return tensors_hash({name: tensor for name, tensor in read_weights(part).items() if is_quantised(name)})


def _stamps(files: Iterable[Path]) -> dict[str, list[int]]:
    """Size and time of change of ``files``, by name."""
    stats = {path.name: path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def _file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
