"""Files of the release, read without running what is in them."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.files import unwritable

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
            f"not the released format: '{source}' holds {len(wrong)} entries that are no dense tensors: {', '.join(wrong)}; "
            "give the published file"
        )
    return {name: value.detach() for name, value in values.items()}


def write_pickle(path: Path, value: Mapping[str, Any]) -> None:
    """``torch.save`` to ``path``; UserError when the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.save(value, path)
    except RuntimeError as error:
        raise unwritable(path, str(error).splitlines()[0]) from None
