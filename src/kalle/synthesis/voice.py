"""Voices: one small file each that knows which encoder it belongs to, and the voices of a weight folder."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kalle.checkpoint import (
    CONFIG_NAME,
    in_package,
    part_folder,
    permission_errors,
    read_json,
    read_weights,
    require_readable,
    tensors_hash,
)
from kalle.errors import PATH, UserError, check_type
from kalle.files import write_atomic
from kalle.synthesis.adapter import Adapter, base_hash

FORMAT, WITH_ADAPTER = "kalle-voice-1", "kalle-voice-2"
"""The second one holds an adapter too, so that a program that knows none refuses it."""
_ADAPTER = "adapter."
VOICES_FOLDER = "voices"
"""Of a weight folder."""
SUFFIX = ".safetensors"
LONGEST_NAME = 80
_NAME = re.compile(r"\w[\w .+-]*")
FLOWVAE_ENCODER = "flowvae_encoder"
SPEAKER_ENCODER = "speaker_encoder"
RECORDING, RANDOM = "recording", "random"
RANDOM_VOICE: Literal["random"] = "random"
"""Given instead of a voice it asks for the made-up voice of the seed, also where the weight folder has a default voice."""
_TENSORS = {"prompt_latents": 2, "speaker_latent": 1}
"""Name -> number of dimensions."""
_ENCODERS = {"prompt_latents": FLOWVAE_ENCODER, "speaker_latent": SPEAKER_ENCODER}
_NOTES = ("text", "language", "licence", "consent", "name", "description", "source")
_NUMBERS: Mapping[str, type] = {"seed": int, "seconds": float}


@dataclass(frozen=True, eq=False)
class Voice:
    """Prompt latents with their transcript, a speaker latent, or both. P frames, D latent_dim, H hidden size.

    A UserError for tensors that no encoder gives: another rank or dtype than stated here, no frame, NaN or infinity.
    Two voices are equal when they are the same object.
    """

    bound_to: Mapping[str, str]
    """Hashes (``kalle.checkpoint.weights_hash``) of what the tensors came from: "flowvae_encoder" for prompt latents, "speaker_encoder"
    for a speaker latent. Another language model over the same encoders accepts the voice."""
    prompt_latents: Tensor | None = None
    """(P, D) fp32, on the CPU."""
    speaker_latent: Tensor | None = None
    """(H,) fp32, on the CPU."""
    text: str | None = None
    """Transcript of the prompt."""
    language: str | None = None
    licence: str | None = None
    """Licence of the recording."""
    consent: str | None = None
    """The consent of the speaker."""
    name: str | None = None
    description: str | None = None
    source: str | None = None
    """"recording", "random", or None where it is not recorded."""
    seed: int | None = None
    """The seed it was made with: of the draw of the prompt latents, or of the random voice."""
    seconds: float | None = None
    """Length of the recording, or of what the random voice said."""
    adapter: Adapter | None = None
    """The adapter of this voice; it is applied to requests in this voice only."""

    def __post_init__(self) -> None:
        check_type("voice's bound_to", self.bound_to, Mapping, "hashes by encoder")
        for value in self.bound_to.values():
            check_type("hash in a voice's bound_to", value, str, "a text")
        for name in _TENSORS:
            check_type(f"voice's {name}", getattr(self, name), Tensor | None, "a tensor")
        for name in _NOTES:
            check_type(f"voice's {name}", getattr(self, name), str | None, "a text")
        if self.prompt_latents is None and self.speaker_latent is None:
            raise UserError("an empty voice: got no prompt latents and no speaker latent, expected at least one; make it from audio")
        if self.prompt_latents is not None and not (self.text and self.text.strip()):
            raise UserError("a prompt without its transcript: got latents and no text, expected the words spoken; give the prompt text")
        for name, rank in _TENSORS.items():
            value = getattr(self, name)
            if value is not None:
                _check_tensor(name, value, rank)
        for name in _NOTES:
            _check_note(name, getattr(self, name))

    @property
    def kind(self) -> str:
        """Its parts, for people: "prompt", "speaker", "adapter", joined by +."""
        held = {"prompt": self.prompt_latents, "speaker": self.speaker_latent, "adapter": self.adapter}
        return " + ".join(name for name, value in held.items() if value is not None)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file atomically; a UserError when the disk refuses."""
        check_type("path", path, PATH, "a path")
        tensors = {name: getattr(self, name).contiguous() for name in _TENSORS if getattr(self, name) is not None}
        metadata = {name: str(getattr(self, name)) for name in (*_NOTES, *_NUMBERS) if getattr(self, name) is not None}
        metadata |= {"format": FORMAT} | {f"bound_to.{name}": value for name, value in self.bound_to.items()}
        if self.adapter is not None:
            metadata |= {"format": WITH_ADAPTER, "adapter": self.adapter.header()}
            tensors |= {_ADAPTER + name: tensor.contiguous() for name, tensor in self.adapter.tensors.items()}
        write_atomic(Path(path), save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | Path) -> Voice:
        """Read a file that ``save`` wrote, today or in an earlier version; a UserError when it is missing, damaged or something else."""
        check_type("path", path, PATH, "that of a .safetensors voice")
        path = Path(path)
        if not path.is_file():
            raise UserError(f"voice file not found: got '{path}', expected a .safetensors voice; check the path")
        require_readable(path)
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                ours = metadata.get("format") in (FORMAT, WITH_ADAPTER)  # else it may be a model of gigabytes
                stored = {name: file.get_tensor(name) for name in file.keys() if ours}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"not a voice file: '{path}' ({error}), expected one that `kalle voices create` wrote; make a voice of a recording, or "
                "make the voice again"
            ) from None
        if not ours:
            got = metadata.get("format")
            hint = "give it as an adapter, beside a voice" if str(got).startswith("kalle-adapter") else "make the voice again"
            raise UserError(f"not a voice file: '{path}' has format {got!r}, expected {FORMAT!r}; {hint}")
        prefix = "bound_to."
        bound = {name.removeprefix(prefix): value for name, value in metadata.items() if name.startswith(prefix)}
        notes: dict[str, Any] = {name: metadata[name] for name in _NOTES if name in metadata}
        notes |= {name: _number(path, name, kind, metadata[name]) for name, kind in _NUMBERS.items() if name in metadata}
        tensors = {name: tensor for name, tensor in stored.items() if name in _TENSORS}
        if metadata["format"] == WITH_ADAPTER:
            changes = {name.removeprefix(_ADAPTER): tensor for name, tensor in stored.items() if name.startswith(_ADAPTER)}
            notes["adapter"] = Adapter.from_parts(metadata.get("adapter", ""), changes, path)
        try:
            return cls(bound_to=bound, **tensors, **notes)
        except UserError as error:
            raise UserError(f"a damaged voice: '{path}': {error}") from None

    def check_fits(self, hashes: Mapping[str, str], latent_dim: int | None = None, hidden_size: int | None = None) -> None:
        """UserError unless every encoder this voice came from is among the model's own ``hashes``, and the widths D and H are its own."""
        for name, wanted in self.bound_to.items():
            if name not in hashes:
                raise UserError(f"the voice does not fit: it needs a {spoken_name(name)}, which this model lacks; make one with this model")
            if hashes[name] != wanted:
                raise UserError(
                    f"the voice does not fit: it was made with the {spoken_name(name)} {wanted[:12]}, this model has "
                    f"{hashes[name][:12]}; make the voice again with this model"
                )
        for name, width in (("prompt_latents", latent_dim), ("speaker_latent", hidden_size)):
            self._check_tensor_fits(name, width)

    def _check_tensor_fits(self, name: str, width: int | None) -> None:
        value: Tensor | None = getattr(self, name)
        if value is None:
            return
        if _ENCODERS[name] not in self.bound_to:
            raise UserError(f"the voice does not fit: it does not say which {spoken_name(_ENCODERS[name])} made it; make the voice again")
        if width is not None and value.shape[-1] != width:
            raise UserError(
                f"the voice does not fit: the width of its {name.replace('_', ' ')} is {value.shape[-1]}, expected {width}; "
                "make the voice again with this model"
            )


