"""Files and folders that appear as a whole or not at all, locks between processes, JSON lines, and errors of a disk in one line.

Until it is complete, a file has a temporary name beside its target that nobody can foresee, and is made by O_EXCL | O_NOFOLLOW: a link
planted in a shared folder is never followed, and two writers of one file don't disturb each other (the last one wins).
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from filelock import FileLock

logger = logging.getLogger(__name__)

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
_INVALID = (errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENOTEMPTY, errno.ENAMETOOLONG, errno.ELOOP)
_FULL_REMEDY = "expected room for it; make room on the disk or choose another folder, then run again"
_REMEDIES = {
    **dict.fromkeys(_FULL, _FULL_REMEDY),
    **dict.fromkeys(_FORBIDDEN, "expected a place that you may write to; choose another folder or change its permissions"),
    **dict.fromkeys(_INVALID, "expected a path where a folder or file of that name can be made; choose another path"),
}
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LOCKS_FOLDER = ".locks"
PARTIAL = ".partial"
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.partial")
LFS_POINTER = b"version https://git-lfs"
_NAME_A_TEXT = "name a file of text"
_NOT_TEXT: tuple[tuple[bytes, tuple[str, str]], ...] = (
    (rb"PK\x03\x04", ("an archive or an Excel workbook", "save it as CSV in UTF-8, or unpack it")),
    (rb"\x1f\x8b|BZh\d1AY|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf", ("compressed", "unpack it")),
    (rb"\xd0\xcf\x11\xe0", ("a document of an old Excel or Word", "save it as CSV in UTF-8")),
    (rb"(?:RIFF|RF64)....WAVE|fLaC|OggS|caff|FORM....AIF|\.snd|NIST_1A|riff\x2e\x91\xcf\x11", ("an audio file", _NAME_A_TEXT)),
    (rb"ID3[\x02-\x04]|\xff[\xe2-\xfd][\x00-\xff][\x00-\xff]|....ftyp|\x1aE\xdf\xa3", ("an audio or video file", _NAME_A_TEXT)),
    (rb"%PDF-|\x89PNG|\xff\xd8\xff|GIF8[79]a", ("a PDF or an image", _NAME_A_TEXT)),
    (rb"PAR1", ("a Parquet table", "load it as a Hugging Face dataset, or save it as CSV")),
)
"""First bytes of what is no text -> what it is, and what to do."""
MARKER = ".writing"
"""In a folder that is being filled; locked while its process lives."""
_LONGEST_NAME_BYTES = 255
_RECENT_SECONDS = 2.0
"""How old an abandoned file must be: a writer that renames a file of its own onto the temporary name takes our lock away."""
_swept: set[Path] = set()
"""Folders in which this process has looked for what a killed one left behind."""


def points_elsewhere(path: Path) -> str:
    """A sentence for a file that Git LFS left in place of the real one; empty for any other file."""
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            return "; it only points to the real file, which is stored with LFS: run `git lfs pull` where it comes from"
    return ""


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

    A DiskError when it does not, and as in ``disk_errors`` later on. After a failure the folders made here are removed, unless they hold
    something.
    """
    missing: list[Path] = []
    try:
        with disk_errors(path):
            missing += [folder for folder in (path, *path.parents) if not folder.exists()]
            path.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=path):
                pass
            yield
    except BaseException:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def check_writable(path: Path) -> None:
    """A DiskError unless a file can be made at ``path``, or replaced; its folders need not be there yet. Nothing is left behind."""
    try:
        _check_replaceable(path)
        place, *missing = _existing_folder(path.absolute())
        for name in missing:  # each is too long, or may be made
            with contextlib.suppress(FileNotFoundError):
                Path(place, name).lstat()
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise unwritable(path, error) from None
    except ValueError as error:  # a name with a zero byte
        raise unwritable(path, OSError(errno.ENOENT, str(error))) from None


def _existing_folder(path: Path) -> tuple[str, ...]:
    """The nearest folder above ``path`` that is there, and the names below it that are not, down to that of ``path``.

    FileExistsError for a link to nowhere among them, and any other OSError of the system.
    """
    missing = [path.name]
    for folder in path.parents:
        try:
            folder.stat()
        except FileNotFoundError:
            if folder.is_symlink():
                raise FileExistsError(errno.EEXIST, "a link that leads nowhere", str(folder)) from None
            missing.append(folder.name)
        else:
            return (str(folder), *reversed(missing))
    raise AssertionError(f"no root above {path}")


