"""Weight folders: a ``config.json`` beside a ``model.safetensors`` or its shards, read strictly and written atomically."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kalle.errors import PATH, UserError, check_type
from kalle.extras import cpu_name
from kalle.files import atomic_file, is_file, points_elsewhere, unwritable, write_atomic

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
"""Beside shards: which of them holds which tensor, as the Hugging Face libraries write it."""
CONFIG_NAME = "config.json"
FORMAT_VERSION = 1
SHIPPED = "kalle-nano"
"""The model that ships with this package."""
Module = TypeVar("Module", bound=nn.Module)
PART_NAMES = {"flowvae": "Flow-VAE", "lm": "language model"}
"""Names of the parts in messages."""
_LONGEST_LIST = 64
"""Entries of a list in a configuration."""
_DEVICES = "auto, cpu, cuda, cuda:N, or mps where torch has one"


@contextmanager
def permission_errors() -> Iterator[None]:
    """Turn a path that may not be read, or can't exist, inside the block or the decorated function, into a UserError."""
    try:
        yield
    except PermissionError as error:
        raise unreadable(error.filename, error) from None
    except OSError as error:
        if error.errno not in (errno.ENAMETOOLONG, errno.ELOOP):
            raise
        raise UserError(f"bad path: got '{error.filename!s:.200}' ({error.strerror}), expected a file or folder; correct it") from None


def shipped_folder() -> Path | None:
    """The folder of the model that ships: inside the installed package, or in ckpt/ of a checkout; None where there is none."""
    package = Path(__file__).resolve().parent
    candidates = [root / "ckpt" / SHIPPED for root in (package, package.parents[1])]
    return next((folder for folder in candidates if (folder / CONFIG_NAME).is_file()), None)


def in_package(folder: Path) -> bool:
    """Whether ``folder`` is part of the installed package, which is no place for files of a user."""
    return folder.resolve().is_relative_to(Path(__file__).resolve().parent)


def weight_folder(folder: str | Path) -> Path:
    """``folder``; for kalle-nano, or a folder in it, that of the model that ships where no folder here has that name."""
    check_type("weight folder", folder, PATH, "a path")
    path = Path(folder)
    shipped = None if path.parts[:1] != (SHIPPED,) or Path(SHIPPED).is_dir() else shipped_folder()
    return path if shipped is None else shipped.joinpath(*path.parts[1:])


