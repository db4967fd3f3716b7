"""Hugging Face datasets: a ``save_to_disk`` folder, parquet files, or the name of one on the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from kalle.data.corpus.items import (
    UNKNOWN_SPEAKER,
    ArrowCell,
    Rejection,
    Source,
    SourceItem,
    collected,
    language_of_name,
    plain_fields,
    split_of_part,
)
from kalle.data.corpus.lists import COLUMNS
from kalle.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

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
        who = values["speaker"]
        yield SourceItem(
            item_id,
            file if embedded else Path(name or "").resolve(),
            str(values["text"] or ""),
            speaker if who in (None, "") else str(who),
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
