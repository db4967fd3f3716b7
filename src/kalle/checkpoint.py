"""Weight folders: a ``config.json`` beside a ``model.safetensors``, read strictly and written atomically."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from kalle.errors import UserError

WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"
FORMAT_VERSION = 1


def part_folder(folder: str | Path, part: str) -> Path:
    """The folder of ``part`` ("flowvae" or "lm") for ``folder`` = NAME or NAME/part.

    Raises UserError when neither holds a config.json and a model.safetensors.
    """
    root = Path(folder)
    candidates = [root / part, root] if root.name != part else [root]
    for candidate in candidates:
        if (candidate / CONFIG_NAME).is_file() and (candidate / WEIGHTS_NAME).is_file():
            return candidate
    raise UserError(
        f"not a weight folder with a {part}: got '{root}', expected {part}/{CONFIG_NAME} and {part}/{WEIGHTS_NAME} in it; "
        "give the folder that `kalle convert release --out` or a training run wrote"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a UserError names the file and the place where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"file not found: got '{path}', expected a JSON file; check the path") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"not valid JSON: '{path}': {error}; fetch or write the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"not a JSON object: '{path}' holds a {type(value).__name__}, expected {{...}}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented JSON through a temporary file, so that no torn file is ever seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, on the CPU; a UserError when it is missing or torn."""
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a safetensors file; check the path")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise UserError(f"not a readable safetensors file: '{path}' ({error}); fetch or convert it again") from None


def save_part(folder: Path, config: Mapping[str, Any], module: nn.Module) -> None:
    """Write ``config`` and the state of ``module`` to ``folder``."""
    write_tensors(folder / WEIGHTS_NAME, module.state_dict())
    write_json(folder / CONFIG_NAME, config)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors`` byte for byte as one safetensors file; those that share memory are stored each on its own.

    The file appears whole or not at all; a UserError when it cannot be written, such as for want of disk space.
    """
    storages: set[int] = set()
    separate: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu()
        storage = tensor.untyped_storage().data_ptr()
        separate[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in storages else tensor.contiguous()
        storages.add(storage)
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        save_file(separate, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors writes for the owner alone, whatever the umask says
        os.replace(temporary, path)
    except BaseException as error:
        if temporary.is_file():
            temporary.unlink()
        if isinstance(error, (SafetensorError, OSError)):
            raise unwritable(path, getattr(error, "strerror", None) or str(error)) from None
        raise


def unwritable(path: Path, reason: str) -> UserError:
    """The error for a file that cannot be written."""
    return UserError(f"cannot write '{path}': {reason}; make room on the disk or choose another folder, then run again")


def mismatches(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """One line for every tensor missing, superfluous or misshapen."""
    lines = [f"missing: {name} {tuple(expected[name].shape)}" for name in expected if name not in got]
    lines += [f"superfluous: {name} {tuple(got[name].shape)}" for name in got if name not in expected]
    lines += [
        f"misshapen: {name} is {tuple(got[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in got and got[name].shape != expected[name].shape
    ]
    return lines


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, tied: Iterable[str] = ()) -> None:
    """Copy ``tensors`` into ``module``; a UserError lists every tensor missing, superfluous or misshapen.

    ``tied`` names entries of the module's state that share another's memory and so need not be stored.
    """
    shared = set(tied)
    expected = {name: tensor for name, tensor in module.state_dict().items() if name not in shared}
    given = {name: tensor for name, tensor in tensors.items() if name not in shared}
    problems = mismatches(expected, given)
    if problems:
        raise UserError(
            f"the weights in '{source}' do not fit the model ({len(problems)} tensors): "
            + "; ".join(problems)
            + "; use the configuration the weights were made with"
        )
    module.load_state_dict(dict(given), strict=False)


def dataclass_from_dict(cls: type, values: Mapping[str, Any], source: str | Path) -> Any:
    """Build the frozen config dataclass ``cls``; an unknown key is an error that lists the valid ones."""
    valid = [field.name for field in dataclasses.fields(cls)]
    unknown = sorted(set(values) - set(valid))
    if unknown:
        raise UserError(f"unknown key {', '.join(map(repr, unknown))} in '{source}'; valid keys: {', '.join(valid)}")
    return cls(**values)


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` becomes the first CUDA device when there is one, else the CPU; a UserError for a device that is absent."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise UserError(f"unknown device: got '{device}', expected auto, cpu, cuda or cuda:N") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"no CUDA device: got '{device}', but torch sees none here; use device=cpu")
    return resolved


def weights_hash(module: nn.Module) -> str:
    """SHA-256 (hex) of the weights of ``module`` as fp32, whatever their device.

    Hashed in the order of the sorted state names: the name in UTF-8, the shape as text, the little-endian fp32 bytes. Latent folders and
    voices carry the hash of ``FlowVAE.encoder``: it says which encoder their latents come from. Weights that were rounded to half
    precision hash differently from the fp32 ones they came from.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()
