"""Where data folders lie: a directory, or any URL that fsspec can read (s3://, gs://, https://, memory://, …).

A directory is read with plain system calls. Of a URL, small files are fetched whole and members of shards by range requests, or, with
a cache folder, whole shards are downloaded once and then read like local ones.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from kalle.errors import UserError
from kalle.files import atomic_file

OPEN_FILES = 64
"""Shards that a process keeps open at most."""
CHUNK_BYTES = 8 * 2**20


def is_url(folder: str | Path) -> bool:
    """Whether ``folder`` is for fsspec."""
    return "://" in str(folder)


class Folder:
    """Files below ``root``, named by relative paths with forward slashes; can be pickled and forked."""

    def __init__(self, root: str | Path, cache_dir: str | Path | None = None) -> None:
        """``cache_dir`` keeps whole shards of a URL; a directory needs none and ignores it."""
        self.root = str(root).rstrip("/") if is_url(root) else str(Path(root))
        self.remote = is_url(root)
        self.cache_dir = Path(cache_dir) if cache_dir is not None and self.remote else None
        self._mark: str | None = None
        self._descriptors: dict[str, int] = {}
        self._filesystem: tuple[int, Any, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}, "_filesystem": None}

    def __str__(self) -> str:
        return self.root

    def where(self, name: str) -> str:
        """The address of one file, for messages."""
        return f"{self.root}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is a file ``name``."""
        if not self.remote:
            return Path(self.root, name).is_file()
        with storage_errors(self.where(name)):
            filesystem, base = self._fsspec()
            return bool(filesystem.exists(f"{base}/{name}"))

    def read(self, name: str) -> bytes:
        """The whole of a file."""
        if not self.remote:
            return Path(self.root, name).read_bytes()
        with storage_errors(self.where(name)):
            filesystem, base = self._fsspec()
            return bytes(filesystem.cat_file(f"{base}/{name}"))

    def sizes(self, subfolder: str) -> dict[str, int]:
        """Names and sizes in bytes of the files in ``subfolder``, sorted; empty when there is none."""
        if not self.remote:
            path = Path(self.root, subfolder)
            entries = sorted(os.scandir(path), key=lambda entry: entry.name) if path.is_dir() else []
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
        with storage_errors(self.where(subfolder)):
            filesystem, base = self._fsspec()
            filesystem.invalidate_cache()
            try:
                listed = filesystem.ls(f"{base}/{subfolder}", detail=True)
            except FileNotFoundError:
                return {}
            found = {entry["name"].rstrip("/").rpartition("/")[2]: entry for entry in listed if entry["type"] == "file"}
            return {name: self._size(subfolder, name, found[name]) for name in sorted(found)}

    def read_range(self, name: str, offset: int, size: int) -> bytearray:
        """``size`` bytes of a file from ``offset``."""
        if not 0 <= offset <= offset + size:
            raise UserError(f"damaged shard: '{self.where(name)}' has {size} bytes from byte {offset}; write or copy the folder again")
        if self.remote and self.cache_dir is None:
            with storage_errors(self.where(name)):
                filesystem, base = self._fsspec()
                content = bytearray(filesystem.cat_file(f"{base}/{name}", start=offset, end=offset + size))
        else:
            descriptor = self._descriptor(name)
            # No more than there is: a header may claim any size, and that much memory would be taken first.
            content = bytearray(os.pread(descriptor, min(size, max(0, os.fstat(descriptor).st_size - offset)), offset))
        if len(content) != size:
            raise UserError(f"incomplete shard: '{self.where(name)}' ends before byte {offset + size}; write or copy the folder again")
        return content

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Any]:
        """A seekable binary stream over a file."""
        if not self.remote or self.cache_dir is not None:
            with self.local(name).open("rb") as stream:
                yield stream
            return
        with storage_errors(self.where(name)):
            filesystem, base = self._fsspec()
            with filesystem.open(f"{base}/{name}", "rb") as stream:
                yield stream

    def local(self, name: str) -> Path:
        """The file on this machine: itself, or its copy in the cache folder, made if it isn't there."""
        if not self.remote:
            return Path(self.root, name)
        assert self.cache_dir is not None, name
        copy = self.cache_dir / self._cache_mark() / name
        if not copy.is_file():
            copy.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(copy.with_name(copy.name + ".lock")):
                if not copy.is_file():  # another process may have been quicker
                    self._download(name, copy)
        return copy

    def _download(self, name: str, copy: Path) -> None:
        with atomic_file(copy) as temporary, storage_errors(self.where(name)):
            filesystem, base = self._fsspec()
            with filesystem.open(f"{base}/{name}", "rb") as stream, temporary.open("wb") as file:
                while chunk := stream.read(CHUNK_BYTES):
                    file.write(chunk)

    def _cache_mark(self) -> str:
        """A folder name that differs for another address and for other content at the same address."""
        if self._mark is None:
            facts = self.read("info.json") if self.exists("info.json") else b""
            self._mark = hashlib.sha256(self.root.encode() + b"\n" + facts).hexdigest()[:20]
        return self._mark

    def _size(self, subfolder: str, name: str, entry: dict[str, Any]) -> int:
        if entry.get("size") is None:  # some servers list names only
            filesystem, base = self._fsspec()
            return int(filesystem.size(f"{base}/{subfolder}/{name}"))
        return int(entry["size"])

    def _descriptor(self, name: str) -> int:
        descriptor = self._descriptors.get(name)
        if descriptor is None:
            while len(self._descriptors) >= OPEN_FILES:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            try:
                descriptor = os.open(self.local(name), os.O_RDONLY)
            except FileNotFoundError:
                raise UserError(f"missing shard: no file '{self.where(name)}'; write or copy the folder again") from None
            self._descriptors[name] = descriptor
        return descriptor

    def _fsspec(self) -> tuple[Any, str]:
        """The file system and the path of the root in it; a client must not cross a fork, so each process makes its own."""
        if self._filesystem is None or self._filesystem[0] != os.getpid():
            import fsspec

            filesystem, base = fsspec.core.url_to_fs(self.root)
            self._filesystem = (os.getpid(), filesystem, str(base).rstrip("/"))
        return self._filesystem[1:]

    def __del__(self) -> None:
        for descriptor in getattr(self, "_descriptors", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def storage_errors(address: str) -> Iterator[None]:
    """Turn whatever a storage client raises inside the block into a UserError about ``address``; disk errors of our own pass."""
    try:
        yield
    except (UserError, AssertionError):
        raise
    except ImportError as error:
        raise UserError(f"no package for '{address}': {error}; pip install it, or copy the folder to this machine") from None
    except FileNotFoundError:
        raise UserError(f"nothing at '{address}': no such bucket, folder or file; check the address") from None
    except Exception as error:  # each storage has its own client with its own errors
        text = " ".join(str(error).split()) or "no explanation"
        reason = f"{type(error).__name__}: {text}"
        if isinstance(error, PermissionError) or "redential" in reason or "Forbidden" in reason or "AccessDenied" in reason:
            raise UserError(f"no access to '{address}' ({reason}); log in to the storage or set its credentials") from None
        raise UserError(f"cannot read '{address}' ({reason}); check the address and the network, then run the same command again") from None
