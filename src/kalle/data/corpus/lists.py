"""Readers of what users write themselves: a folder of audio with text files, JSONL, CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kalle.data.corpus.items import AUDIO_SUFFIXES, Rejection, Source, SourceItem, audio_id, safe_id, unique
from kalle.data.corpus.splits import SPLITS
from kalle.data.journal import read_jsonl, read_lines
from kalle.errors import UserError

TRANSCRIPTS_NAME = "transcripts.jsonl"


REJECTED_NAME = "rejected.jsonl"


TEXT_SUFFIXES = (".txt", ".lab")


def read_embedded(folder: Path) -> Source:
    """A folder with transcripts.jsonl (see `read_jsonl_corpus`) and, when its builder left items out, rejected.jsonl."""
    if not (folder / TRANSCRIPTS_NAME).is_file():
        raise UserError(f"no corpus in '{folder}': expected {TRANSCRIPTS_NAME} in it; name the folder with --corpus")
    source = read_jsonl_corpus(folder / TRANSCRIPTS_NAME)
    listed = read_jsonl(folder / REJECTED_NAME) if (folder / REJECTED_NAME).is_file() else []
    rejected = [Rejection(**row) for row in listed]
    cleaned = sum("source_text" in row for row in read_jsonl(folder / TRANSCRIPTS_NAME))
    return Source(folder.resolve().name, source.items, rejected + source.rejected, {"texts with a remark in brackets taken out": cleaned})


def read_folder(folder: Path, speaker: str = "unknown", language: str = "") -> Source:
    """Every audio file below ``folder`` with the text of x.txt, or x.lab, beside it.

    ``speaker`` "folders" names the speaker of an item after the folder it lies in. An audio file without a text
    is rejected as "no text", a text without audio as "missing". Raises UserError when there is no audio at all.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', expected a folder of audio and text files; check the path")
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    audio = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
    if not audio:
        raise UserError(f"no audio in '{folder}': expected x.wav, x.flac, x.mp3 … beside x.txt; check the path")
    items: list[SourceItem] = []
    rejected: list[Rejection] = []
    for path in audio:
        item_id = safe_id(path.relative_to(folder).with_suffix("").as_posix())
        try:
            text = _text_beside(path)
        except UserError as error:
            rejected.append(Rejection(item_id, str(path), "no text", str(error)))
            continue
        if text is None:
            rejected.append(Rejection(item_id, str(path), "no text", f"no {path.stem}.txt or {path.stem}.lab beside it"))
        else:
            who = path.resolve().parent.name if speaker == "folders" else speaker
            items.append(SourceItem(item_id, path.resolve(), text, who, language))
    stems = {path.with_suffix("") for path in audio}
    for path in paths:
        if path.suffix.lower() in TEXT_SUFFIXES and path.with_suffix("") not in stems:
            item_id = safe_id(path.relative_to(folder).with_suffix("").as_posix())
            rejected.append(Rejection(item_id, str(path), "missing", "a text without an audio file of the same name"))
    return Source(folder.resolve().name, unique(items, rejected), rejected)


def _text_beside(audio: Path) -> str | None:
    for suffix in TEXT_SUFFIXES:
        path = audio.with_suffix(suffix)
        if path.is_file():
            return " ".join(" ".join(read_lines(path)).split())
    return None


def embedded_folder() -> Path:
    """The English prompts that come with a checkout; a UserError where kalle is installed without one."""
    folder = Path(__file__).resolve().parents[4] / "recipes" / "quickstart" / "corpus"
    if not (folder / TRANSCRIPTS_NAME).is_file():
        raise UserError(f"no embedded corpus: '{folder}' is in a checkout only; name the folder with --corpus")
    return folder


JSONL_KEYS = ("audio", "text", "id", "speaker", "duration", "language", "split", "source_text", "start")


KEPT_KEYS = ("ref_audio", "dataset_id", "emotion", "style", "dnsmos")
"""Of a JSONL line, what goes into the cut's custom fields as it is."""


HEADER_WORDS = frozenset(("audio", "path", "file", "wav", "audio_file", "filename"))


