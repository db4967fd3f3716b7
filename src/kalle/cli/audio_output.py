"""Where audio goes: a WAV file that is valid while it grows, standard output, the system's players."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from kalle.audio import WAV_HEADER as HEADER
from kalle.audio import wav_header
from kalle.errors import UserError
from kalle.files import disk_errors, lock_descriptor

_SAMPLE_BYTES = 2


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
    """Standard output, headerless or as a WAV of unknown length; BrokenPipeError once the reader is gone, DiskError where it is a file."""

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


@dataclass(frozen=True)
class Player:
    """A command line, the first word of which is looked up in the path. ``{path}`` and ``{rate}`` are filled in."""

    file: tuple[str, ...]
    """Plays a WAV file and returns at its end."""
    pipe: tuple[str, ...] | None
    """Plays headerless 16-bit mono from standard input; None where it can't."""

    @property
    def name(self) -> str:
        """Name of the program that plays."""
        return self.file[0]


NO_DEVICE = "open failed"
"""The message of ffplay, with exit code 0, where there is no sound device."""
PLAYERS = (
    Player(("paplay", "{path}"), ("paplay", "--raw", "--format=s16le", "--rate={rate}", "--channels=1")),
    Player(("aplay", "-q", "{path}"), ("aplay", "-q", "-t", "raw", "-f", "S16_LE", "-r", "{rate}", "-c", "1", "-")),
    Player(("afplay", "{path}"), None),
    Player(
        ("ffplay", "-v", "error", "-nodisp", "-autoexit", "{path}"),
        ("ffplay", "-v", "error", "-nodisp", "-autoexit", "-f", "s16le", "-ar", "{rate}", "-i", "-"),
    ),
    Player(("play", "-q", "{path}"), ("play", "-q", "-t", "raw", "-r", "{rate}", "-e", "signed", "-b", "16", "-c", "1", "-")),
)
"""In order of preference. Headerless input is mono by default for ffplay, whose option for channels changed its name over the years."""


def available_players() -> list[Player]:
    """The players in the path."""
    return [player for player in PLAYERS if shutil.which(player.name)]


def play_file(path: Path) -> tuple[str, bool]:
    """Play a WAV file with the first player that can; returns what happened, in a few words, and whether it was played."""
    failures = []
    for player in available_players():
        command = [word.format(path=path, rate="") for word in player.file]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if result.returncode == 0 and NO_DEVICE not in result.stderr:
            return f"played with {player.name}", True
        failures.append(f"{player.name}: {_last_line(result.stderr) or f'exit code {result.returncode}'}")
    if failures:
        return f"could not play it ({'; '.join(failures)})", False
    return f"no player found (looked for {', '.join(player.name for player in PLAYERS)})", False


def play_any(path: Path) -> tuple[str, bool]:
    """``play_file`` for audio of any kind that can be read."""
    if path.suffix.lower() == ".wav":
        return play_file(path)
    from kalle.audio import load_channels, write_audio

    channels, rate_hz = load_channels(path)
    with tempfile.TemporaryDirectory(prefix="kalle-") as folder:
        wav = Path(folder) / f"{path.stem}.wav"
        write_audio(wav, channels[0], rate_hz)
        return play_file(wav)


class PipedPlayer:
    """A player that is fed while the audio is being made."""

    def __init__(self, sample_rate_hz: int) -> None:
        """Start the first player that reads a pipe; a UserError when there is none."""
        player = next((player for player in available_players() if player.pipe is not None), None)
        if player is None or player.pipe is None:
            names = ", ".join(player.name for player in PLAYERS if player.pipe is not None)
            raise UserError(f"no player to hear the stream with: looked for {names}; install one, or leave out --play and write a file")
        command = [word.format(path="", rate=sample_rate_hz) for word in player.pipe]
        self.name = player.name
        # A group of its own: Ctrl-C is for this program, which then tells the player that nothing more comes.
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, process_group=0)
        self.failure: str | None = None

    def write(self, samples: NDArray[np.int16]) -> None:
        """Hand over (n,) samples; a player that died is noted in ``failure`` and gets no more."""
        if self.failure is not None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(samples.astype("<i2").tobytes())
            self._process.stdin.flush()
        except OSError:
            self.failure = f"{self.name} ended early: {_last_line(self._errors()) or f'exit code {self._process.wait()}'}"

    def close(self, wait: bool = True) -> None:
        """Say that nothing more comes and, with ``wait``, let it play what it has; otherwise end it."""
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        if not wait:
            self._process.terminate()
        code, said = self._process.wait(), self._errors()
        if wait and (code or NO_DEVICE in said) and self.failure is None:
            self.failure = f"{self.name}: {_last_line(said) or f'exit code {code}'}"

    def _errors(self) -> str:
        return self._process.stderr.read().decode(errors="replace") if self._process.stderr is not None else ""


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
