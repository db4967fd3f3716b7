"""One weight file, or several that each stay below a size."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from kalle.checkpoint import INDEX_NAME, WEIGHTS_NAME, write_json, write_tensors
from kalle.errors import UserError

_HEADER_BYTES = 256
"""More than a file's own share of its header."""
_ENTRY_BYTES = 160
"""More than a tensor's share of the header, beside its name."""


def write_weights(folder: Path, tensors: Mapping[str, Tensor], max_bytes: int) -> list[Path]:
    """Write ``folder``/model.safetensors, or shards of at most ``max_bytes`` with the index that the Hugging Face libraries read.

    The tensors keep their order. Returns the weight files; a UserError when one tensor alone is too large for a shard.
    """
    groups = _grouped(tensors, max_bytes)
    if len(groups) == 1:
        write_tensors(folder / WEIGHTS_NAME, tensors)
        return [folder / WEIGHTS_NAME]
    files = [folder / f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    places: dict[str, str] = {}
    for file, names in zip(files, groups, strict=True):
        write_tensors(file, {name: tensors[name] for name in names})
        places |= dict.fromkeys(names, file.name)
    write_json(folder / INDEX_NAME, {"metadata": {"total_size": sum(map(_bytes, tensors.values()))}, "weight_map": places})
    return files


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _grouped(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
    groups: list[list[str]] = [[]]
    used = _HEADER_BYTES
    for name, tensor in tensors.items():
        size = _bytes(tensor) + _ENTRY_BYTES + len(name.encode())
        if _HEADER_BYTES + size > max_bytes:
            raise UserError(
                f"too large for a file: {name} takes {size / 1e6:.3g} MB, expected at most {max_bytes / 1e6:g}; raise --max-shard-mb"
            )
        if used + size > max_bytes:
            groups.append([])
            used = _HEADER_BYTES
        groups[-1].append(name)
        used += size
    return groups