def read_jsonl_corpus(path: Path, speaker: str = "unknown", language: str = "") -> Source:
    """``{"audio", "text", "id"?, "speaker"?, "language"?, "split"?}`` a line; audio paths are relative to the file.

    ``speaker`` and ``language`` stand in where a line has none. With ``start`` (seconds) an item is the part of its
    recording from there, ``duration`` seconds long or to the end; ``duration`` alone says nothing that the file doesn't.
    A line without text is rejected as "no text", one without audio as "missing". `KEPT_KEYS` are kept, and any further
    key is counted in the notes. Raises UserError for a line that is not an object, for bad times and an unknown split.
    """
    rows = read_jsonl(path)
    items: list[SourceItem] = []
    rejected: list[Rejection] = []
    ignored: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        for key in set(row) - set(JSONL_KEYS) - set(KEPT_KEYS):
            ignored[key] = ignored.get(key, 0) + 1
        audio, text = str(row.get("audio") or ""), str(row.get("text") or "")
        if not audio:
            rejected.append(Rejection(str(row.get("id", f"line-{number}")), "", "missing", f"entry {number} has no audio"))
            continue
        item_id = safe_id(str(row["id"])) if row.get("id") else audio_id(audio)
        who, spoken = str(row.get("speaker") or speaker), str(row.get("language") or language)
        custom = {key: row[key] for key in KEPT_KEYS if isinstance(row.get(key), str | int | float)}
        start, seconds = _part_of(row, path, number)
        split = _split_of(row, path, number)
        items.append(SourceItem(item_id, _located(path, audio), text, who, spoken, split, start, seconds, custom=custom or None))
    notes: dict[str, object] = {f"keys not used ({key})": count for key, count in sorted(ignored.items())}
    return Source(path.stem, unique(items, rejected), rejected, notes)


def read_csv_corpus(path: Path, delimiter: str = "|", speaker: str = "unknown", language: str = "") -> Source:
    """``audio|text`` a line, with or without a header line; further columns without a header are not used, and counted in the notes.

    A first line whose first cell is a word such as "audio" or "path" is the header; with a header the columns
    audio (or path, file, wav), text, speaker and language are found by name. An audio cell without a suffix means
    that name with .wav, there or in wavs/ (LJSpeech). Raises UserError for an empty file.
    """
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a CSV file; check the path")
    lines = [(number, line.split(delimiter)) for number, line in enumerate(read_lines(path), start=1) if line.strip()]
    if not lines:
        raise UserError(f"no lines in '{path}': expected audio{delimiter}text; fill it")
    columns = {"audio": 0, "text": 1}
    first = [cell.strip().lower() for cell in lines[0][1]]
    if first[0] in HEADER_WORDS:
        columns = {"audio" if name in HEADER_WORDS else name: at for at, name in reversed(list(enumerate(first)))}
        lines = lines[1:]
        if "text" not in columns:
            raise UserError(f"no text column in '{path}': got the header {delimiter.join(first)}; expected a column named text")
    items: list[SourceItem] = []
    rejected: list[Rejection] = []
    for number, cells in lines:
        row = {name: cells[at].strip() for name, at in columns.items() if at < len(cells)}
        if not row.get("audio"):
            rejected.append(Rejection(f"line-{number}", "", "missing", f"line {number} has no audio"))
            continue
        item_id = audio_id(row["audio"])
        who, spoken = row.get("speaker") or speaker, row.get("language") or language
        items.append(SourceItem(item_id, _located(path, row["audio"]), row.get("text", ""), who, spoken))
    wide = 0 if first[0] in HEADER_WORDS else sum(len(cells) > len(columns) for _, cells in lines)
    notes: dict[str, object] = {"lines with further columns, not used": wide} if wide else {}
    return Source(path.stem, unique(items, rejected), rejected, notes)


def _located(table: Path, audio: str) -> Path:
    """Where an audio cell points: relative to the table; a bare name also means NAME.wav there or in wavs/."""
    here = table.resolve().parent
    given = here / audio
    candidates = [given, given.with_name(given.name + ".wav"), here / "wavs" / f"{audio}.wav", here / "wavs" / audio]
    return next((candidate for candidate in candidates if candidate.is_file()), given)


def _part_of(row: dict[str, Any], path: Path, number: int) -> tuple[float, float | None]:
    """Start and duration in seconds of a line that names a part; 0 and None for a whole recording."""
    if row.get("start") is None:
        return 0.0, None
    try:
        start, seconds = float(row["start"]), None if row.get("duration") is None else float(row["duration"])
    except (TypeError, ValueError):
        raise UserError(f"bad times in '{path}' entry {number}: got {row['start']!r}, expected start and duration in seconds") from None
    return start, seconds


def _split_of(row: dict[str, Any], path: Path, number: int) -> str | None:
    split = row.get("split")
    if split is None:
        return None
    if split not in SPLITS:
        raise UserError(f"unknown split in '{path}' entry {number}: got '{split}', expected one of {', '.join(SPLITS)}; change it")
    return str(split)
