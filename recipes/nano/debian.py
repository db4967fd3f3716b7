"""Debian packages: fetched by apt, opened without root and without installing anything."""

from __future__ import annotations

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from kalle.errors import UserError
from kalle.files import output_folder

AR_MAGIC = b"!<arch>\n"
AR_HEADER_BYTES = 60


def find_packages(folder: Path, names: list[str]) -> list[Path]:
    """The .deb of each package name in ``folder`` (``NAME_VERSION_ARCH.deb``, the last version by name)."""
    found = []
    for name in names:
        matches = sorted(folder.glob(f"{name}_*.deb"))
        if not matches:
            raise UserError(f"package not found: got '{folder}', expected {name}_*.deb in it; run `apt-get download {name}` there")
        found.append(matches[-1])
    return found


def download_packages(folder: Path, names: list[str]) -> list[Path]:
    """Fetch the packages into ``folder`` with ``apt-get download``; a UserError where apt is absent or fails, or the disk refuses."""
    if shutil.which("apt-get") is None:
        raise UserError(f"apt-get not found, which fetches {', '.join(names)}; download these .deb files elsewhere and give --debs DIR")
    with output_folder(folder):
        return _download(folder, names)


def _download(folder: Path, names: list[str]) -> list[Path]:
    staging = folder / "download.partial"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir()
    try:
        # The `_apt` user cannot enter a private folder; the sandbox is of no use for a download into our own.
        command = ["apt-get", "-o", "APT::Sandbox::User=root", "download", *names]
        outcome = subprocess.run(command, cwd=staging, capture_output=True, text=True, check=False)
        if outcome.returncode != 0:
            problem = (outcome.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"apt-get download failed for {', '.join(names)}: {problem}; run `apt-get update`, or give --debs DIR")
        for path in find_packages(staging, names):
            shutil.move(str(path), folder / path.name)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return find_packages(folder, names)


def read_package(path: Path) -> dict[str, bytes]:
    """Every regular file of a .deb by its path without the leading ``./``; a UserError when it is damaged."""
    try:
        with tarfile.open(fileobj=io.BytesIO(_data_archive(path))) as archive:
            return {
                member.name.removeprefix("./"): handle.read()
                for member in archive
                if member.isfile() and (handle := archive.extractfile(member)) is not None
            }
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise UserError(f"not a readable Debian package: '{path}' ({error}); download it again") from None


def _data_archive(path: Path) -> bytes:
    """The bytes of data.tar.* inside the ``ar`` archive (deb(5)); xz, gz and plain are what tarfile opens itself."""
    content = path.read_bytes()
    if not content.startswith(AR_MAGIC):
        raise ValueError("no ar archive")
    at = len(AR_MAGIC)
    while at + AR_HEADER_BYTES <= len(content):
        name = content[at : at + 16].decode("ascii", "replace").rstrip(" /")
        size = int(content[at + 48 : at + 58])
        body = content[at + AR_HEADER_BYTES : at + AR_HEADER_BYTES + size]
        if name.startswith("data.tar"):
            if len(body) < size:
                raise ValueError(f"{name} is cut off")
            return _without_zstd(path, body) if name.endswith(".zst") else body
        at += AR_HEADER_BYTES + size + size % 2
    raise ValueError("no data.tar in it")


def _without_zstd(path: Path, body: bytes) -> bytes:
    if shutil.which("dpkg-deb") is None:
        raise UserError(f"'{path}' is packed with zstd, which needs dpkg-deb; unpack it on a machine that has it")
    return subprocess.run(["dpkg-deb", "--fsys-tarfile", str(path)], capture_output=True, check=True).stdout if body else b""
