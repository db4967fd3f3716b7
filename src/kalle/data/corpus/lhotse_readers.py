"""Corpora read by lhotse: its recipes (LJSpeech, LibriTTS(-R), LibriSpeech, AISHELL-3) and its manifests."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lhotse.recipes
from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet, load_manifest_lazy
from lhotse.audio.backend import AudioBackend, LibsndfileCompatibleAudioInfo, get_current_audio_backend, set_current_audio_backend

from kalle.data.corpus.items import (
    UNKNOWN_SPEAKER,
    Rejection,
    Source,
    SourceItem,
    collected,
    find_root,
    language_of_name,
    plain_fields,
    split_of_part,
)
from kalle.errors import UserError
from kalle.files import read_lines, read_text_line

_WHOLE_S = 1e-3
_MANIFESTS = "expected cuts*.jsonl.gz, or *recordings*.jsonl.gz beside *supervisions*.jsonl.gz of the same name (lhotse manifests)"


def from_manifests(
    recordings: RecordingSet, supervisions: SupervisionSet, split: str | None, rejected: list[Rejection], language: str = ""
) -> Iterator[SourceItem]:
    """An item for each supervision; one whose audio is no local file goes to ``rejected``."""
    by_id = {recording.id: recording for recording in recordings}
    for supervision in supervisions:
        recording = by_id.get(supervision.recording_id)
        if recording is None:
            rejected.append(Rejection(supervision.id, "", "missing", f"no recording '{supervision.recording_id}' in the manifest"))
            continue
        yield from _supervision_item(recording, supervision, supervision.start, split, rejected, language)


def from_cuts(cuts: CutSet, split: str | None, rejected: list[Rejection], language: str = "") -> Iterator[SourceItem]:
    """An item for each supervision of each cut; cuts that are mixed, padded or without a recording go to ``rejected``."""
    for cut in cuts:
        if not isinstance(cut, MonoCut) or cut.recording is None:
            rejected.append(Rejection(cut.id, "", "unreadable", f"got a {type(cut).__name__}, expected a MonoCut of a recording"))
            continue
        if not cut.supervisions:
            rejected.append(Rejection(cut.id, "", "no text", "a cut without a supervision"))
        for supervision in cut.supervisions:
            yield from _supervision_item(cut.recording, supervision, cut.start + supervision.start, split, rejected, language)


def _supervision_item(
    recording: Recording, supervision: SupervisionSegment, start: float, split: str | None, rejected: list[Rejection], language: str
) -> Iterator[SourceItem]:
    item_id = supervision.id
    if len(recording.sources) != 1 or recording.sources[0].type != "file":
        kinds = ", ".join(source.type for source in recording.sources)
        rejected.append(Rejection(item_id, "", "unreadable", f"got audio from {kinds}, expected one file; write it to a file first"))
        return
    whole = start < _WHOLE_S and abs(supervision.duration - recording.duration) < _WHOLE_S
    yield SourceItem(
        item_id,
        Path(recording.sources[0].source).resolve(),
        supervision.text or "",
        supervision.speaker or UNKNOWN_SPEAKER,
        language_of_name(supervision.language) or language,
        split,
        start_s=0.0 if whole else start,
        duration_s=None if whole else supervision.duration,
        channel=supervision.channel if recording.num_channels > 1 and isinstance(supervision.channel, int) else None,
        custom=plain_fields({"gender": supervision.gender, **(supervision.custom or {})}),
    )


def read_lhotse(path: Path, speaker: str = UNKNOWN_SPEAKER, language: str = "") -> Source:
    """A cuts file, or a folder of such files or of recordings and supervisions, as lhotse's own recipes write them.

    Parts named dev or test are valid and test. Relative audio paths count from the working directory, as in lhotse. Raises UserError
    for a path without manifests.
    """
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    pairs = _manifest_files(path)
    for first, second in pairs:
        split = next((found for word in first.name.split(".")[0].split("_") if (found := split_of_part(word))), None)
        try:
            manifests = [load_manifest_lazy(file) for file in (first, second) if file is not None]
            if second is None:
                items += from_cuts(manifests[0], split, rejected, language)
            else:
                items += from_manifests(manifests[0], manifests[1], split, rejected, language)
        except Exception as error:  # lhotse parses what it is given, line by line
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise UserError(f"cannot read '{first}' ({reason}); {_MANIFESTS}; write it again with lhotse") from None
    named = [item if item.speaker != UNKNOWN_SPEAKER else replace(item, speaker=speaker) for item in items]
    return collected("lhotse manifests", named, rejected, {"lhotse manifests": len(pairs)}, path.resolve().name.split(".")[0])


def _manifest_files(path: Path) -> list[tuple[Path, Path | None]]:
    """(cuts, None) or (recordings, supervisions), as absolute paths: lhotse would run a file name that begins with "pipe:"."""
    path = path.absolute()
    if path.is_file():
        return [(path, None)]
    if not path.is_dir():
        raise UserError(f"not found: got '{path}', {_MANIFESTS}; check the path")
    files = sorted(file for file in path.iterdir() if ".jsonl" in file.suffixes)
    pairs: list[tuple[Path, Path | None]] = []
    for file in files:
        if "recordings" in file.name:
            supervisions = file.with_name(file.name.replace("recordings", "supervisions"))
            if not supervisions.is_file():
                raise UserError(f"no '{supervisions.name}' beside '{file}': {_MANIFESTS}; write both")
            pairs.append((file, supervisions))
    pairs = pairs or [(file, None) for file in files if "cuts" in file.name]
    if not pairs:
        raise UserError(f"no manifests in '{path}': {_MANIFESTS}; check the path")
    return pairs


LIBRI_PARTS = (
    *("train-clean-100", "train-clean-360", "train-other-500", "train-clean-5"),
    *("dev-clean", "dev-other", "dev-clean-2", "test-clean", "test-other"),
)


class _NamesOnly(AudioBackend):
    """Answers for every file that it is one second long, so that a recipe opens none: the items are decoded one by one later.

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
        found = list(_manifest_items(parts[part].values(), split_of_part(part), rejected))
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
    items = list(_manifest_items(manifests.values(), split_of_part(part), rejected))
    yield from items
    _account(recipe, root / part, items, rejected)


