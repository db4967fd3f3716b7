"""The weight folder's own config.json: what the parts together are meant for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalle.checkpoint import CONFIG_NAME, FORMAT_VERSION, dataclass_from_dict, part_folder, read_json
from kalle.errors import UserError
from kalle.synthesis.sampling import StopRule
from kalle.text.tokenizer import TOKENIZER_NAME, Tokenizer

TOKENIZER_FOLDER = "tokenizer"
VOICES_FOLDER = "voices"


@dataclass(frozen=True)
class FolderConfig:
    """What NAME/config.json may say; every key is optional."""

    stop: StopRule = field(default_factory=StopRule)
    """The stop rule calibrated for these weights."""
    language: str | None = None
    """Language of the texts, an ISO 639-1 code."""
    voice: str | None = None
    """Name of the default voice in voices/."""
    sample_rate: int | None = None
    """Samples per second of the audio; None leaves it to the Flow-VAE."""


def read_folder(folder: str | Path) -> FolderConfig:
    """Check that ``folder`` is a weight folder that can speak and read its config.json.

    UserError when the folder, a part or the tokenizer is missing, or the format is newer than this program.
    """
    root = Path(folder)
    if not root.is_dir():
        raise UserError(
            f"no such weight folder: got '{folder}', expected a folder with flowvae/, lm/ and {TOKENIZER_FOLDER}/; "
            "give the one that `kalle convert release --out` or a training run wrote"
        )
    for part in ("flowvae", "lm"):
        part_folder(root, part)
    if not (root / TOKENIZER_FOLDER / TOKENIZER_NAME).is_file():
        raise UserError(
            f"no tokenizer in '{folder}': expected {TOKENIZER_FOLDER}/{TOKENIZER_NAME}; "
            "copy the tokenizer folder of these weights there, or convert again with --tokenizer DIR"
        )
    path = root / CONFIG_NAME
    return _parse(read_json(path), path) if path.is_file() else FolderConfig()


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of the weight folder ``folder``."""
    return Tokenizer.load(Path(folder) / TOKENIZER_FOLDER)


def _parse(values: Mapping[str, Any], path: Path) -> FolderConfig:
    version = values.get("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UserError(f"unknown format in '{path}': got format_version {version!r}, expected at most {FORMAT_VERSION}; update kalle")
    stop = values.get("stop") or {}
    if not isinstance(stop, Mapping):
        raise UserError(f"bad value in '{path}': stop is {stop!r}, expected an object such as {{\"threshold\": 0.5}}; mend the file")
    known = {key: value for key, value in stop.items() if key in ("threshold", "min_index")}
    return FolderConfig(
        stop=dataclass_from_dict(StopRule, known, path),
        language=values.get("language"),
        voice=values.get("voice"),
        sample_rate=values.get("sample_rate"),
    )