def temporary_name(path: Path) -> Path:
    """An unpredictable name beside ``path``, for a file or folder that is to be renamed to ``path``."""
    ending = f".{secrets.token_hex(8)}{PARTIAL}"
    name = path.name.encode(errors="surrogateescape")[: _LONGEST_NAME_BYTES - len(ending)].decode(errors="ignore")
    return path.with_name(name + ending)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield the path of an empty temporary file that becomes ``path`` on success; on any failure it goes and ``path`` is untouched.

    A DiskError when the disk refuses, or when something that is no plain file stands in the way.
    """
    temporary = temporary_name(path)
    descriptor: int | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _check_replaceable(path)
        remove_abandoned(path.parent, once=True)
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)
        lock_descriptor(descriptor)
        yield temporary
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise unwritable(path, error) from None
        raise
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _check_replaceable(path: Path) -> None:
    try:
        path.lstat()
    except FileNotFoundError:
        return
    if path.is_dir() and not path.is_symlink():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not path.is_file() and not path.is_dir():
        # Renaming onto /dev/null would replace the device for everybody.
        raise FileExistsError(errno.EEXIST, "it is no plain file", str(path))


def is_file(path: Path) -> bool:
    """Whether ``path``, which a list or a table may name, is a file; False, not an OSError, for a name that no file can have.

    True where the system does not tell: whoever opens it hears why not.
    """
    try:
        return path.is_file()
    except PermissionError:
        return True
    except (OSError, ValueError):  # a name that is too long, or holds a zero byte
        return False


def spelled_otherwise(path: Path) -> Path | None:
    """The file that ``path`` means where it has \\ for / or other capitals than the file system; None where there is no such file."""
    first, *others = Path(str(path).replace("\\", "/")).parts or ("",)
    place = Path(first)
    try:
        for name in others:
            here = place / name
            if not here.exists():
                here = next((other for other in sorted(place.iterdir()) if other.name.casefold() == name.casefold()), here)
            place = here
    except (OSError, ValueError):
        return None
    return place if place != path and is_file(place) else None


def file_stamp(path: Path) -> tuple[int, int] | None:
    """Bytes and modification time (ns) of the file ``path``; None where there is none that the system tells of."""
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return (status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def resolved(path: Path) -> Path:
    """``path`` made absolute, its links followed; without that where no file can have the name or links lead in a circle."""
    try:
        return path.resolve()
    except (OSError, ValueError, RuntimeError):
        return path.absolute()


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write bytes, or text as UTF-8, through ``atomic_file``.

    Half of a surrogate pair, which JSON and file names may hold and UTF-8 may not, is written as JSON escapes it.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content.encode(errors="backslashreplace") if isinstance(content, str) else content)


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Yield a folder to fill that becomes ``out`` on success; on failure nothing stays.

    What was put into it is moved into an ``out`` that exists already, config.json last. A DiskError when the disk refuses.
    """
    staging = temporary_name(out)
    missing = [folder for folder in (out.parent, *out.parent.parents) if not folder.exists()]
    with contextlib.ExitStack() as stack:
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(out.parent)
            staging.mkdir()
            marker = os.open(staging / MARKER, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            stack.callback(os.close, marker)
            lock_descriptor(marker)
            yield staging
            (staging / MARKER).unlink()
            _publish(staging, out)
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            for folder in missing:
                with contextlib.suppress(OSError):
                    folder.rmdir()
            if isinstance(error, OSError):
                raise unwritable(Path(error.filename or out), error) from None
            raise


def _publish(staging: Path, out: Path) -> None:
    if not out.exists():
        os.replace(staging, out)
        return
    moved: list[Path] = []
    try:
        for child in sorted(staging.iterdir(), key=lambda path: path.is_file()):
            target = out / child.name
            os.replace(child, target)
            moved.append(target)
    except BaseException:
        for target in moved:
            shutil.rmtree(target, ignore_errors=True)
        raise
    staging.rmdir()


def remove_abandoned(folder: Path, once: bool = False) -> list[Path]:
    """Remove from ``folder`` the temporary files and folders of processes that were killed; returns what went.

    Those that are still being written are locked, and stay, as does everything where the file system has no locks.
    ``once``: only the first time that this process asks.
    """
    if once and folder in _swept:
        return []
    _swept.add(folder)
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        left = [Path(entry.path) for entry in entries if entry.name.endswith(PARTIAL) and _TEMPORARY.search(entry.name)]
        return [path for path in left if _remove_unlocked(path)]
    return []


def _remove_unlocked(path: Path) -> bool:
    is_folder = path.is_dir() and not path.is_symlink()
    try:
        descriptor = os.open(path / MARKER if is_folder else path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
    except OSError:
        return False  # a link, another's file, or gone by now
    try:
        recent = time.time() - os.fstat(descriptor).st_mtime < _RECENT_SECONDS
        if recent or lock_descriptor(descriptor) is not True:
            return False
        if is_folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)
    return True


def lock_descriptor(descriptor: int) -> bool | None:
    """Lock an open file until it is closed or its process ends: whether that worked, None on a file system without locks."""
    from filelock import lock_descriptor as lock

    try:
        return bool(lock(descriptor, blocking=False))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return None


@contextmanager
def folder_lock(root: Path, name: str, *, wait: bool) -> Iterator[str | None]:
    """Hold the lock ``name`` of the folder ``root`` inside the block, against other processes, also on other machines.

    Yields None when it is ours, else (only without ``wait``) who has it, as HOST:PID. The lock of a process that dies ends with it.
    A file system without locks is reported in the log, and the lock counts as ours: writers rename complete files there all the same.
    """
    path = root / LOCKS_FOLDER / name
    lock, holder = _acquire(path, wait)
    if lock is None:
        yield holder
        return
    try:
        path.write_text(f"{socket.gethostname()}:{os.getpid()}")
        yield None
    finally:
        # Removed while it is ours; whoever waits for this file notices that it is gone.
        path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            path.parent.rmdir()
        lock.release()


def _acquire(path: Path, wait: bool) -> tuple[FileLock | None, str | None]:
    """The lock when it is held, and else who holds it; neither on a file system without locks."""
    from filelock import FileLock, Timeout

    lock = FileLock(path, blocking=wait, fallback_to_soft=False)
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire()
        except FileNotFoundError:  # the folder went with another process's last lock
            continue
        except Timeout:
            with contextlib.suppress(OSError):
                return None, path.read_text(errors="replace") or "another process"
            return None, "another process"
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            logger.warning("no locks on the file system of '%s' (%s): see to it that every rank runs once", path.parent, error.strerror)
            return None, None
        return lock, None


def parse_json(content: str | bytes) -> dict[str, Any]:
    """The JSON object in ``content``; a ValueError says on one line why there is none: numbers of thousands of digits, deep nesting."""
    try:
        # A tab or line break that a program wrote into a string as it is, where JSON wants an escape, means what it is.
        row = json.loads(content, strict=False)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"not JSON ({getattr(error, 'msg', '') or str(error).split(';')[0]})") from None
    if not isinstance(row, dict):
        raise ValueError(f"it holds a {type(row).__name__}")
    return row


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, the file whole or not at all."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSONL file as an object; a UserError names the file and the line that is not one."""
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a JSONL file; check the path")
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            rows.append(parse_json(line))
        except ValueError as error:
            raise UserError(f"bad line: '{path}' line {number}: {error}; expected one JSON object a line; correct that line") from None
    return rows