def _manifest_items(manifests: Iterable[Any], split: str | None, rejected: list[Rejection]) -> Iterator[SourceItem]:
    # Known by their types: lhotse 1.33 returns those of AISHELL-3 under each other's names.
    both = list(manifests)
    [recordings] = [manifest for manifest in both if isinstance(manifest, RecordingSet)]
    [supervisions] = [manifest for manifest in both if isinstance(manifest, SupervisionSet)]
    return from_manifests(recordings, supervisions, split, rejected)


def _call(recipe: Recipe, root: Path, **arguments: Any) -> dict[str, Any]:
    result: dict[str, Any] = quietly(getattr(lhotse.recipes, recipe.function), recipe.corpus, root, recipe.layout, **arguments)
    return result


def quietly(recipe: Callable[..., Any], corpus: str, root: Path, layout: str, **arguments: Any) -> Any:
    """The result of a lhotse recipe for ``root``, read without opening audio, without its progress and warnings; UserError if it fails."""
    before = get_current_audio_backend()
    set_current_audio_backend(_NamesOnly())
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return recipe(root, **arguments)
    except Exception as error:
        raise UserError(
            f"cannot read {corpus} in '{root}' ({type(error).__name__}: {error}); expected {layout}; "
            "correct that line or unpack the corpus again"
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
            if name not in known:
                known.add(name)
                rejected.append(Rejection(name, "", "missing", f"named in '{path.name}', but lhotse's recipe found no audio for it"))
    for path in sorted(part.glob(recipe.audio)):
        if path.stem not in known and not path.name.startswith("._"):
            rejected.append(Rejection(path.stem, str(path), "no text", "audio that no transcript names"))


def _beside(part: Path, rejected: list[Rejection]) -> Iterator[SourceItem]:
    for path in sorted(part.rglob("*.wav")):
        if path.name.startswith("._"):
            continue
        text = path.with_name(f"{path.stem}.normalized.txt")
        try:
            spoken = read_text_line(text)
        except (UserError, OSError) as error:
            detail = str(error) if isinstance(error, UserError) else f"no {text.name} beside it"
            rejected.append(Rejection(path.stem, str(path), "no text", detail))
            continue
        yield SourceItem(path.stem, path.resolve(), spoken, path.stem.split("_")[0], "en", split_of_part(part.name))
