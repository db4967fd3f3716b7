"""Files of the release, read without running what is in them."""

from __future__ import annotations

import logging
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalle.checkpoint import first_of
from kalle.errors import UserError
from kalle.files import unwritable

logger = logging.getLogger(__name__)

GENERATOR = "generator"
LFS_POINTER = b"version https://git-lfs"
_ZIP, _PICKLE = b"PK", b"\x80"
"""How files of torch.save begin, today's and those before 1.6."""


def read_pickle(path: Path) -> Mapping[str, Any]:
    """The dict that ``torch.save`` wrote to ``path``, tensors mapped from the file rather than read into memory.

    A UserError when it is missing, unreadable, or holds anything but tensors and plain values: such a pickle could run code.
    """
    check_pytorch(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "truncated" in str(error):
            raise _cut_off(path) from None
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"'{found[1]}'" if found else "other objects"
        raise UserError(
            f"refused '{path}': its pickle asks for {what}, expected tensors only; loading it could run code, "
            "so get the weights from a source you trust"
        ) from None
    except (EOFError, struct.error):
        raise _cut_off(path) from None
    except OSError:
        raise
    except Exception as error:  # damaged or foreign files fail in many ways: KeyError, RuntimeError
        reason = re.split(r"(?<=[.!?]) |\n", str(error))[0] or type(error).__name__
        raise UserError(f"not a readable PyTorch file: '{path}' ({reason}); fetch it again") from None
    if not isinstance(value, Mapping):
        raise UserError(f"not the released format: '{path}' holds a {type(value).__name__}, expected a dict; give the published file")
    return value


def check_pytorch(path: Path) -> None:
    """A UserError when ``path`` is missing, or its first and last bytes are not those of a file of ``torch.save``; no more is looked at."""
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a released .pt file; check the path")
    with path.open("rb") as file:
        head = file.read(len(LFS_POINTER))
    if head.startswith(LFS_POINTER):
        raise UserError(
            f"not a PyTorch file: '{path}' only points to one, for the real file is stored with LFS; run `git lfs pull` where it comes "
            "from, or `kalle download`"
        )
    if head.startswith(_ZIP) and not zipfile.is_zipfile(path):
        raise _cut_off(path)
    if not head.startswith((_ZIP, _PICKLE)):
        raise UserError(
            f"not a PyTorch file: '{path}' begins with {head[:12]!r}, expected what torch.save writes; get the file again, for one with "
            "`kalle download`"
        )


def _cut_off(path: Path) -> UserError:
    return UserError(f"not a readable PyTorch file: '{path}' is cut off, expected the whole file; fetch it again with `kalle download`")


def only_tensors(values: Mapping[str, Any], source: str | Path) -> dict[str, Tensor]:
    """``values`` as plain dense tensors; a UserError lists the entries that are something else."""
    wrong = [
        f"{name} ({type(value).__name__})"
        for name, value in values.items()
        if not (isinstance(name, str) and isinstance(value, Tensor) and value.layout == torch.strided)
    ]
    if wrong:
        raise UserError(
            f"not the released format: '{source}' holds {len(wrong)} entries that are no dense tensors: {first_of(wrong)}; "
            "give the published file"
        )
    return {name: value.detach() for name, value in values.items()}


def released_tensors(content: Mapping[str, Any], expected: Iterable[str], source: str | Path) -> dict[str, Tensor]:
    """The dense tensors of ``content`` under the release's names, some of which are ``expected``.

    Understood is what trainers wrap a state dict in: one under a key, as the release itself has it ("generator") or a checkpoint does
    ("state_dict", "ema"), names that begin with the path of a module (DataParallel's "module.", a LightningModule's attribute, an averaged
    copy's "ema_model.") or contain torch.compile's "_orig_mod.", and weight norm as a parametrization. What is taken off and left
    out is logged. UserError when ``content`` holds something else.
    """
    wanted = frozenset(expected)
    state, where = _state_dict(content, wanted)
    tensors = only_tensors(state, source)
    plain = {_plain(name): tensor for name, tensor in tensors.items()}
    prefixes = {begins for name in plain if (begins := _begins(name, wanted)) is not None} | {""}
    prefix = max(sorted(prefixes, key=len), key=lambda prefix: sum(prefix + name in plain for name in wanted))
    kept = {name.removeprefix(prefix): tensor for name, tensor in plain.items() if name.startswith(prefix)}
    others = [name for name in plain if not name.startswith(prefix)]
    beside = [str(key) for key in content if where and key != where]
    if prefix or plain.keys() != tensors.keys() or (where and where != GENERATOR):
        logger.info("'%s': %d tensors under '%s%s'", source, len(kept), f"{where}: " if where else "", prefix)
    if others or beside:
        logger.warning("'%s' holds more than the model, left out: %s", source, first_of([*beside, *others]))
    return kept


def _state_dict(content: Mapping[str, Any], wanted: Collection[str]) -> tuple[Mapping[str, Any], str]:
    """``content``, or the mapping inside it that has most of the ``wanted`` names, and its key."""
    if any(isinstance(value, Tensor) for value in content.values()):
        return content, ""
    inside = {str(key): value for key, value in content.items() if isinstance(value, Mapping) and value}
    if not inside:
        return content, ""
    # The first of equals in this order: a checkpoint with an average beside its weights is taken by its weights.
    order = sorted(inside, key=lambda key: (key not in (GENERATOR, "state_dict", "model", "module"), key))

    key = max(order, key=lambda key: sum(_begins(_plain(str(name)), wanted) is not None for name in inside[key]))
    return inside[key], key


def _plain(name: str) -> str:
    """``name`` in the release's spelling of weight norm, without the module that torch.compile puts around another."""
    name = ".".join(part for part in name.split(".") if part != "_orig_mod")
    for ours, released in (("original0", "weight_g"), ("original1", "weight_v")):
        name = name.removesuffix(f"parametrizations.weight.{ours}") + (released if name.endswith(f"parametrizations.weight.{ours}") else "")
    return name


def _begins(name: str, wanted: Collection[str]) -> str | None:
    """The prefix before a ``wanted`` name at the end of ``name``; None when there is none."""
    parts = name.split(".")
    starts = (count for count in range(len(parts)) if ".".join(parts[count:]) in wanted)
    return next(("".join(part + "." for part in parts[:count]) for count in starts), None)


def write_pickle(path: Path, value: Mapping[str, Any]) -> None:
    """``torch.save`` to ``path``; UserError when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise unwritable(path, str(error).splitlines()[0]) from None
