"""Corpora that a library reads: lhotse (LibriTTS(-R), LibriSpeech, AISHELL-3, its manifests) and Hugging Face datasets."""

from __future__ import annotations

import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lhotse.recipes
from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet, load_manifest_lazy
from lhotse.audio.backend import AudioBackend, LibsndfileCompatibleAudioInfo, get_current_audio_backend, set_current_audio_backend

from kalle.data.corpus.items import (
    UNKNOWN_SPEAKER,
    ArrowCell,
    Rejection,
    Source,
    SourceItem,
    collected,
    find_root,
    plain_fields,
    split_of_part,
    text_or,
)
from kalle.data.corpus.lists import COLUMNS
from kalle.errors import UserError
from kalle.files import read_lines, read_text_line, resolved
from kalle.text.languages import language_of_name

if TYPE_CHECKING:
    from datasets import Dataset

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
        resolved(Path(recording.sources[0].source)),
        text_or(supervision.text, ""),
        text_or(supervision.speaker, UNKNOWN_SPEAKER),
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
    source = collected("lhotse manifests", named, rejected, {"lhotse manifests": len(pairs)}, path.resolve().name.split(".")[0])
    return replace(source, lists=tuple(file for pair in pairs for file in pair if file is not None))


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


KINDS = ("audio", "text", "speaker", "language", "id")
"""The columns that are read, by the names of `COLUMNS`; all but audio and text may be absent."""
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")
"""NAME or OWNER/NAME; anything else can only be a path."""
_KEPT = ("gender", "accent", "emotion", "style", "dnsmos")
_EXPECTED = "expected a folder of `save_to_disk`, parquet files, or a dataset's name on the hub"


def read_hugging_face(
    source: str,
    config: str | None = None,
    audio_column: str | None = None,
    text_column: str | None = None,
    speaker_column: str | None = None,
    language_column: str | None = None,
    speaker: str = UNKNOWN_SPEAKER,
    language: str = "",
) -> Source:
    """Every row of every split; splits named dev…, valid… and test… are valid and test. The audio stays encoded until it is checked.

    The columns are found by the names of `COLUMNS` unless they are given. Raises UserError when there is no such dataset or column.
    """
    given = {"audio": audio_column, "text": text_column, "speaker": speaker_column, "language": language_column}
    splits = _open(source, config)
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    notes: dict[str, object] = {}
    for name, dataset in splits.items():
        found = {kind: _column(dataset, kind, given.get(kind)) for kind in KINDS}
        notes[f"columns ({name})"] = ", ".join(f"{kind}: {column}" for kind, column in found.items() if column)
        items += _rows(dataset, found, name, len(splits) > 1, speaker, language, rejected)
    return collected(Path(source).name or source, items, rejected, notes)


def _open(source: str, config: str | None) -> dict[str, Dataset]:
    try:
        import datasets
    except ImportError:
        raise UserError("no `datasets`: expected Hugging Face's library; install it with `pip install datasets`") from None
    path = Path(source)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            loaded = datasets.load_from_disk(source)
        elif path.exists() or not HUB_NAME.fullmatch(source):
            loaded = datasets.load_dataset("parquet", data_files=_parquet(path))
        else:
            loaded = datasets.load_dataset(source, config)
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot open the dataset '{source}' ({type(error).__name__}: {reason}); {_EXPECTED}; check it") from None
    return dict(loaded) if isinstance(loaded, dict) else {"train": loaded}


def _parquet(path: Path) -> dict[str, list[str]]:
    """Split -> files; train-00000-of-00001.parquet and test/x.parquet are named by their first word or folder."""
    files = [path] if path.is_file() else sorted(path.rglob("*.parquet"))
    if not files or files[0].suffix != ".parquet":
        raise UserError(f"no dataset in '{path}': {_EXPECTED}; check the path")
    splits: dict[str, list[str]] = {}
    for file in files:
        words = [file.name.split("-")[0].split(".")[0], file.parent.name]
        name = next((word for word in words if split_of_part(word)), "train")
        splits.setdefault(split_of_part(name) or "train", []).append(str(file))
    return splits


def _column(dataset: Dataset, kind: str, wanted: str | None) -> str | None:
    have = dataset.column_names
    if wanted is not None and wanted not in have:
        raise UserError(f"{kind}_column: got '{wanted}', expected one of {', '.join(have)}; correct it")
    found = wanted or next((name for name in COLUMNS[kind] if name in have), None)
    if found is None and kind in ("audio", "text"):
        raise UserError(f"no {kind} column: got {', '.join(have)}; expected {', '.join(COLUMNS[kind])}; name it with {kind}_column")
    return found


def _rows(
    dataset: Dataset, columns: dict[str, str | None], split: str, prefixed: bool, speaker: str, language: str, rejected: list[Rejection]
) -> Iterator[SourceItem]:
    audio = columns["audio"]
    assert audio is not None
    light = dataset.select_columns([name for name in dataset.column_names if name in {*columns.values(), *_KEPT} - {audio}])
    cells = zip(light, _cells(dataset, audio), _places(dataset), strict=True)
    for number, (row, (name, embedded), (file, at)) in enumerate(cells):
        given = row.get(columns["id"]) if columns["id"] else None
        key = str(given) if given not in (None, "") else Path(name or f"row-{number}").stem
        item_id = f"{split}-{key}" if prefixed else key
        values = {kind: row.get(column) if column else None for kind, column in columns.items()}
        yield SourceItem(
            item_id,
            file if embedded else resolved(Path(name or "")),
            text_or(values["text"], ""),
            text_or(values["speaker"], speaker),
            language_of_name(str(values["language"] or "")) or language,
            split_of_part(split),
            inside=ArrowCell(name or f"row-{number}", audio, at) if embedded else None,
            custom=plain_fields({kept: row.get(kept) for kept in _KEPT}),
            origin=str(number) if given in (None, "") else "",
        )


def _cells(dataset: Dataset, audio: str) -> Iterator[tuple[str | None, bool]]:
    """The name of each recording, and whether its bytes are in the table too; they are not read."""
    for chunk in dataset.data.column(audio).chunks:
        storage = getattr(chunk, "storage", chunk)
        if not {"bytes", "path"} <= {field.name for field in storage.type}:
            raise UserError(f"no audio in the column '{audio}': got {storage.type}, expected bytes and path; name it with audio_column")
        yield from zip(storage.field("path").to_pylist(), storage.field("bytes").is_valid().to_pylist(), strict=True)


def _places(dataset: Dataset) -> Iterator[tuple[Path, int]]:
    """The Arrow file and the row in it of each row of ``dataset``."""
    import pyarrow

    for entry in dataset.cache_files:
        path = Path(entry["filename"]).resolve()
        rows = sum(batch.num_rows for batch in pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))))
        yield from ((path, row) for row in range(rows))
