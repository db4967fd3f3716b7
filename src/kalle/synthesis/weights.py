"""Weight folders: where they are (this machine, this package, the hub), and what their config.json says of speaking."""

from __future__ import annotations

import math
import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from kalle import checkpoint
from kalle.checkpoint import (
    CONFIG_NAME,
    FORMAT_VERSION,
    SHIPPED,
    dataclass_from_dict,
    part_folder,
    permission_errors,
    read_json,
    write_json,
)
from kalle.convert import CONVERTED
from kalle.convert.release import holds_release, release_folder
from kalle.errors import PATH, UserError, check_type
from kalle.synthesis.options import GenerationOptions, StopRule, default_stop
from kalle.text.frontend import LearntTexts, TextFrontEnd, check_language
from kalle.text.languages import language_in_its_script
from kalle.text.tokenizer import PHONEMES_NAME, TOKENIZER_NAME, Tokenizer

TOKENIZER_FOLDER = "tokenizer"
CKPT = Path("ckpt")
"""Where released weights are looked for, and their copies put, in the current folder."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class StoredConfidence:
    """The result of a calibration of the confidence of speech (``Speech.confidence``)."""

    low: float
    """Speech below it is doubtful."""
    temperature: float = 1.0
    """It holds at this temperature."""
    usual: float | None = None
    """Mean over held-out texts; this and what follows is for people."""
    false_alarm_rate: float | None = None
    """Share of the texts that came out below ``low``."""
    detected_rate: float | None = None
    """Share of deliberately bad speech that came out below ``low``."""
    utterances: int | None = None
    """How many texts that were."""


@dataclass(frozen=True)
class FolderConfig:
    """The settings for speaking in NAME/config.json; every key is optional."""

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
    confidence: StoredConfidence | None = None
    """Which confidence is low for these weights; None where it was not calibrated."""
    longest_seconds: float | None = None
    """Speech at the usual pace that these weights keep up in one request; a longer text is best spoken in parts. None for what a request
    allows."""

    text: LearntTexts = field(default_factory=LearntTexts)
    """Languages and characters of the texts that the weights were trained on."""
    given_phonemes: bool = False
    """Whether their tokenizer reads ``[word](/phonemes/)``."""

    def language_of(self, text: str, options: GenerationOptions) -> str | None:
        """ISO 639-1 code of ``text``: the one given, or the weights' own where the text is in its script; None leaves it to be guessed."""
        if options.language is not None or self.language is None:
            return options.language
        return language_in_its_script(text, self.language)

    def words(self, text: str, options: GenerationOptions) -> tuple[str, tuple[str, ...]]:
        """The words that are spoken for ``text``, and what a listener should know of them, a sentence each."""
        check_language(options.language, self.text)
        front_end = TextFrontEnd(self.text, self.language_of(text, options), options.normalise, self.given_phonemes)
        spoken = front_end.read(text)
        return spoken.text, spoken.warnings

    def transcript(self, text: str) -> str:
        """The input of the model for ``text``, the transcript of a prompt in any of the weights' languages."""
        return TextFrontEnd(self.text.merged(), given_phonemes=self.given_phonemes).read(text).text


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
    text: LearntTexts | None = None
    confidence: StoredConfidence | None = None


@permission_errors()
def read_weight_folder(folder: str | Path) -> FolderConfig:
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
            "copy the tokenizer folder of these weights there, or convert the released files again with theirs"
        )
    stop_head = bool(read_json(part_folder(root, "lm") / CONFIG_NAME).get("stop_head"))
    path = root / CONFIG_NAME
    config = _read_config(path, stop_head) if path.is_file() else FolderConfig(default_stop(stop_head))
    return replace(config, given_phonemes=(root / TOKENIZER_FOLDER / PHONEMES_NAME).is_file())


def write_stop(folder: str | Path, stop: StoredStop) -> None:
    """Store ``stop`` in the config.json of the weight folder ``folder`` and leave its other keys alone.

    UserError as ``read_weight_folder``, and when the file cannot be written.
    """
    _store(folder, "stop", stop.to_dict())