@permission_errors()
def part_folder(folder: str | Path, part: str) -> Path:
    """The folder of ``part`` ("flowvae" or "lm") for ``folder`` = NAME or NAME/part; ``weight_folder`` says what kalle-nano is.

    Raises UserError when neither holds a config.json and a model.safetensors or the index of its shards.
    """
    root = weight_folder(folder)
    candidates = [root / part, root] if root.name != part else [root]
    for candidate in candidates:
        if (candidate / CONFIG_NAME).is_file() and any((candidate / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
            return candidate
    lacks = f"no {PART_NAMES.get(part, part)} ({part}/) in '{root}'" if root.is_dir() else f"there is no folder '{root}'"
    raise UserError(
        f"not a weight folder: {lacks}, expected {part}/{CONFIG_NAME} and {part}/{WEIGHTS_NAME}; "
        "give the folder that `kalle convert release --out` or a training run wrote"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a UserError names the file and the place where it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"file not found: got '{path}', expected a JSON file; check the path") from None
    except OSError as error:
        raise unreadable(path, error) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: '{path}': {str(error)[:200]}; fetch or write the file again") from None
    if not isinstance(value, dict):
        raise UserError(f"not a JSON object: '{path}' holds a {type(value).__name__}, expected {{...}}")
    return value


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` as indented JSON, whole or not at all; a UserError when the disk refuses."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file, on the CPU; a UserError when it is missing or damaged.

    They are mapped, not read: the bytes come from the disk when they are first used, and a change stays in memory. So the file must not be
    overwritten in place while they are used, which changes them or ends the process; a new file renamed to its name (``write_tensors``)
    leaves them as they are.
    """
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a safetensors file; check the path")
    require_readable(path)
    try:
        return load_file(path)
    except OSError as error:
        raise unreadable(path, error) from None
    except SafetensorError as error:
        hint = points_elsewhere(path) or "; fetch or convert it again"
        raise UserError(f"not a readable safetensors file: '{path}' ({error}){hint}") from None


def weight_files(folder: Path) -> dict[Path, frozenset[str] | None]:
    """The safetensors files of the part ``folder``, each with the names of the tensors to take from it; None for all it has.

    A ``model.safetensors`` wins over shards, as it does elsewhere. UserError for an index that is none, and for a shard that is missing.
    """
    single, index = folder / WEIGHTS_NAME, folder / INDEX_NAME
    if single.is_file() or not index.is_file():
        return {single: None}
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(_is_file_name(place) for place in places.values()):
        raise UserError(f"no usable 'weight_map' in '{index}', expected tensor names and files beside it; fetch or export it again")
    files: dict[Path, frozenset[str] | None] = {
        folder / file: frozenset(name for name, place in places.items() if place == file) for file in sorted(set(places.values()))
    }
    missing = [path.name for path in files if not is_file(path)]
    if missing:
        raise UserError(f"weights are missing: got no {', '.join(missing)} in '{folder}', which {index.name} lists; fetch or export again")
    return files


def _is_file_name(place: object) -> bool:
    return isinstance(place, str) and place not in ("", ".", "..") and Path(place).name == place


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of the part ``folder``, of its one file or of its shards, as ``read_tensors``.

    UserError also for a shard that is missing or lacks a tensor that the index promises.
    """
    found: dict[str, Tensor] = {}
    for path, names in weight_files(folder).items():
        tensors = read_tensors(path)
        require_names(path, names, tensors)
        found |= tensors if names is None else {name: tensors[name] for name in sorted(names)}
    return found


def require_names(path: Path, names: Iterable[str] | None, got: Iterable[str]) -> None:
    """A UserError when the shard ``path``, which has the tensors ``got``, lacks one of the ``names`` that its index promises."""
    lacking = sorted(set(names or ()) - set(got))
    if lacking:
        raise UserError(
            f"'{path}' lacks {len(lacking)} tensors that '{INDEX_NAME}' expects there, such as {lacking[0]}; fetch or export it again"
        )


def require_readable(path: Path) -> None:
    """A UserError with the system's own reason when the file ``path`` can't be opened; safetensors says "not found" whatever it is."""
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise unreadable(path, error) from None


def unreadable(path: str | Path, error: OSError) -> UserError:
    """The error for a file that is there and can't be read."""
    return UserError(f"cannot read '{path}': {error.strerror or error}, expected a readable file; check its permissions")


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
    with atomic_file(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode
        try:
            save_file(separate, temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            raise unwritable(path, str(error)) from None
        temporary.chmod(mode)  # safetensors writes for the owner alone, whatever the umask says


def mismatches(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> list[str]:
    """One line for every tensor missing, superfluous, misshapen, or of integers where the other has fractions."""
    lines = [f"missing: {name} {tuple(expected[name].shape)}" for name in expected if name not in got]
    lines += [f"superfluous: {name} {tuple(got[name].shape)}" for name in got if name not in expected]
    lines += [
        f"misshapen: {name} is {tuple(got[name].shape)}, expected {tuple(expected[name].shape)}"
        for name in expected
        if name in got and got[name].shape != expected[name].shape
    ]
    lines += [
        f"mistyped: {name} is {_kind(got[name])}, expected {_kind(expected[name])}"
        for name in expected
        if name in got and got[name].is_floating_point() != expected[name].is_floating_point()
    ]
    return lines


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def load_strict(module: nn.Module, tensors: Mapping[str, Tensor], source: str | Path, tied: Iterable[str] = ()) -> None:
    """Copy ``tensors`` into ``module``; a UserError lists every tensor missing, superfluous, misshapen or mistyped.

    ``tied`` names entries of the module's state that share another's memory and so need not be stored.
    """
    shared = set(tied)
    expected = {name: tensor for name, tensor in module.state_dict().items() if name not in shared}
    given = {name: tensor for name, tensor in tensors.items() if name not in shared}
    require_fit(expected, given, source)
    module.load_state_dict(dict(given), strict=False)


def require_fit(
    expected: Mapping[str, Tensor],
    got: Mapping[str, Tensor],
    source: str | Path,
    remedy: str = "use the configuration the weights were made with",
) -> None:
    """A UserError that counts the tensors of ``got`` that are missing, superfluous, misshapen or mistyped, and names the first."""
    problems = mismatches(expected, got)
    if problems:
        raise UserError(f"the weights in '{source}' do not fit the model ({len(problems)} tensors): {_by_kind(problems)}; {remedy}")


def _by_kind(problems: Iterable[str]) -> str:
    """The first of each kind of ``mismatches``."""
    kinds: dict[str, list[str]] = {}
    for problem in problems:
        kind, _, what = problem.partition(": ")
        kinds.setdefault(kind, []).append(what)
    return "; ".join(f"{kind}: {first_of(some, 3)}" for kind, some in kinds.items())


def first_of(items: Iterable[str], shown: int = 4) -> str:
    """The first of many ``items`` for one line, and how many are left out."""
    every = list(items)
    separator = "; " if any(", " in item or "; " in item for item in every[:shown]) else ", "
    return separator.join(every[:shown]) + (f" and {len(every) - shown} more" if len(every) > shown else "")


def require_finite(tensors: Mapping[str, Tensor], source: str | Path) -> None:
    """A UserError that names tensors which hold NaN or infinity: a model with such weights says nothing or noise."""
    bad = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
    if bad:
        raise UserError(
            f"weights that are not finite: '{source}' holds NaN or infinity in {len(bad)} of {len(tensors)} tensors ({first_of(bad)}); "
            "fetch them again, or take an earlier checkpoint of the training"
        )


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or not tensor.numel() or tensor.is_meta:
        return True
    # One pass and no copy; NaN passes through.
    low, high = torch.aminmax(tensor.detach())
    return math.isfinite(float(low)) and math.isfinite(float(high))


class _Unfilled(TorchFunctionMode):
    """Inside it ``torch.empty``, from which layers take their weights, gives tensors without memory, so that nothing is drawn for them.

    What is computed, such as a window or the frequencies of the rotary embedding, is as ever: the weight file does not hold it. Drawing
    and norms of weights without memory are answered here, because torch's way of doing nothing imports its compiler: seconds, and 115 MB.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty and "out" not in given:
            given["device"] = "meta"
        if func is torch._weight_norm and args[0].is_meta:
            return args[0].new_empty(args[0].shape)
        if func is torch.norm_except_dim and args[0].is_meta:
            return args[0].new_empty(_norms_shape(*args, **given))
        if getattr(func, "__module__", "") == "torch.nn.init" and (tensor := args[0] if args else given["tensor"]).is_meta:
            return tensor
        return func(*args, **given)


def _norms_shape(v: Tensor, pow: int = 2, dim: int = 0) -> list[int]:
    assert dim in (0, v.dim() - 1), "weight norm is along the first or last dimension"
    return [size if axis == dim else 1 for axis, size in enumerate(v.shape)]


def load_module(
    build: Callable[[], Module],
    folder: Path,
    device: str | torch.device = "cpu",
    dtypes: Mapping[str, torch.dtype] | None = None,
    skip: Callable[[str], bool] = lambda name: False,
) -> Module:
    """The module that ``build`` makes with the weights in ``folder``, in evaluation mode; a UserError when they do not fit it
    or are not finite.

    Nothing is drawn at random and, on the CPU, nothing copied that has its dtype already: the weights are the mapped file. A tensor has the
    dtype that ``build`` gives it, or the one of the first prefix of its name in ``dtypes``; what the file does not hold keeps its own.
    Tensors of the file for whose names ``skip`` is true are left out.
    While the module lives, replace the file by a rename only: overwritten in place it changes the module or ends the process.
    """
    resolved = resolve_device(device)
    with _Unfilled():
        module = build()
    expected = module.state_dict()
    _check_sound(expected, folder, skip)
    # Mapped once more: the check has touched every page of the first mapping, of this one those stay in memory that are used.
    tensors = _wanted(folder, skip)
    require_fit(expected, tensors, folder)  # it may have been replaced meanwhile
    mapped = dict(tensors)
    for name, tensor in mapped.items():
        if expected[name].is_floating_point():
            dtype = next((dtype for prefix, dtype in (dtypes or {}).items() if name.startswith(prefix)), expected[name].dtype)
            tensors[name] = tensor.to(resolved).to(dtype)
    _let_go(tensors, mapped)
    module.load_state_dict(tensors, assign=True)
    homeless = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    assert not homeless, f"no values for {homeless}"
    return module.to(resolved).eval()


def _wanted(folder: Path, skip: Callable[[str], bool]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in read_weights(folder).items() if not skip(name)}


def _check_sound(expected: Mapping[str, Tensor], folder: Path, skip: Callable[[str], bool]) -> None:
    """A UserError unless the weights in ``folder``, but for those that ``skip`` leaves out, fit those ``expected`` and are finite."""
    tensors = _wanted(folder, skip)
    require_fit(expected, tensors, folder)
    require_finite(tensors, folder)


def _let_go(tensors: dict[str, Tensor], mapped: Mapping[str, Tensor]) -> None:
    """Copy those of ``tensors`` that still are the ``mapped`` file where they are few: the rest of it, converted, would stay in memory."""
    same = [name for name, tensor in tensors.items() if tensor is mapped[name]]
    if sum(mapped[name].nbytes for name in same) < sum(tensor.nbytes for tensor in mapped.values()) / 2:
        tensors.update({name: mapped[name].clone() for name in same})


def dataclass_from_dict(cls: type, values: Any, source: str | Path, key: str = "") -> Any:
    """Build the frozen config dataclass ``cls``, those inside it included, from the values of a JSON object.

    A UserError for an unknown key (it lists the valid ones), a missing one, or a value of another type. ``key`` says where in ``source``
    the object stands.
    """
    prefix = f"{key}." if key else ""
    if not isinstance(values, Mapping):
        raise UserError(f"bad value in '{source}': {key or 'the whole'} is {values!r}, expected an object {{...}}; correct the file")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(str(name) for name in values if name not in fields)
    if unknown:
        listed = first_of(f"'{prefix}{name:.60}'" for name in unknown)
        raise UserError(f"unknown key {listed} in '{source}'; valid keys: {', '.join(prefix + name for name in fields)}")
    required = [name for name, field in fields.items() if field.default is field.default_factory is dataclasses.MISSING]
    missing = [f"'{prefix}{name}'" for name in required if name not in values]
    if missing:
        raise UserError(f"missing key {', '.join(missing)} in '{source}', expected a value; correct the file")
    hints = typing.get_type_hints(cls)
    typed = {name: _typed(value, hints[name], source, prefix + name) for name, value in values.items()}
    try:
        return cls(**typed)
    except UserError as error:
        raise UserError(f"bad value in '{source}': {prefix}{error}") from None


def _typed(value: Any, hint: Any, source: str | Path, key: str) -> Any:
    """``value`` if it is of the type ``hint``; a mapping becomes the dataclass that ``hint`` allows."""
    choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if any(_fits(value, choice) for choice in choices):
        return value
    inner = [choice for choice in choices if dataclasses.is_dataclass(choice)]
    if len(inner) == 1:
        return dataclass_from_dict(typing.cast("type", inner[0]), value, source, key)
    expected = " or ".join(_spoken(choice) for choice in choices)
    raise UserError(f"bad value in '{source}': {key} is {value!r}, expected {expected}; correct the file")


def check_fields(config: Any, key: str) -> None:
    """A UserError that names the first field of the dataclass instance ``config`` whose value is not of its annotated type.

    ``key`` is what the configuration calls ``config``; empty for the whole configuration.
    """
    hints = typing.get_type_hints(type(config))
    for name in (field.name for field in dataclasses.fields(config)):
        hint, value = hints[name], getattr(config, name)
        choices = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        path = f"{key}.{name}" if key else name
        if not any(_fits(value, choice) for choice in choices):
            raise UserError(f"{path}: got {value!r}, expected {' or '.join(dict.fromkeys(map(_spoken, choices)))}; correct it")
        if value == "" and Path in choices:  # which would mean the current folder
            raise UserError(f"{path}: got an empty text, expected a path; give one, as {path}=DIR")


def check_range(config: Any, key: str, *names: str, least: float = 0, most: float = math.inf, above: bool = False) -> None:
    """A UserError that names the first of the fields ``names`` of ``config`` whose number, in a list too, is not in ``least`` .. ``most``.

    ``above`` excludes ``least`` itself. None and texts are left alone; NaN is in no range.
    """
    lower = f"more than {least}" if above else f"at least {least}"
    expected = lower if most == math.inf else f"{lower} and at most {most}"
    for name in names:
        value = getattr(config, name)
        numbers = [number for number in (value if isinstance(value, tuple) else (value,)) if isinstance(number, int | float)]
        if not all(least <= number <= most and not (above and number == least) for number in numbers):
            got = list(value) if isinstance(value, tuple) else value
            raise UserError(f"{f'{key}.' if key else ''}{name}: got {got}, expected {expected}; correct it")


def as_tuple(value: Any) -> Any:
    """A list as a tuple; anything else stays, for `check_fields` to refuse: the letters of a text are no list."""
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else value


def check_sizes(config: Any, key: str, most: int = 2**16, **other: int) -> None:
    """A UserError that names the first whole number of the dataclass instance ``config``, in a list too, below 1 or beyond ``most``.

    ``other`` bounds fields of their own. A damaged or hostile file must not ask for all memory, or a network without end.
    """
    for field in dataclasses.fields(config):
        value, limit = getattr(config, field.name), other.get(field.name, most)
        numbers = value if isinstance(value, tuple) else (value,)
        whole = [number for number in numbers if isinstance(number, int) and not isinstance(number, bool)]
        if len(numbers) > _LONGEST_LIST or not all(1 <= number <= limit for number in whole):
            raise UserError(
                f"{key}.{field.name}: got {value!r}, expected whole numbers from 1 to {limit}, at most {_LONGEST_LIST}; correct it"
            )


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin is tuple:  # tuple[X, ...], a list in JSON
        return isinstance(value, list | tuple) and all(_fits(item, arguments[0]) for item in value)
    if hint is float and isinstance(value, int) and abs(value) > sys.float_info.max:
        return False
    if hint in (int, float):
        return isinstance(value, int if hint is int else int | float) and not isinstance(value, bool)
    return isinstance(value, origin or hint)


def _spoken(hint: Any) -> str:
    if typing.get_origin(hint) is tuple:
        return f"a list, each {_spoken(typing.get_args(hint)[0])}"
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, typing.get_args(hint)))
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", Path: "a path", type(None): "null"}
    return names.get(hint, "an object {...}")


def resolve_device(device: str | torch.device) -> torch.device:
    """``"auto"`` becomes the first CUDA device when there is one, else the CPU; a UserError for one that is absent or not supported."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise UserError(f"unknown device: got '{device}', expected {_DEVICES}; choose one") from None
    if resolved.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"unsupported device: got '{device}', expected {_DEVICES}; use cpu")
    if resolved.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"no MPS device: got '{device}', but torch sees none here; use cpu")
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UserError(f"no CUDA device: got '{device}', but torch sees none here; use cpu")
        if (resolved.index or 0) >= count:
            raise UserError(f"no CUDA device: got '{device}', but torch sees {count} here, counted from 0; use cuda:{count - 1}")
    return resolved


def device_name(device: torch.device) -> str:
    """The name of the GPU or processor that computes on ``device``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 (hex) of the weights of ``module`` as fp32, whatever their device.

    Hashed in the order of the sorted state names: the name in UTF-8, the shape as text, the little-endian fp32 bytes. Latent folders and
    voices carry the hash of ``FlowVAE.encoder``: it says which encoder their latents come from. Weights that were rounded to half
    precision hash differently from the fp32 ones they came from.
    """
    return tensors_hash(module.state_dict())


def tensors_hash(tensors: Mapping[str, Tensor]) -> str:
    """``weights_hash`` of the state ``tensors`` of a module, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().to("cpu", torch.float32).contiguous().numpy().astype("<f4", copy=False).tobytes())
    return digest.hexdigest()


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
                f"too large for a file: {name} takes {size / 1e6:.3g} MB, expected at most {max_bytes / 1e6:g}; raise max_bytes"
            )
        if used + size > max_bytes:
            groups.append([])
            used = _HEADER_BYTES
        groups[-1].append(name)
        used += size
    return groups
