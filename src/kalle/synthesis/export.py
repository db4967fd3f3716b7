"""A weight folder made small for shipping: weights rounded to 16 bits, in files of a bounded size."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from kalle.checkpoint import (
    CONFIG_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    part_folder,
    permission_errors,
    read_json,
    read_weights,
    require_finite,
    require_fit,
    write_json,
    write_weights,
)
from kalle.errors import UserError
from kalle.files import atomic_folder
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.synthesis.voice import VOICES_FOLDER, Binding, Voice, stored_voices, voice_files, voice_path
from kalle.synthesis.weights import TOKENIZER_FOLDER, read_weight_folder

HALF_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST_RMS_ERROR = 0.01
"""Of the spread of a tensor. Gaussian weights lose a fiftieth of this in float16 and a sixth of it in bfloat16; more means that the
dtype does not suit the tensor: gains close to 1 in bfloat16, or values too small for float16."""


@dataclass(frozen=True)
class Rounding:
    """The effect of rounding on the tensors of one part."""

    error: float
    """The largest |rounded - weight| over the standard deviation of the weight's tensor."""
    where: str | None
    """The tensor that has it; None where nothing was rounded."""
    kept: tuple[str, ...]
    """Floating-point tensors that stayed as they were."""


def rounded(tensors: Mapping[str, Tensor], buffers: Collection[str], dtype: torch.dtype) -> tuple[dict[str, Tensor], Rounding]:
    """``tensors`` with the weights in ``dtype`` (float16 or bfloat16).

    Integers stay, and so do ``buffers``, which are statistics and not weights, and a weight that ``dtype`` does not suit: one that would
    overflow, or lose more than ``LARGEST_RMS_ERROR``. A UserError for NaN or infinity.
    """
    result, kept, worst, where = dict(tensors), [], 0.0, None
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"broken weights: {name} has NaN or infinite values, expected numbers only; export an earlier checkpoint")
        if tensor.dtype == dtype:
            continue
        half = tensor.to(dtype)
        largest, rms = _errors(tensor, half)
        if name in buffers or not rms <= LARGEST_RMS_ERROR:
            kept.append(name)
            continue
        result[name] = half
        if where is None or largest > worst:
            worst, where = largest, name
    return result, Rounding(worst, where, tuple(kept))


def _errors(tensor: Tensor, half: Tensor) -> tuple[float, float]:
    """Largest and root-mean-square rounding error, over the standard deviation; over the mean's size where all values are equal."""
    exact = tensor.double()
    error = (half.double() - exact).abs()
    spread = exact.std(correction=0) if exact.numel() > 1 else exact.new_zeros(())
    scale = float(spread) or float(exact.abs().mean()) if exact.numel() else 0.0
    largest, rms = (float(value) for value in (error.max(), error.square().mean().sqrt())) if exact.numel() else (0.0, 0.0)
    return (largest / scale, rms / scale) if scale else (largest, rms)


PARTS = ("flowvae", "lm")


@dataclass(frozen=True)
class ExportedPart:
    """One part as it was written."""

    files: int
    """How many weight files."""
    bytes: int
    """Of the weight files together."""
    rounding: Rounding


@dataclass(frozen=True)
class Exported:
    """The result of an export: files that were written, and parts that were not."""

    parts: dict[str, ExportedPart]
    bytes: int
    """Of all files of the folder."""
    voices: tuple[str, ...] = ()
    """Names of the voices that came along."""
    voices_left_out: dict[str, str] = field(default_factory=dict)
    """Name -> why it did not."""
    left_out: tuple[str, ...] = ()
    """Other folders in the source, which are no part of a weight folder."""
    default_voice: str | None = None