def lines_of(text: str) -> list[str]:
    """The lines of ``text``, which \\n and \\r\\n end; \\r alone ends one where there is no \\n, and is a space elsewhere.

    str.splitlines also cuts at U+0085, U+2028, form feeds and their like, which stand inside of texts.
    """
    text = text.replace("\r\n", "\n")
    return text.replace("\r", " " if "\n" in text else "\n").split("\n")


def text_of(content: bytes) -> str:
    """``content`` as text: UTF-8, or UTF-16 where a byte-order mark says so, as Windows writes it; UnicodeDecodeError for all else."""
    return content.decode("utf-16" if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig")


def read_lines(path: Path) -> list[str]:
    """The lines of a text file by `lines_of` and `text_of`; a UserError for another encoding."""
    content = path.read_bytes()
    refuse_other_formats(path, content)
    try:
        return lines_of(text_of(content))
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 text: '{path}' at byte {error.start}; expected UTF-8; convert it with iconv") from None


def refuse_other_formats(path: Path, content: bytes) -> None:
    """A UserError that names what ``content`` of ``path`` is where that is audio, an archive or another known format, and no text."""
    has_controls = re.search(rb"[\x00-\x08]", content[:4096])
    kind = next((kind for pattern, kind in _NOT_TEXT if has_controls and re.match(pattern, content, re.DOTALL)), None)
    if kind:
        raise UserError(f"not text: '{path}' is {kind[0]}, expected text; {kind[1]}")


def read_text_line(path: Path) -> str:
    """The whole of a UTF-8 text file on one line; a UserError for another encoding."""
    return " ".join(" ".join(read_lines(path)).split())


def fingerprint(facts: Any) -> str:
    """SHA-256 (hex) of ``facts``, all that decides a result: what another fingerprint has left is of other work."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
