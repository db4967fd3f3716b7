"""The voices of a weight folder, found and checked without loading the model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from kalle.checkpoint import (
    CONFIG_NAME,
    part_folder,
    permission_errors,
    read_json,
    read_weights,
    require_readable,
    tensors_hash,
)
from kalle.errors import UserError
from kalle.synthesis.adapter import base_hash
from kalle.synthesis.folder import VOICES_FOLDER
from kalle.synthesis.voice import FLOWVAE_ENCODER, RANDOM_VOICE, SPEAKER_ENCODER, Voice

SUFFIX = ".safetensors"
LONGEST_NAME = 80
_NAME = re.compile(r"\w[\w .+-]*")


@dataclass(frozen=True)
class StoredVoice:
    """A voice file; ``voice`` is None where it can't be read, and ``problem`` says why it can't be read or used."""

    name: str
    path: Path
    voice: Voice | None
    problem: str | None


@dataclass(frozen=True)
class Binding:
    """What voices must fit: the encoder hashes and widths of one weight folder."""

    hashes: dict[str, str]
    latent_dim: int
    hidden_size: int
    take_lm_hash: Callable[[], str] | None = None
    """Gives ``base_hash`` of the language model, which adapters must fit."""

    @classmethod
    def of_folder(cls, folder: str | Path) -> Binding:
        """Read from the files of ``folder`` what ``Kalle.hashes`` and the configurations would say; a UserError as in loading it."""
        flowvae, lm = part_folder(folder, "flowvae"), part_folder(folder, "lm")
        config, backbone = read_json(flowvae / CONFIG_NAME), read_json(lm / CONFIG_NAME).get("backbone", {})
        hashes = {FLOWVAE_ENCODER: _hash(flowvae, {"encoder.": ""})}
        if read_json(lm / CONFIG_NAME).get("speaker") is not None:
            hashes[SPEAKER_ENCODER] = _hash(lm, {"speaker_encoder.": "0.", "speaker_projection.": "1."})
        try:
            return cls(hashes, int(config["latent_dim"]), int(backbone["hidden_size"]), lambda: base_hash(read_weights(lm)))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"bad configuration in '{folder}': no usable {error}; convert or export the weights again") from None

    @cached_property
    def lm_hash(self) -> str | None:
        """``base_hash`` of the language model, taken when an adapter asks for it; None where there is none to ask."""
        return None if self.take_lm_hash is None else self.take_lm_hash()

    def problem(self, voice: Voice) -> str | None:
        """Why ``voice`` does not fit; None when it does."""
        try:
            voice.check_fits(self.hashes, self.latent_dim, self.hidden_size)
            if voice.adapter is not None and self.lm_hash is not None:
                voice.adapter.check_fits(self.lm_hash)
        except UserError as error:
            return str(error)
        return None


def voice_path(folder: str | Path, name: str) -> Path:
    """Where the voice ``name`` of the weight folder ``folder`` is; a UserError for a name that can't be a file's."""
    if not _NAME.fullmatch(name) or len(name) > LONGEST_NAME:
        raise UserError(
            f"bad voice name: got {name!r}, expected up to {LONGEST_NAME} letters, digits, spaces, dots and hyphens, the first a letter "
            "or digit; choose another --name"
        )
    if name == RANDOM_VOICE:
        raise UserError(f"bad voice name: got {name!r}, which asks for a made-up voice, expected another; choose another --name")
    return Path(folder) / VOICES_FOLDER / f"{name}{SUFFIX}"


@permission_errors()
def find_voice(folder: str | Path | None, voice: str | Path) -> Path:
    """The file of ``voice``: a name means the voice in ``folder`` before any file of that name, a path (a ``Path``, or a text with a
    separator or the suffix) a file alone.

    A UserError that lists the names there are, and one for a file that can't be read.
    """
    path = Path(voice)
    is_path = isinstance(voice, Path) or path.suffix == SUFFIX or any(mark in str(voice) for mark in "/\\")
    if folder is not None and not is_path and (stored := Path(folder) / VOICES_FOLDER / f"{voice}{SUFFIX}").is_file():
        path = stored
    if path.is_file():
        require_readable(path)
        return path
    names = [] if folder is None else [path.stem for path in voice_files(folder)]
    known = f"expected a voice file or one of {', '.join(names)}" if names else "expected a voice file; this model has no stored voices"
    raise UserError(f"voice file not found: got '{voice}', {known}; see `kalle voices list`")


def voice_files(folder: str | Path) -> list[Path]:
    """The voice files of the weight folder, by name."""
    return sorted((Path(folder) / VOICES_FOLDER).glob(f"*{SUFFIX}"))


def stored_voices(paths: list[Path], binding: Binding | None) -> list[StoredVoice]:
    """Every file of ``paths``, damaged ones included; whether they fit is left open without ``binding``."""
    return [_stored(path, binding) for path in paths]


def _stored(path: Path, binding: Binding | None) -> StoredVoice:
    try:
        voice = Voice.load(path)
    except UserError as error:
        return StoredVoice(path.stem, path, None, str(error))
    return StoredVoice(path.stem, path, voice, None if binding is None else binding.problem(voice))


def _hash(part: Path, prefixes: dict[str, str]) -> str:
    """``weights_hash`` of the submodules whose state names begin with ``prefixes``, with those replaced as given."""
    found = {}
    for name, tensor in read_weights(part).items():
        for prefix, ours in prefixes.items():
            if name.startswith(prefix):
                found[ours + name.removeprefix(prefix)] = tensor
    return tensors_hash(found)