@permission_errors()
def export_folder(
    source: Path,
    out: Path,
    dtype: torch.dtype,
    max_file_bytes: int,
    language: str | None = None,
    voice: str | None = None,
    temperature: float | None = None,
    longest_seconds: float | None = None,
) -> Exported:
    """Write the weight folder ``source`` to the folder ``out``, a new one, or one with a card or notices alone, which stay.

    The weights are in ``dtype``, in files of ``max_file_bytes`` at most.
    Tokenizer, stop rule, card and notices come along; ``language``, ``temperature``, ``longest_seconds`` and the name of the default
    ``voice`` are stored where given (`FolderConfig`).
    A voice that fits ``source`` is bound to the rounded encoders, from which its tensors come as well, but for the rounding; one that does
    not, or whose adapter belongs to the unrounded language model, is left out and named in the result.
    UserError when ``source`` cannot speak, a tensor does not fit its configuration, or ``out`` holds a model or other folders already.
    """
    source, out = source.absolute(), out.absolute()
    config = read_weight_folder(source)
    if voice is not None:
        voice_path(out, voice)
    there = _notices(out)
    with atomic_folder(out) as staging:
        parts = {part: _export_part(part_folder(source, part), staging / part, part, dtype, max_file_bytes) for part in PARTS}
        shutil.copytree(source / TOKENIZER_FOLDER, staging / TOKENIZER_FOLDER, ignore=_folders)
        _copy_files(source, staging, {CONFIG_NAME, *there})
        kept, lost = _export_voices(source, staging)
        values = read_json(source / CONFIG_NAME) if (source / CONFIG_NAME).is_file() else {"format_version": FORMAT_VERSION}
        given = {"language": language, "voice": voice, "temperature": temperature, "longest_seconds": longest_seconds}
        write_json(staging / CONFIG_NAME, values | {name: value for name, value in given.items() if value is not None})
        size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    known = {*PARTS, TOKENIZER_FOLDER, VOICES_FOLDER}
    others = tuple(sorted(path.name for path in source.iterdir() if path.is_dir() and path.name not in known))
    return Exported(parts, size, kept, lost, others, voice or config.voice)


def _notices(out: Path) -> set[str]:
    """The names of the files in ``out``; a UserError where it is no folder, or holds more than a card and notices."""
    if not out.exists():
        return set()
    if not out.is_dir() or any(path.is_dir() or path.name == CONFIG_NAME for path in out.iterdir()):
        raise UserError(f"already there: got '{out}', expected a new folder, or one with a card alone; choose another or empty it")
    return {path.name for path in out.iterdir()}


def _export_part(source: Path, target: Path, part: str, dtype: torch.dtype, max_file_bytes: int) -> ExportedPart:
    values, where = read_json(source / CONFIG_NAME), str(source / CONFIG_NAME)
    with torch.device("meta"):
        module = FlowVAE(FlowVAEConfig.from_dict(values, where)) if part == "flowvae" else KalleLM(KalleLMConfig.from_dict(values, where))
    tensors = read_weights(source)
    require_fit(module.state_dict(), tensors, source)
    require_finite(tensors, source)
    ordered = {name: tensors[name] for name in module.state_dict()}
    small, rounding = rounded(ordered, {name for name, _ in module.named_buffers()}, dtype)
    target.mkdir(parents=True)
    files = write_weights(target, small, max_file_bytes)
    weights = {path.name for path in source.glob("*.safetensors")} | {INDEX_NAME}
    _copy_files(source, target, weights)
    return ExportedPart(len(files), sum(path.stat().st_size for path in files), rounding)


def _copy_files(source: Path, target: Path, but: set[str]) -> None:
    """Copy what else lies in ``source``, such as a card or a notice; no folders, and nothing hidden or unfinished."""
    for path in sorted(source.iterdir()):
        if path.is_file() and path.name not in but and not path.name.startswith(".") and path.suffix != ".partial":
            shutil.copyfile(path, target / path.name)


def _folders(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if (Path(folder) / name).is_dir()]


def _export_voices(source: Path, target: Path) -> tuple[tuple[str, ...], dict[str, str]]:
    """Write the voices of ``source`` to ``target``, whose parts are there; the names of those that fit, and why the others do not."""
    paths = voice_files(source)
    if not paths:
        return (), {}
    binding, kept, lost = Binding.of_folder(target), list[str](), dict[str, str]()
    for stored in stored_voices(paths, Binding.of_folder(source)):
        voice = None if stored.voice is None else _bound_to(binding, stored.voice)
        problem = stored.problem if voice is None or stored.problem is not None else binding.problem(voice)
        if voice is None or problem is not None:
            lost[stored.name] = str(problem)
            continue
        voice.save(target / VOICES_FOLDER / stored.path.name)
        kept.append(stored.name)
    return tuple(kept), lost


def _bound_to(binding: Binding, voice: Voice) -> Voice:
    renewed = {name: value for name, value in binding.hashes.items() if name in voice.bound_to}
    return dataclasses.replace(voice, bound_to={**voice.bound_to, **renewed})