def write_confidence(folder: str | Path, confidence: StoredConfidence) -> None:
    """Store ``confidence`` in the config.json of ``folder``, as ``write_stop`` does."""
    _store(folder, "confidence", asdict(confidence))


def _store(folder: str | Path, name: str, value: object) -> None:
    read_weight_folder(folder)
    path = Path(folder) / CONFIG_NAME
    values = read_json(path) if path.is_file() else {"format_version": FORMAT_VERSION}
    write_json(path, values | {name: value})


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
    text = stored.text or LearntTexts()
    if stored.language is not None and text.languages and stored.language not in text.languages:
        raise UserError(f"bad language in '{path}': got {stored.language!r}, expected one of text.characters ({', '.join(text.languages)})")
    return FolderConfig(
        stop=stop,
        language=stored.language,
        voice=stored.voice,
        sample_rate=stored.sample_rate,
        temperature=stored.temperature,
        confidence=stored.confidence,
        longest_seconds=stored.longest_seconds,
        text=text,
    )


@permission_errors()
def resolve_weights(
    folder_or_hub_id: str | Path, revision: str | None = None, *, local_files_only: bool = False, cache: Path | None = None
) -> Path:
    """The weight folder that ``folder_or_hub_id`` means; one that is not there is returned as it is, for its reader to refuse.

    ``SHIPPED`` is the model that ships, where no folder here has its name. A folder wins; a ``Path``, and a text whose first part is a
    folder here, is never taken for a hub id. Anything else of the form OWNER/NAME is fetched into ``cache`` (by default the assets folder
    of the hub's own cache) the first time, and not asked for again until another ``revision`` is wanted. Released .pt files, in a folder
    or fetched, are converted beside themselves once.
    UserError when the hub cannot give them, or ``local_files_only`` forbids asking and they were never fetched.
    """
    check_type("weights", folder_or_hub_id, PATH, "a weight folder or a hub id OWNER/NAME")
    folder = Path(folder_or_hub_id)
    if str(folder) == SHIPPED and not folder.is_dir():
        return shipped_weights()
    if isinstance(folder_or_hub_id, Path) or folder.is_dir() or (folder.parent.is_dir() and folder.parent != Path()):
        return _speaking(folder)
    if not _HUB_ID.fullmatch(folder_or_hub_id):
        return folder
    folder = (cache or _assets(folder_or_hub_id)) / (revision or "main").replace("/", "--")
    if not _is_complete(folder):
        if local_files_only:
            raise UserError(
                f"not here: got '{folder_or_hub_id}' with local_files_only, but it was never fetched and is no folder; "
                "allow the download, or give a weight folder"
            )
        from kalle.hub import download

        download(folder_or_hub_id, folder, revision)
    return _speaking(folder)


def shipped_weights() -> Path:
    """``shipped_folder``, or a UserError where there is none."""
    folder = checkpoint.shipped_folder()
    if folder is None:
        raise UserError(
            f"no weights: this installation lacks {SHIPPED}, the model that ships with it; install kalle again, fetch the released files "
            "with `kalle download`, train a model (make quickstart), or give a weight folder"
        )
    return folder


def default_weights(ckpt: Path = CKPT) -> Path:
    """The default weights: the released weights in ``ckpt``, converted now if they are not yet, else the model that ships.

    UserError when neither is there, or the released files cannot be converted.
    """
    return release_folder(ckpt) if holds_release(ckpt) else shipped_weights()


def _speaking(folder: Path) -> Path:
    """``folder``, or what is converted from the released files in it, or beside which it is about to be."""
    if folder.name == CONVERTED and not folder.is_dir() and holds_release(folder.parent):
        return release_folder(folder.parent)
    return release_folder(folder) if not (folder / "lm").is_dir() and holds_release(folder) else folder


def _assets(hub_id: str) -> Path:
    from huggingface_hub import cached_assets_path

    return cached_assets_path("kalle", hub_id, "weights")


def _is_complete(folder: Path) -> bool:
    """Whether a download into ``folder`` was finished, and nothing of it was taken away since."""
    from kalle.hub import RECORD_NAME

    record = folder / RECORD_NAME
    if not record.is_file():
        return False
    names = read_json(record).get("files")
    return isinstance(names, list) and all((folder / str(name)).is_file() for name in names)
