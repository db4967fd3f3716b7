"""Locks between processes that share a folder, also from different machines; one that dies lets go of its locks."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

logger = logging.getLogger(__name__)

_REFUSED = (errno.EAGAIN, errno.EACCES)
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
LOCKS_FOLDER = ".locks"


@contextlib.contextmanager
def folder_lock(root: Path, name: str, *, wait: bool) -> Iterator[str | None]:
    """Hold the lock ``name`` of the folder ``root`` inside the block.

    Yields None when it is ours, else (only without ``wait``) who has it, as HOST:PID. The kernel ends the lock of a process that dies.
    A file system without locks is reported in the log, and the lock counts as ours: writers rename whole files there all the same.
    """
    path = root / LOCKS_FOLDER / name
    descriptor, holder = _acquire(path, wait)
    try:
        yield holder
    finally:
        if descriptor is not None:
            if holder is None:
                # Removed while it is ours; whoever waits for this file notices that the path is another's by now.
                path.unlink(missing_ok=True)
                with contextlib.suppress(OSError):
                    path.parent.rmdir()
            os.close(descriptor)


def _acquire(path: Path, wait: bool) -> tuple[int | None, str | None]:
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:  # the folder went with another process's last lock
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _REFUSED:
                return descriptor, os.pread(descriptor, 256, 0).decode(errors="replace") or "another process"
            if error.errno not in _UNSUPPORTED:
                os.close(descriptor)
                raise
            logger.warning("no locks on the file system of '%s' (%s): see to it that every rank runs once", path.parent, error.strerror)
            return descriptor, None
        if _still_there(path, descriptor):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{socket.gethostname()}:{os.getpid()}".encode(), 0)
            return descriptor, None
        os.close(descriptor)


def _still_there(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
