"""Files that appear whole or not at all, and one line for a place that cannot be written."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kalle.errors import UserError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_INVALID = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG)
_FULL_REMEDY = "expected room for it; make room on the disk or choose another folder, then run again"
_REMEDIES = {
    **dict.fromkeys(_FULL, _FULL_REMEDY),
    **dict.fromkeys(_FORBIDDEN, "expected a place that you may write to; choose another folder or change its permissions"),
    **dict.fromkeys(_INVALID, "expected a path where a folder or file of that name can be made; choose another path"),
}


class DiskError(UserError):
    """A file or folder that cannot be written."""


def unwritable(path: Path, error: OSError | str) -> DiskError:
    """The error for ``path``, with a remedy that fits the cause; a text stands for a library's word on a full disk."""
    if isinstance(error, str):
        return DiskError(f"cannot write '{path}': {error}, {_FULL_REMEDY}")
    remedy = _REMEDIES.get(error.errno or 0, "expected a place that can be written; choose another folder")
    return DiskError(f"cannot write '{path}': {error.strerror or error}, {remedy}")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a forbidden or an invalid place inside the block into a DiskError about ``path``.

    An OSError about a file elsewhere, such as one that was to be read, passes.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _REMEDIES or not _concerns(error.filename, path):
            raise
        raise unwritable(path, error) from None


def _concerns(filename: object, path: Path) -> bool:
    if not isinstance(filename, str | os.PathLike):
        return True
    named, root = Path(filename).absolute(), path.absolute()
    return named == root or root in named.parents or named in root.parents


@contextmanager
def output_folder(path: Path) -> Iterator[None]:
    """Make the folder ``path`` and check that it takes files, before any work goes into them.

    A DiskError when it does not, and as in ``disk_errors`` later on. On failure the folders made here go again unless they hold something.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        with disk_errors(path):
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path`` on success; on any failure it is removed and ``path`` is untouched.

    A DiskError when the disk refuses.
    """
    temporary = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise


def write_whole(path: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8, through ``whole_file``."""
    with whole_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
