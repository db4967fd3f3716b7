"""The system's audio players: a file played, or audio played as it comes."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kalle.errors import UserError


@dataclass(frozen=True)
class Player:
    """A command line, the first word of which is looked up in the path. ``{path}`` and ``{rate}`` are filled in."""

    file: tuple[str, ...]
    """Plays a WAV file and returns at its end."""
    pipe: tuple[str, ...] | None
    """Plays headerless 16-bit mono from standard input; None where it can't."""

    @property
    def name(self) -> str:
        """The program."""
        return self.file[0]


NO_DEVICE = "open failed"
"""What ffplay says, with exit code 0, where there is no sound device."""
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


def play_file(path: Path) -> str:
    """Play a WAV file with the first player that can; returns what happened, in one line."""
    failures = []
    for player in available_players():
        command = [word.format(path=path, rate="") for word in player.file]
        result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        if result.returncode == 0 and NO_DEVICE not in result.stderr:
            return f"played with {player.name}"
        failures.append(f"{player.name}: {_last_line(result.stderr) or f'exit code {result.returncode}'}")
    if failures:
        return f"could not play it ({'; '.join(failures)}); the audio is in {path}"
    return f"no player found (looked for {', '.join(player.name for player in PLAYERS)}); the audio is in {path}"


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
