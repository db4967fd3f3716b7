"""Where streamed audio goes: a WAV file that is valid at any moment, standard output, a player."""

from __future__ import annotations

import contextlib
import os
import struct
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from kalle.errors import UserError
from kalle.files import disk_errors, lock_descriptor

HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
"""RIFF header, format chunk and the head of the data chunk of a PCM file."""
UNKNOWN_SIZE = 0xFFFFFFFF
"""What a WAV says in a pipe, where nobody can write the size later."""
_SAMPLE_BYTES = 2


def wav_header(sample_rate_hz: int, data_bytes: int | None) -> bytes:
    """The 44 bytes in front of ``data_bytes`` of 16-bit mono; None for a stream whose length is not known."""
    size = UNKNOWN_SIZE if data_bytes is None else data_bytes
    whole = UNKNOWN_SIZE if data_bytes is None else HEADER.size - 8 + data_bytes
    rate, width = sample_rate_hz, _SAMPLE_BYTES
    return HEADER.pack(b"RIFF", whole, b"WAVE", b"fmt ", 16, 1, 1, rate, rate * width, width, 8 * width, b"data", size)


class Sink(Protocol):
    """Takes 16-bit mono samples as they come."""

    def write(self, samples: NDArray[np.int16]) -> None:
        """Take (n,) samples; OSError where they can't go."""
        ...

    def close(self) -> None:
        """Nothing more comes."""
        ...


class GrowingWav:
    """A WAV file that can be read while it grows, and after its writer was killed.

    Samples are appended first; then the two sizes in the header are raised, in one write of 44 bytes. In between the header
    says less than there is, which every reader accepts. The file is made, or an old one replaced, by the first samples.
    A DiskError when the disk refuses; what was written before stays. A UserError while another one writes the same file.
    """

    def __init__(self, path: Path, sample_rate_hz: int) -> None:
        self.path, self._rate_hz = path, sample_rate_hz
        self._file: BinaryIO | None = None
        self.samples = 0
        """How many the header tells of."""

    def write(self, samples: NDArray[np.int16]) -> None:
        """Append (n,) samples."""
        if not len(samples):
            return
        with disk_errors(self.path):
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = _only_writer(self.path)
                self._put(self._file, wav_header(self._rate_hz, 0))
            self._put(self._file, samples.astype("<i2").tobytes())
            self._tell_size(self._file)

    def close(self) -> None:
        """Count what is there, also after an interrupt inside ``write``, and close the file."""
        if self._file is not None:
            with self._file as file, disk_errors(self.path):
                self._tell_size(file)
            self._file = None

    def _put(self, file: BinaryIO, content: bytes) -> None:
        left = memoryview(content)
        while left:
            left = left[file.write(left) :]

    def _tell_size(self, file: BinaryIO) -> None:
        size = file.seek(0, os.SEEK_END)
        data = max(0, size - HEADER.size) // _SAMPLE_BYTES * _SAMPLE_BYTES
        file.seek(0)
        self._put(file, wav_header(self._rate_hz, data))
        file.seek(HEADER.size + data)
        self.samples = data // _SAMPLE_BYTES


def _only_writer(path: Path) -> BinaryIO:
    """The empty file, locked until it is closed; what another writer has put there is left alone."""
    file: BinaryIO = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666), "r+b", buffering=0)
    try:
        if lock_descriptor(file.fileno()) is False:
            raise UserError(f"another run is speaking into '{path}'; wait for it, or choose another output")
        file.truncate(0)
    except BaseException:
        file.close()
        raise
    return file


class Pipe:
    """Standard output, headerless or as a WAV of unknown length; BrokenPipeError once nobody reads, DiskError where it is a file."""

    def __init__(self, descriptor: int, sample_rate_hz: int, raw: bool) -> None:
        self._descriptor = descriptor
        self._header = b"" if raw else wav_header(sample_rate_hz, None)

    def write(self, samples: NDArray[np.int16]) -> None:
        """Hand over (n,) samples at once, with nothing kept back in a buffer."""
        left = memoryview(self._header + samples.astype("<i2").tobytes())
        self._header = b""
        with disk_errors(Path("standard output")):
            while left:
                left = left[os.write(self._descriptor, left) :]

    def close(self) -> None:
        """Nothing to do: the descriptor is not ours."""


class Sinks:
    """Several of them at once; each is closed, whatever happens."""

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def __enter__(self) -> Sinks:
        """Itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Close them all."""
        with contextlib.ExitStack() as stack:
            for sink in self._sinks:
                stack.callback(sink.close)

    def write(self, samples: NDArray[np.int16]) -> None:
        """Give (n,) samples to each."""
        for sink in self._sinks:
            sink.write(samples)
