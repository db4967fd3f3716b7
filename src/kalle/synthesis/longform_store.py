"""The sentences of a long text in a folder, so that a run that was killed goes on where it was."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile
import torch

from kalle.audio import from_pcm16, write_audio
from kalle.checkpoint import read_json, read_tensors, weights_hash, write_json, write_tensors
from kalle.errors import UserError
from kalle.synthesis.longform_part import Part
from kalle.text.sentences import Sentence

if TYPE_CHECKING:
    from kalle.synthesis.adapter import Adapter
    from kalle.synthesis.longform import LongForm
    from kalle.synthesis.voice import Voice

SETTINGS_NAME = "settings.json"
LOCK_NAME = "lock"
_STORED = (
    "index",
    "spoken",
    "stop_reason",
    "seed",
    "tries",
    "confidence",
    "loudness_db",
    "gain_db",
    "pace",
    "rolled",
    "pause_samples",
    "warnings",
)
_SPOKEN_KEYS = {
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
        wav, latents, note = self._paths(index)
        if not note.is_file() or not wav.is_file() or not latents.is_file():
            return None
        stored = read_json(note)
        samples, rate_hz = soundfile.read(wav, dtype="int16") if stored["samples"] else (np.zeros(0, dtype=np.int16), stored["sample_rate"])
        if (stored["text"], stored["samples"]) != (sentence.text, len(samples)):
            return None
        values = {name: stored[name] for name in _STORED} | {"warnings": tuple(stored["warnings"])}
        values["loudness_db"] = float("-inf") if values["loudness_db"] is None else values["loudness_db"]
        frames = read_tensors(latents)["latents"].numpy()
        return Part(sentence=sentence, audio=from_pcm16(samples), sample_rate=rate_hz, latents=frames, kept=True, **values)

    def write(self, part: Part) -> None:
        """Write the part, and the settings before the first; a DiskError when the disk refuses."""
        if not (self.folder / SETTINGS_NAME).is_file():
            write_json(self.folder / SETTINGS_NAME, self.settings)
        wav, latents, note = self._paths(part.index)
        if len(part.audio):
            write_audio(wav, part.audio, part.sample_rate)
        else:
            wav.touch()
        write_tensors(latents, {"latents": torch.from_numpy(np.ascontiguousarray(part.latents))})
        stored = {name: getattr(part, name) for name in _STORED} | {"text": part.sentence.text}
        stored |= {"warnings": list(part.warnings), "samples": len(part.audio), "sample_rate": part.sample_rate}
        stored["loudness_db"] = part.loudness_db if np.isfinite(part.loudness_db) else None
        write_json(note, stored)

    def count(self) -> int:
        """How many parts there are."""
        return sum(1 for path in self.folder.glob("[0-9]*.json"))

    def remove(self) -> None:
        """Remove the folder with all parts; nothing else is ever in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs off the folder; a UserError when one is at it. A folder without parts goes again at the end."""
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
        "model": hashlib.sha256((weights_hash(kalle.lm) + weights_hash(kalle.flowvae)).encode()).hexdigest(),
        "stop": kalle.config.stop.to_dict(),
        "device": kalle.device.type,
        "dtype": str(next(kalle.lm.backbone.parameters()).dtype),
        "seed": long.seed,
        "sentences": len(long),
        **json.loads(json.dumps(dataclasses.asdict(long.options))),
        "temperature": kalle.temperature if long.options.temperature is None else long.options.temperature,
    }


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
        named = ", ".join(_SPOKEN_KEYS.get(name, name.replace("_", " ")) for name in different)
        raise UserError(
            f"the sentences in '{folder}' were spoken otherwise: another {named}; "
            "give what you gave then to go on, --restart to begin again, or another output"
        )


def _lock(descriptor: int, folder: Path) -> None:
    # Only where the system has it; elsewhere two runs at once write the same bytes and the first to end takes the folder away.
    with contextlib.suppress(ImportError):
        import fcntl

        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another run is speaking into '{folder}'; wait for it, or choose another output") from None
