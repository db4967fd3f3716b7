"""LJSpeech, LibriTTS(-R), LibriSpeech, AISHELL-3: lhotse's recipes read them; what a recipe passes over is found and reported."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lhotse.recipes
from lhotse import RecordingSet, SupervisionSet
from lhotse.audio.backend import AudioBackend, LibsndfileCompatibleAudioInfo, get_current_audio_backend, set_current_audio_backend

from kalle.data.corpora.items import Rejection, Source, SourceItem
from kalle.data.corpora.layout import collected, find_root
from kalle.data.corpora.manifests import from_manifests, split_of_part
from kalle.data.prepare_files import read_lines, safe_id
from kalle.errors import UserError

LIBRI_PARTS = (
    *("train-clean-100", "train-clean-360", "train-other-500", "train-clean-5"),
    *("dev-clean", "dev-other", "dev-clean-2", "test-clean", "test-other"),
)


class _NamesOnly(AudioBackend):
    """Answers for every file that it is one second long, so that a recipe opens none: the items are heard one by one later on.

    A recipe by itself reads all headers in advance, and ends at the first broken one.
    """

    def info(self, path_or_fd: Any, force_opus_sampling_rate: int | None = None) -> LibsndfileCompatibleAudioInfo:
        return LibsndfileCompatibleAudioInfo(channels=1, frames=16000, samplerate=16000, duration=1.0)


@dataclass(frozen=True)
class Recipe:
    """How one corpus lies on disk. ``audio`` and ``transcripts`` are patterns below a part, ``ids`` gives those of one transcript."""

    corpus: str
    function: str
    required: tuple[str, ...]
    layout: str
    audio: str
    transcripts: str
    ids: Callable[[Path], Iterable[str]]


def _first_cells(separator: str | None) -> Callable[[Path], Iterable[str]]:
    return lambda path: (line.split(separator)[0].removesuffix(".wav") for line in read_lines(path) if line.strip())


_LIBRI_LAYOUT = "train-clean-100/SPEAKER/CHAPTER/{} (or another of its parts)"
LJSPEECH = Recipe(
    corpus="LJSpeech",
    function="prepare_ljspeech",
    required=("metadata.csv", "wavs"),
    layout="metadata.csv (id|text|normalised text; for other lists see `kalle prepare csv`) and wavs/",
    audio="wavs/*.wav",
    transcripts="metadata.csv",
    ids=_first_cells("|"),
)
LIBRISPEECH = Recipe(
    corpus="LibriSpeech",
    function="prepare_librispeech",
    required=(),
    layout=_LIBRI_LAYOUT.format("*.flac with *.trans.txt"),
    audio="**/*.flac",
    transcripts="**/*.trans.txt",
    ids=_first_cells(None),
)
LIBRITTS = Recipe(
    corpus="LibriTTS",
    function="prepare_libritts",
    required=(),
    layout=_LIBRI_LAYOUT.format("*.wav with *.normalized.txt or *.trans.tsv"),
    audio="**/*.wav",
    transcripts="**/*.trans.tsv",
    ids=_first_cells("\t"),
)
AISHELL3 = Recipe(
    corpus="AISHELL-3",
    function="prepare_aishell3",
    required=("train/content.txt", "test/content.txt", "spk-info.txt", "train/label_train-set.txt"),
    layout="spk-info.txt, train/label_train-set.txt, and in train/ and test/: content.txt and wav/SPEAKER/*.wav",
    audio="wav/*/*.wav",
    transcripts="content.txt",
    ids=_first_cells("\t"),
)


def read_ljspeech(folder: Path) -> Source:
    """LJSpeech 1.1: one speaker; the third column, in which numbers are spelled out, is the text."""
    root = find_root(folder, LJSPEECH.required, LJSPEECH.corpus, LJSPEECH.layout)
    rejected: list[Rejection] = []
    items = []
    for item in _run(LJSPEECH, root, rejected):
        custom = dict(item.custom or {})
        items.append(SourceItem(item.id, item.audio, str(custom.pop("normalized_text", item.text)), "linda-johnson", "en", custom=custom))
    return collected(LJSPEECH.corpus, items, rejected)


def read_librispeech(folder: Path) -> Source:
    """LibriSpeech and Mini LibriSpeech: upper-case text without punctuation, dev and test parts kept as valid and test."""
    root, parts = _libri_parts(folder, LIBRISPEECH)
    rejected: list[Rejection] = []
    items = [item for part in parts for item in _run(LIBRISPEECH, root, rejected, part, dataset_parts=part)]
    return collected(LIBRISPEECH.corpus, items, rejected, {"parts": ", ".join(parts)})


def read_libritts(folder: Path) -> Source:
    """LibriTTS and LibriTTS-R: normalised texts, dev and test parts kept as valid and test.

    A part without *.trans.tsv and *.book.tsv is read by its *.normalized.txt.
    """
    root, parts = _libri_parts(folder, LIBRITTS)
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    for part in parts:
        tables = any((root / part).rglob("*.trans.tsv")) and any((root / part).rglob("*.book.tsv"))
        items += _run(LIBRITTS, root, rejected, part, dataset_parts=part) if tables else _beside(root / part, rejected)
    return collected("LibriTTS", items, rejected, {"parts": ", ".join(parts)})


def read_aishell3(folder: Path) -> Source:
    """AISHELL-3: Mandarin characters without the pinyin between them; its test part is kept, valid comes out of train."""
    root = find_root(folder, AISHELL3.required, AISHELL3.corpus, AISHELL3.layout)
    rejected: list[Rejection] = []
    parts = _call(AISHELL3, root)
    items: list[SourceItem] = []
    for part in ("train", "test"):
        found = list(_items(parts[part].values(), split_of_part(part), rejected))
        items += found
        _account(AISHELL3, root / part, found, rejected)
    return collected(AISHELL3.corpus, items, rejected)


def _libri_parts(folder: Path, recipe: Recipe) -> tuple[Path, list[str]]:
    """The folder of the parts and the parts that are there; ``folder`` may also be a part itself."""
    if folder.is_dir() and folder.resolve().name in LIBRI_PARTS:
        return folder.resolve().parent, [folder.resolve().name]
    if not folder.is_dir():
        return find_root(folder, (), recipe.corpus, recipe.layout), []
    for root in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        parts = [part for part in LIBRI_PARTS if (root / part).is_dir()]
        if parts:
            return root, parts
    raise UserError(f"not the layout of {recipe.corpus}: got '{folder}', expected {recipe.layout}; name the folder that holds these")


def _run(recipe: Recipe, root: Path, rejected: list[Rejection], part: str = ".", **arguments: Any) -> Iterator[SourceItem]:
    """The items of one part, then into ``rejected`` what lies there and the recipe has not returned."""
    result = _call(recipe, root, **arguments)
    manifests = result.get(part, result)
    items = list(_items(manifests.values(), split_of_part(part), rejected))
    yield from items
    _account(recipe, root / part, items, rejected)


def _items(manifests: Iterable[Any], split: str | None, rejected: list[Rejection]) -> Iterator[SourceItem]:
    # Known by their types: lhotse 1.33 returns those of AISHELL-3 under each other's names.
    both = list(manifests)
    [recordings] = [manifest for manifest in both if isinstance(manifest, RecordingSet)]
    [supervisions] = [manifest for manifest in both if isinstance(manifest, SupervisionSet)]
    return from_manifests(recordings, supervisions, split, rejected)


def _call(recipe: Recipe, root: Path, **arguments: Any) -> dict[str, Any]:
    result: dict[str, Any] = quietly(getattr(lhotse.recipes, recipe.function), recipe.corpus, root, recipe.layout, **arguments)
    return result


def quietly(recipe: Callable[..., Any], corpus: str, root: Path, layout: str, **arguments: Any) -> Any:
    """What a lhotse recipe returns of ``root``, read without opening audio, without its bars and warnings; a UserError when it gives up."""
    before = get_current_audio_backend()
    set_current_audio_backend(_NamesOnly())
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return recipe(root, **arguments)
    except Exception as error:
        raise UserError(
            f"cannot read {corpus} in '{root}' ({type(error).__name__}: {error}); expected {layout}; "
            "mend that place or unpack the corpus again"
        ) from None
    finally:
        logging.disable(logging.NOTSET)
        set_current_audio_backend(before)


def _account(recipe: Recipe, part: Path, items: list[SourceItem], rejected: list[Rejection]) -> None:
    """Reject what is in a transcript without audio, and what is audio without a transcript."""
    known = {item.id for item in items}
    for path in sorted(part.glob(recipe.transcripts)):
        if path.name.startswith("._"):
            continue
        for name in recipe.ids(path):
            if safe_id(name) not in known:
                known.add(safe_id(name))
                rejected.append(
                    Rejection(safe_id(name), "", "missing", f"named in '{path.name}', but lhotse's recipe found no audio for it")
                )
    for path in sorted(part.glob(recipe.audio)):
        if safe_id(path.stem) not in known:
            rejected.append(Rejection(safe_id(path.stem), str(path), "no text", "audio that no transcript names"))


def _beside(part: Path, rejected: list[Rejection]) -> Iterator[SourceItem]:
    for path in sorted(part.rglob("*.wav")):
        if path.name.startswith("._"):
            continue
        text = path.with_name(f"{path.stem}.normalized.txt")
        if text.is_file():
            spoken = " ".join(" ".join(read_lines(text)).split())
            yield SourceItem(safe_id(path.stem), path.resolve(), spoken, path.stem.split("_")[0], "en", split_of_part(part.name))
        else:
            rejected.append(Rejection(safe_id(path.stem), str(path), "no text", f"no {text.name} beside it"))