def _check_tensor(name: str, value: Tensor, rank: int) -> None:
    spoken = name.replace("_", " ")
    if value.ndim != rank or not value.numel():
        wanted = "(P, D) with at least one frame" if rank == 2 else "(H,)"
        raise UserError(f"a bad voice: {spoken} of shape {tuple(value.shape)}, expected {wanted}; make the voice again")
    if value.dtype != torch.float32:
        raise UserError(f"a bad voice: {spoken} in {value.dtype}, expected torch.float32; make the voice again")
    bad = int((~torch.isfinite(value)).sum())
    if bad:
        raise UserError(f"a bad voice: {bad} NaN or infinite values in its {spoken}, expected numbers only; make the voice again")


def _check_note(name: str, value: str | None) -> None:
    # A terminal would obey what a file from elsewhere says.
    if any(unicodedata.category(character) == "Cc" and not character.isspace() for character in value or ""):
        raise UserError(f"a bad voice: its {name} has control characters, expected text; type it again")
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise UserError(f"a bad voice: its {name} is not Unicode text ({error.reason} at {error.start}); type it again") from None


def _number(path: Path, name: str, kind: type, text: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise UserError(f"a damaged voice: '{path}': its {name} is {text!r}, expected a number; make the voice again") from None


def spoken_name(name: str) -> str:
    """The name of an encoder as people read it."""
    return {FLOWVAE_ENCODER: "Flow-VAE encoder", SPEAKER_ENCODER: "speaker encoder"}.get(name, name)


GivenVoice: TypeAlias = Voice | Literal["random"] | None
"""The voice of a request: None leaves the voice to the weight folder's default, or else to the model."""


def check_given_voice(voice: object) -> None:
    """A UserError for anything but a ``Voice``, "random" or None."""
    if isinstance(voice, Voice | None) or (isinstance(voice, str) and voice == RANDOM_VOICE):
        return
    got = f"{voice!r:.40}" if isinstance(voice, str) else type(voice).__name__
    loads = f"load it with kalle.load_voice({voice!r})" if isinstance(voice, str) else "load one with kalle.load_voice(NAME)"
    raise UserError(f"bad voice: got {got}, expected a kalle.Voice; {loads}")


@dataclass(frozen=True)
class StoredVoice:
    """A voice file; ``voice`` is None where it can't be read, and ``problem`` says why it can't be read or used."""

    name: str
    path: Path
    voice: Voice | None
    problem: str | None


@dataclass(frozen=True)
class Binding:
    """The encoder hashes and widths of one weight folder, which voices must fit."""

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
    name = composed(name)
    # Vowel signs and accents that Unicode does not compose are parts of their letters.
    letters = "".join(character for character in name if not unicodedata.category(character).startswith("M"))
    if not _NAME.fullmatch(letters) or len(name) > LONGEST_NAME:
        raise UserError(
            f"bad voice name: got {name!r}, expected up to {LONGEST_NAME} letters, digits, spaces, dots and hyphens, the first a letter "
            "or digit; choose another name"
        )
    if name == RANDOM_VOICE:
        raise UserError(f"bad voice name: got {name!r}, which asks for a made-up voice, expected another; choose another name")
    return Path(folder) / VOICES_FOLDER / f"{name}{SUFFIX}"


def composed(name: str) -> str:
    """``name`` with each accent and its letter as one character, where there is one: macOS writes and types them apart."""
    return unicodedata.normalize("NFC", name)


def kept_voices(folder: Path | None) -> Path:
    """Where voices that somebody keeps go: voices/ of the weight ``folder``, or of the current folder instead of the installed package."""
    return Path(VOICES_FOLDER) if folder is None or in_package(folder) else folder / VOICES_FOLDER


@permission_errors()
def find_voice(folder: str | Path | None, voice: str | Path) -> Path:
    """The file of ``voice``: a name means the voice in ``folder`` before any file of that name, a path (a ``Path``, or a text with a
    separator or the suffix) a file alone. A name is also looked for with the suffix in the current folder, and in its voices/.

    A UserError that lists the names there are, and one for a file that can't be read.
    """
    check_type("voice", voice, PATH, "a name or a path")
    path = Path(voice)
    is_path = isinstance(voice, Path) or path.suffix == SUFFIX or any(mark in str(voice) for mark in "/\\")
    if folder is not None and not is_path and (stored := named_file(Path(folder) / VOICES_FOLDER, str(voice))):
        path = stored
    if not (is_path or path.is_file()):
        path = next((here for place in ("", VOICES_FOLDER) if (here := named_file(Path(place), str(voice)))), path)
    if path.is_file():
        require_readable(path)
        return path
    names = [] if folder is None else [path.stem for path in voice_files(folder)]
    known = f"expected a voice file or one of {', '.join(names)}" if names else "expected a voice file; this model has no stored voices"
    raise UserError(f"voice file not found: got '{voice}', {known}; see `kalle voices list`")


def named_file(folder: Path, name: str) -> Path | None:
    """The voice file of that ``name`` in ``folder``; else one whose name differs in how accents are written."""
    if (exact := folder / f"{name}{SUFFIX}").is_file():
        return exact
    return next((path for path in sorted(folder.glob(f"*{SUFFIX}")) if composed(path.stem) == composed(name)), None)


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
