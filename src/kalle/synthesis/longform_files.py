"""Files of a long text: its sentences, so that a killed run continues where it was, and subtitles."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import logging
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch

from kalle.audio import from_pcm16, write_audio
from kalle.checkpoint import (
    dataclass_from_dict,
    part_folder,
    read_json,
    read_tensors,
    read_weights,
    tensors_hash,
    weights_hash,
    write_json,
    write_tensors,
)
from kalle.decoding import sndfile_name
from kalle.errors import UserError
from kalle.models.int8 import Int8Backbone
from kalle.models.lm import PART
from kalle.synthesis.longform import Part
from kalle.synthesis.options import StopRule
from kalle.synthesis.speech import FRAME_ARRAYS, Attempt, Speech
from kalle.text.languages import Sentence

if TYPE_CHECKING:
    from kalle.synthesis.adapter import Adapter
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.longform import LongForm
    from kalle.synthesis.voice import Voice

logger = logging.getLogger(__name__)
SETTINGS_NAME = "settings.json"
LOCK_NAME = "lock"
LINE_COLUMNS = 42
"""Columns of a subtitle line; an ideograph takes two."""
_OF_PART = ("index", "loudness_db", "gain_db", "pace", "rolled", "pause_samples", "tries", "warnings")
_OF_SPEECH = [field.name for field in dataclasses.fields(Speech) if field.name not in ("audio", "parts", *FRAME_ARRAYS)]
"""All of a result but what the other files hold."""
_NAMES = {
    "text": "text",
    "voice": "voice",
    "model": "model",
    "seed": "seed",
    "kalle": "version of kalle",
    "words": "reading of the text",
}


class PartStore:
    """A folder with the wav, the frames and a JSON of every sentence spoken so far; the JSON is written last and says that all is there."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Take ``folder`` for a run with ``settings`` (see ``settings_of``); a UserError when it holds one with others."""
        self.folder, self.settings = folder, dict(settings)
        path = folder / SETTINGS_NAME
        if path.is_file():
            _check_same(folder, read_json(path), self.settings)

    def read(self, index: int, sentence: Sentence) -> Part | None:
        """The part ``index``; None when it isn't there, or its files are not what was written."""
        wav, frames, note = self._paths(index)
        if not note.is_file() or not wav.is_file() or not frames.is_file():
            return None
        try:
            return self._read(wav, frames, note, sentence)
        except (UserError, soundfile.LibsndfileError, KeyError, TypeError, ValueError) as error:
            logger.warning("sentence %d is spoken again, its files in '%s' are damaged: %s", index + 1, self.folder, error)
            return None

    def _read(self, wav: Path, frames: Path, note: Path, sentence: Sentence) -> Part | None:
        stored, arrays = read_json(note), read_tensors(frames)
        samples, rate_hz = soundfile.read(sndfile_name(wav), dtype="int16") if stored["samples"] else (np.zeros(0, dtype=np.int16), None)
        if (stored["text"], stored["samples"]) != (sentence.text, len(samples)) or rate_hz not in (None, stored["speech"]["sample_rate"]):
            return None
        spoken: dict[str, Any] = stored["speech"] | {"warnings": tuple(stored["speech"]["warnings"])}
        spoken["stop"] = dataclass_from_dict(StopRule, spoken["stop"], note, "stop")
        spoken["attempts"] = tuple(dataclass_from_dict(Attempt, one, note, "attempts") for one in spoken["attempts"])
        spoken |= {name: arrays[name].numpy() for name in FRAME_ARRAYS}
        speech = Speech(from_pcm16(samples), **spoken)
        values = stored["part"] | {"warnings": tuple(stored["part"]["warnings"])}
        values["loudness_db"] = float("-inf") if values["loudness_db"] is None else values["loudness_db"]
        return Part(sentence=sentence, speech=speech, kept=True, **values)

    def write(self, part: Part) -> None:
        """Write the part, and the settings before the first; a DiskError when the disk refuses."""
        if not (self.folder / SETTINGS_NAME).is_file():
            write_json(self.folder / SETTINGS_NAME, self.settings)
        wav, frames, note = self._paths(part.index)
        if len(part.audio):
            write_audio(wav, part.audio, part.speech.sample_rate)
        else:
            wav.touch()
        write_tensors(frames, {name: torch.from_numpy(np.ascontiguousarray(getattr(part.speech, name))) for name in FRAME_ARRAYS})
        values = {name: getattr(part, name) for name in _OF_PART}
        values["loudness_db"] = part.loudness_db if np.isfinite(part.loudness_db) else None
        spoken = {name: getattr(part.speech, name) for name in _OF_SPEECH}
        spoken |= {"stop": part.speech.stop.to_dict(), "attempts": [dataclasses.asdict(one) for one in part.speech.attempts]}
        write_json(note, {"text": part.sentence.text, "samples": len(part.audio), "part": values, "speech": spoken})

    def count(self) -> int:
        """How many parts there are."""
        return sum(1 for path in self.folder.glob("[0-9]*.json"))

    def remove(self) -> None:
        """Remove the folder with all parts; nothing else is ever in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs off the folder; a UserError when one is at it. A folder without parts is removed at the end."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            with (self.folder / LOCK_NAME).open("a") as file:
                _lock(file.fileno(), self.folder)
                yield
        finally:
            if not self.count():
                self.remove()

    def _paths(self, index: int) -> tuple[Path, Path, Path]:
        stem = self.folder / f"{index:05d}"
        return stem.with_suffix(".wav"), stem.with_suffix(".safetensors"), stem.with_suffix(".json")


def stored_seed(folder: Path) -> int | None:
    """The seed of the run whose parts are in ``folder``; None without one."""
    path = folder / SETTINGS_NAME
    seed = read_json(path).get("seed") if path.is_file() else None
    return seed if isinstance(seed, int) else None


def settings_of(long: LongForm) -> dict[str, Any]:
    """Everything that decides the parts of ``long``, as JSON values: hashes of text, voice and weights, the seed and the options."""
    from kalle import __version__

    kalle = long.kalle
    return {
        "kalle": __version__,
        "text": hashlib.sha256(long.text.encode()).hexdigest(),
        # Sentences and words also depend on the versions of the libraries that find them.
        "words": hashlib.sha256("\n".join(long.words(sentence.text)[0] for sentence in long.sentences).encode()).hexdigest(),
        "voice": _voice_hash(long.voice, long.voice.adapter or kalle.adapter),
        "model": hashlib.sha256((_lm_hash(kalle) + weights_hash(kalle.flowvae)).encode()).hexdigest(),
        "device": kalle.device.type,
        "dtype": str(next(kalle.lm.backbone.parameters()).dtype),
        "sentences": len(long),
        **json.loads(json.dumps(dataclasses.asdict(kalle.filled_in(long.options)))),
    }


def _lm_hash(kalle: Kalle) -> str:
    """Hash of the language model; with 8-bit layers, which are no part of its state, also of the weights that they were made of."""
    own = weights_hash(kalle.lm)
    if kalle.folder is None or not isinstance(kalle.lm.backbone, Int8Backbone):
        return own
    return own + tensors_hash(read_weights(part_folder(kalle.folder, PART)))


def _voice_hash(voice: Voice, adapter: Adapter | None) -> str:
    digest = hashlib.sha256((voice.text or "").encode())
    for name in ("prompt_latents", "speaker_latent"):
        value = getattr(voice, name)
        digest.update(name.encode() + (b"" if value is None else value.contiguous().numpy().tobytes()))
    if adapter is not None:
        digest.update(adapter.digest.encode())
    return digest.hexdigest()


def _check_same(folder: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [name for name in dict.fromkeys([*wanted, *stored]) if stored.get(name) != wanted.get(name)]
    if "text" in different or "normalise" in different:
        different = [name for name in different if name not in ("sentences", "words")]
    if different:
        named = ", ".join(_NAMES.get(name, name.replace("_", " ")) for name in different)
        raise UserError(
            f"the sentences in '{folder}' were spoken otherwise: another {named}; "
            "give the same to continue, remove the folder to begin again (restart), or choose another output"
        )


def _lock(descriptor: int, folder: Path) -> None:
    # Only where the system has it; elsewhere two runs at once write the same bytes and the first to end takes the folder away.
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is speaking into '{folder}'; wait for it, or choose another output") from None


@dataclass(frozen=True)
class Cue:
    """A text and when it is spoken, in seconds from the start of the audio."""

    text: str
    start_s: float
    end_s: float


def srt(cues: Iterable[Cue], columns: int = LINE_COLUMNS) -> str:
    """The cues as one SubRip text: numbered from 1, times with milliseconds after a comma, long lines wrapped, a blank line between."""
    blocks = []
    for number, cue in enumerate(cues, start=1):
        assert 0 <= cue.start_s <= cue.end_s, cue
        lines = wrap(cue.text, columns)
        blocks.append("\n".join([str(number), f"{timestamp(cue.start_s)} --> {timestamp(cue.end_s)}", *lines]) + "\n")
    return "\n".join(blocks)


def timestamp(seconds: float) -> str:
    """``seconds`` as HH:MM:SS,mmm, to the nearest millisecond."""
    milliseconds = round(seconds * 1000)
    minutes, milliseconds = divmod(milliseconds, 60_000)
    return f"{minutes // 60:02d}:{minutes % 60:02d}:{milliseconds // 1000:02d},{milliseconds % 1000:03d}"


def wrap(text: str, columns: int) -> list[str]:
    """``text`` in lines of at most ``columns``, broken at spaces, beside a wide character, or else inside a word."""
    lines, line = [], ""
    for unit in _units(" ".join(text.split())):
        if line.strip() and _columns((line + unit).rstrip()) > columns:
            lines.append(line.strip())
            line = ""
        line += unit
        while _columns(line.rstrip()) > columns:
            head = _head(line, columns)
            lines.append(line[:head])
            line = line[head:]
    return [*lines, line.strip()] if line.strip() else lines


def _units(text: str) -> list[str]:
    """``text`` cut where a line may break; put together they are ``text``."""
    units: list[str] = []
    for character in text:
        glued = bool(units) and (unicodedata.category(character)[0] in "PM" or not (_wide(character) or _wide(units[-1][-1])))
        if glued and not units[-1].endswith(" "):
            units[-1] += character
        else:
            units.append(character)
    return units


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF"


def _columns(text: str) -> int:
    return sum(2 if _wide(character) else 1 for character in text)


def _head(line: str, columns: int) -> int:
    """How many characters of ``line`` take at most ``columns``, at least one."""
    count = 1
    while count < len(line) and _columns(line[: count + 1]) <= columns:
        count += 1
    return count
