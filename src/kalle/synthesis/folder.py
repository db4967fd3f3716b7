"""The weight folder's own config.json: what the parts together are meant for."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from kalle.checkpoint import CONFIG_NAME, FORMAT_VERSION, dataclass_from_dict, part_folder, permission_errors, read_json, write_json
from kalle.errors import UserError
from kalle.synthesis.row import StopRule, default_stop
from kalle.text.tokenizer import TOKENIZER_NAME, Tokenizer

TOKENIZER_FOLDER = "tokenizer"
VOICES_FOLDER = "voices"


@dataclass(frozen=True)
class FolderConfig:
    """What NAME/config.json says about speaking; every key is optional."""

    stop: StopRule = field(default_factory=StopRule)
    """The stop rule stored for these weights, or else `default_stop`."""
    language: str | None = None
    """Language of the texts, an ISO 639-1 code."""
    voice: str | None = None
    """Name of the default voice in voices/."""
    sample_rate: int | None = None
    """Samples per second of the audio; None leaves it to the Flow-VAE."""
    temperature: float | None = None
    """Scale of the standard deviations that suits these weights, at least 0; None for 1."""
    longest_seconds: float | None = None
    """Speech at the usual pace that these weights keep up in one request; a longer text is best spoken in parts. None for what a request
    allows."""


@dataclass(frozen=True)
class StoredStop(StopRule):
    """A stop rule with what its calibration measured; that is for people."""

    false_stop_rate: float | None = None
    """Share of held-out utterances that the rule would have cut."""
    missed_stop_rate: float | None = None
    """Share of held-out utterances whose end the rule would have missed."""
    utterances: int | None = None
    """How many utterances that were."""


@dataclass(frozen=True)
class _Stored:
    """Every key that NAME/config.json may hold."""

    format_version: int = FORMAT_VERSION
    parts: tuple[str, ...] = ()
    stop: StoredStop | None = None
    language: str | None = None
    voice: str | None = None
    sample_rate: int | None = None
    temperature: float | None = None
    longest_seconds: float | None = None


@permission_errors()
def read_folder(folder: str | Path) -> FolderConfig:
    """Check that ``folder`` is a weight folder that can speak and read its config.json.

    UserError when the folder, a part or the tokenizer is missing, the format is newer than this program, a key or value is not known, or
    something may not be read.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(
            f"no such weight folder: got '{folder}', expected a folder with flowvae/, lm/ and {TOKENIZER_FOLDER}/; "
            "give the one that a training run wrote, or fetch the released weights with `kalle download`"
        )
    for part in ("flowvae", "lm"):
        part_folder(root, part)
    if not (root / TOKENIZER_FOLDER / TOKENIZER_NAME).is_file():
        raise UserError(
            f"no tokenizer in '{folder}': expected {TOKENIZER_FOLDER}/{TOKENIZER_NAME}; "
            "copy the tokenizer folder of these weights there, or convert again with --tokenizer DIR"
        )
    stop_head = bool(read_json(part_folder(root, "lm") / CONFIG_NAME).get("stop_head"))
    path = root / CONFIG_NAME
    return _read_config(path, stop_head) if path.is_file() else FolderConfig(default_stop(stop_head))


def write_stop(folder: str | Path, stop: StoredStop) -> None:
    """Store ``stop`` in the config.json of the weight folder ``folder`` and leave its other keys alone.

    UserError as ``read_folder``, and when the file cannot be written.
    """
    read_folder(folder)
    path = Path(folder) / CONFIG_NAME
    values = read_json(path) if path.is_file() else {"format_version": FORMAT_VERSION}
    write_json(path, values | {"stop": stop.to_dict()})


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of the weight folder ``folder``."""
    return Tokenizer.load(Path(folder) / TOKENIZER_FOLDER)


def _read_config(path: Path, stop_head: bool) -> FolderConfig:
    values = read_json(path)
    version = values.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f"unknown format in '{path}': got format_version {version!r}, expected at most {FORMAT_VERSION}; update kalle")
    stored: _Stored = dataclass_from_dict(_Stored, values, path)
    stop = default_stop(stop_head)
    if stored.stop is not None:
        stop = StopRule(stored.stop.threshold, stored.stop.min_index, probability=stored.stop.probability)
    if stored.temperature is not None and not 0 <= stored.temperature < math.inf:
        raise UserError(f"bad temperature in '{path}': got {stored.temperature}, expected a finite number of at least 0; correct it")
    if stored.longest_seconds is not None and not 0 < stored.longest_seconds < math.inf:
        raise UserError(f"bad longest_seconds in '{path}': got {stored.longest_seconds}, expected a finite one above 0; correct it")
    return FolderConfig(stop, stored.language, stored.voice, stored.sample_rate, stored.temperature, stored.longest_seconds)
