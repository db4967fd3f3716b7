"""Readers of what users write themselves: a folder of audio with text files, JSONL, CSV and TSV."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kalle.data.corpus.items import (
    AUDIO_SUFFIXES,
    SPLITS,
    UNKNOWN_SPEAKER,
    Rejection,
    Source,
    SourceItem,
    alike,
    audio_name,
    collected,
    is_plain,
    printable,
    split_of_part,
    text_or,
)
from kalle.errors import UserError
from kalle.files import is_file, parse_json, read_jsonl, read_lines, read_text_line

TRANSCRIPTS_NAME = "transcripts.jsonl"
REJECTED_NAME = "rejected.jsonl"
TEXT_SUFFIXES = (".txt", ".lab")
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "audio": (
        *(
            "audio",
            "audio_filepath",
            "audio_file",
            "audio_path",
            "wav",
            "wav_path",
            "wav_filename",
            "path",
            "file",
            "file_name",
            "filename",
        ),
        *("filepath", "file_path", "clip", "speech", "recording"),
    ),
    "text": (
        *("text_normalized", "normalized_text", "text", "sentence", "transcript", "transcription", "transcripts", "caption", "raw_text"),
        *("txt", "utterance", "words", "text_original", "raw_transcription"),
    ),
    "speaker": ("speaker", "speaker_id", "speaker_name", "spk", "spk_id", "client_id"),
    "language": ("language", "lang", "locale"),
    "id": ("id", "utterance_id", "utt_id", "utt", "segment_id", "key"),
    "split": ("split", "subset"),
    "start": ("start", "offset", "start_time", "begin"),
    "duration": ("duration",),
    "end": ("end", "end_time"),
}
"""Names by which a key of JSONL, a column of a table or of a Hugging Face dataset is known; the first that is there counts."""
KEPT_KEYS = ("ref_audio", "dataset_id", "emotion", "style", "dnsmos", "source_text")
"""Of a JSONL line, what goes into the cut's custom fields as it is."""
DELIMITERS = ("|", "\t", ",", ";")
_EXCEL_DELIMITER = re.compile(r'"?sep=([^"\s]|\t)"?\s*', re.IGNORECASE)
"""The first line by which Excel is told what separates the columns."""
_LOOKED_AT = 100
"""Rows of a table from which its columns are recognised."""
_SHOWN_ROWS = 3
_MOST_UNEVEN = 0.05
"""Share of rows of another width than the others' above which a table is doubtful."""


def read_embedded(folder: Path) -> Source:
    """A folder with transcripts.jsonl (see `read_jsonl_corpus`) and, when its builder left items out, rejected.jsonl."""
    if not (folder / TRANSCRIPTS_NAME).is_file():
        raise UserError(f"no corpus in '{folder}': expected {TRANSCRIPTS_NAME} in it; name the folder (corpus)")
    source = read_jsonl_corpus(folder / TRANSCRIPTS_NAME)
    listed = read_jsonl(folder / REJECTED_NAME) if (folder / REJECTED_NAME).is_file() else []
    rejected = [Rejection(**row) for row in listed]
    cleaned = sum("source_text" in (item.custom or {}) for item in source.items)
    return Source(folder.resolve().name, source.items, rejected + source.rejected, {"texts with a remark in brackets taken out": cleaned})


def embedded_folder() -> Path:
    """The English prompts that come with a checkout; a UserError where kalle is installed without one."""
    folder = Path(__file__).resolve().parents[4] / "recipes" / "quickstart" / "corpus"
    if not (folder / TRANSCRIPTS_NAME).is_file():
        raise UserError(f"no embedded corpus: '{folder}' is in a checkout only; name the folder (corpus)")
    return folder


def read_folder(folder: Path, speaker: str = UNKNOWN_SPEAKER, language: str = "") -> Source:
    """Every audio file below ``folder`` with the text of x.txt, or x.lab, beside it.

    x.wav.txt, and other capitals such as B.WAV beside b.txt, are taken where only one file can be meant, and counted in the notes.
    ``speaker`` "folders" names the speaker of an item after the folder it lies in. An audio file without a text is rejected as "no text", a
    text without audio as "missing", a folder that may not be looked into as "unreadable". Raises UserError when there
    is no audio at all.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', expected a folder of audio and text files; check the path")
    shut: list[OSError] = []
    walked = os.walk(folder, onerror=shut.append)
    paths = sorted(path for root, _, names in walked for name in names if is_file(path := Path(root, name)))
    audio = [path for path in paths if path.suffix.lower() in AUDIO_SUFFIXES]
    if not audio:
        raise UserError(f"no audio in '{folder}': expected x.wav, x.flac, x.mp3 … beside x.txt; check the path")
    items: list[SourceItem] = []
    rejected = [Rejection(str(error.filename), str(error.filename), "unreadable", f"a folder: {error.strerror}") for error in shut]
    # Names in capitals come first in the order, so that x.txt wins over x.TXT.
    texts = {(path.with_suffix(""), path.suffix.lower()): path for path in paths if path.suffix.lower() in TEXT_SUFFIXES}
    exact = {
        path: next((texts[key] for suffix in TEXT_SUFFIXES if (key := (path.with_suffix(""), suffix)) in texts), None) for path in audio
    }
    nearly = _texts_of_other_names([path for path in audio if exact[path] is None], set(texts.values()) - set(exact.values()))
    for path in audio:
        name = path.relative_to(folder).with_suffix("").as_posix()
        beside = exact[path] or nearly.get(path)
        try:
            text = None if beside is None else read_text_line(beside)
        except (UserError, OSError) as error:
            rejected.append(Rejection(name, str(path), "no text", str(error)))
            continue
        if text is None:
            rejected.append(Rejection(name, str(path), "no text", f"no {path.stem}.txt or {path.stem}.lab beside it"))
        else:
            who = path.resolve().parent.name if speaker == "folders" else speaker
            items.append(SourceItem(name, path.resolve(), text, who, language))
    stems = {path.with_suffix("") for path in audio}
    others = {path.with_suffix(""): path.name for path in paths if path.suffix.lower() not in TEXT_SUFFIXES}
    for path in paths:
        if path.suffix.lower() in TEXT_SUFFIXES and path.with_suffix("") not in stems and path not in nearly.values():
            name = path.relative_to(folder).with_suffix("").as_posix()
            other = f"; '{others[stem]}' has no suffix of an audio file" if (stem := path.with_suffix("")) in others else ""
            rejected.append(Rejection(name, str(path), "missing", f"a text without an audio file of the same name{other}"))
    notes: dict[str, object] = {"texts of a name in other capitals or with the suffix of the audio": len(nearly)} if nearly else {}
    return collected("the folder", items, rejected, notes, folder.resolve().name)


def _texts_of_other_names(audio: Sequence[Path], texts: Iterable[Path]) -> dict[Path, Path]:
    """The text of each recording that is the only one for it by its name with the suffix of the audio or in other capitals."""
    owners: dict[tuple[Path, str], list[Path]] = {}
    for path in audio:
        for name in {path.name.casefold(), path.stem.casefold()}:
            owners.setdefault((path.parent, name), []).append(path)
    found: dict[Path, list[Path]] = {}
    for text in texts:
        owner = owners.get((text.parent, text.stem.casefold()), [])
        if len(owner) == 1:
            found.setdefault(owner[0], []).append(text)
    return {path: of_it[0] for path, of_it in found.items() if len(of_it) == 1}


def read_jsonl_corpus(path: Path, speaker: str = UNKNOWN_SPEAKER, language: str = "") -> Source:
    """An object a line, or one array of them, with the keys of `COLUMNS`: audio, text; id, speaker, language, split, start, duration, end.

    Audio paths are relative to the file. ``speaker`` and ``language`` stand in where a line has none. With a start (seconds) an item is
    the part of its recording from there, ``duration`` long or to ``end``, else to the recording's; a duration alone says nothing that the
    file doesn't. A line that is no JSON object or has impossible times is rejected as "bad entry", one without text as "no text", one
    without audio as "missing". `KEPT_KEYS` are kept, and any further key is counted in the notes. Raises UserError when no line has
    audio, and for an unknown split.
    """
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a JSONL file; check the path")
    items: list[SourceItem] = []
    rejected: list[Rejection] = []
    ignored: Counter[str] = Counter()
    keys: dict[str, None] = {}
    lines = read_lines(path)
    entries = _entries_of_array(lines)
    for number in range(1, 1 + len(lines if entries is None else entries)):
        if entries is None and not lines[number - 1].strip():
            continue
        try:
            row = parse_json(lines[number - 1]) if entries is None else entries[number - 1]
            keys |= dict.fromkeys(row)
            items.append(_item(path, row, f"line-{number}", speaker, language))
        except _BadEntry as error:
            rejected.append(Rejection(f"line-{number}", "", error.reason, f"line {number}: {error}"))
        except ValueError as error:
            if isinstance(error, UserError):
                raise
            rejected.append(Rejection(f"line-{number}", "", "bad entry", f"line {number}: {error}; expected one JSON object"))
        else:
            known = {_named(row, kind) for kind in COLUMNS}
            ignored.update(key for key, value in row.items() if key not in known and key not in KEPT_KEYS and not _is_absent(value))
    if rejected and not items:
        got = f"; the keys are {_shown(', '.join(list(keys)[:12]), 200)}" if keys else ""
        expected = f"expected objects with {', '.join(COLUMNS['audio'][:6])} … for the recording and {', '.join(COLUMNS['text'][2:6])} …"
        remedy = "rename the key of the path to audio" if keys else "write an object a line, or an array of objects"
        raise UserError(f"no line with a recording in '{path}': {rejected[0].detail}{got}; {expected}; {remedy}")
    notes: dict[str, object] = {f"keys not used ({key})": count for key, count in sorted(ignored.items())}
    return collected("the list", items, rejected, notes, path.stem)


def _entries_of_array(lines: Sequence[str]) -> list[dict[str, Any]] | None:
    """The objects of a list that is one JSON array; None for any other, whose lines are objects."""
    first = next((line.strip() for line in lines if line.strip()), "")
    if not first.startswith("["):
        return None
    try:
        found = json.loads("\n".join(lines), strict=False)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(entry, dict) for entry in found) else None


class _BadEntry(ValueError):
    """An entry of a list that gives no item."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def _named(row: Mapping[str, Any], kind: str) -> str | None:
    """The key of ``row`` that holds ``kind``."""
    # A time that is NaN is refused: without it the item would be more of its recording than its text.
    is_time = kind in ("start", "duration", "end")
    return next((name for name in COLUMNS[kind] if not (row.get(name) in (None, "") if is_time else _is_absent(row.get(name)))), None)


def _is_absent(value: Any) -> bool:
    """Whether a cell says nothing: pandas writes NaN into what it has no value for."""
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _item(path: Path, row: Mapping[str, Any], number: str, speaker: str, language: str) -> SourceItem:
    """The item of one row with the keys of `COLUMNS`; _BadEntry when there is none."""
    values = {kind: None if (name := _named(row, kind)) is None else row[name] for kind in COLUMNS}
    found = values["audio"].get("path") if isinstance(values["audio"], dict) else values["audio"]
    if not isinstance(found, str) or not found:
        raise _BadEntry("missing", "it has no audio")
    text = values["text"]
    for kind in ("text", "id", "speaker", "language"):
        if isinstance(values[kind], bool) or not isinstance(values[kind], str | int | float | None):
            raise _BadEntry("bad entry", f"its {kind} is a {type(values[kind]).__name__}, expected a string")
    start, seconds = _part_of(values)
    own = values["id"]
    # Parts of one recording are different items, also where a list gives them all its id.
    is_part = start != 0 or seconds is not None
    part = f"@{start:.3f}" if is_part and own is None else ""
    custom = {key: row[key] for key in KEPT_KEYS if is_plain(row.get(key))}
    return SourceItem(
        (audio_name(found) if own is None else str(own)) + part,
        _located(path, found),
        "" if text is None else str(text),
        text_or(values["speaker"], speaker),
        text_or(values["language"], language),
        _split_of(values["split"], path, number),
        start,
        seconds,
        custom=custom or None,
        origin=f"{found}@{start}+{seconds}" if is_part else "",
    )


def _part_of(values: Mapping[str, Any]) -> tuple[float, float | None]:
    """Start and duration in seconds of an entry that names a part; 0 and None for a whole recording."""
    if values["start"] is None:
        return 0.0, None
    times = {kind: values[kind] for kind in ("start", "duration", "end") if values[kind] is not None}
    try:
        numbers = {kind: float(value) for kind, value in times.items()}
    except (TypeError, ValueError, OverflowError):
        numbers = {}
    if "end" in numbers and "duration" not in numbers:
        numbers["duration"] = numbers["end"] - numbers["start"]
    if not numbers or not all(math.isfinite(number) for number in numbers.values()) or numbers.get("duration", 1) <= 0:
        raise _BadEntry("bad entry", f"got {_shown(str(times), 100)}, expected start and duration in seconds")
    return numbers["start"], numbers.get("duration")


def _split_of(split: Any, path: Path, number: str) -> str | None:
    if split is None:
        return None
    named = split if split in SPLITS else split_of_part(str(split)) or ("train" if str(split).lower().startswith("train") else None)
    if named is None:
        raise UserError(f"unknown split in '{path}' {number}: got '{_shown(str(split))}', expected one of {', '.join(SPLITS)}; change it")
    return str(named)


def _located(table: Path, audio: str) -> Path:
    """Where an audio cell points: relative to the table; also NAME.wav there or in wavs/, or in Common Voice's clips/."""
    here = table.resolve().parent
    given = here / audio
    beside = (here / "wavs" / f"{audio}.wav", here / "wavs" / audio, here / "clips" / audio)
    candidates = [given, given.with_name(given.name + ".wav"), *beside] if given.name else []
    return next((candidate for candidate in candidates if is_file(candidate)), given)


def read_csv_corpus(
    path: Path, delimiter: str = "", speaker: str = UNKNOWN_SPEAKER, language: str = "", columns: Sequence[str] = ()
) -> Source:
    """A table with a header line whose columns are named as in `COLUMNS`, in any order; or ``audio|text`` rows without a header.

    ``delimiter`` is one of `DELIMITERS`; when empty it is that of Excel's first line ``sep=;``, or found by itself. Quoted cells are read
    as RFC 4180 has them; where the quotes don't fit, they are part of the text. A quoted cell that seems to hold further rows is in
    doubt: the quotes are part of the texts if every line is a row of its own then, which is noted, and else the table is refused.
    ``columns`` names the columns of a table without a header, "-" for those that are not used; a header that is there all the same is
    skipped, and noted. LJSpeech's three columns are known, with the second as the text. An audio cell without a suffix means that name
    with .wav, there or in wavs/. A row of another width than the others is rejected. Raises UserError for an empty file, for a header
    without audio or text, and for a table whose columns or quotes are in doubt.
    """
    if not path.is_file():
        raise UserError(f"file not found: got '{path}', expected a CSV file; check the path")
    lines = read_lines(path)
    stated = _EXCEL_DELIMITER.fullmatch(lines[0])
    # Blank, so that the others keep their numbers.
    content = "\n".join(["", *lines[1:]] if stated else lines)
    if not content.strip():
        raise UserError(f"no lines in '{path}': expected audio|text; fill it")
    delimiter = delimiter or (stated[1] if stated else "")
    delimiter = {"tab": "\t", "\\t": "\t"}.get(delimiter, delimiter) or _delimiter(path, content)
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise UserError(f"delimiter: got '{delimiter}', expected one character, such as , or tab; correct it")
    rows = _rows(content, delimiter)
    if not rows:
        raise UserError(f"no lines in '{path}': every cell is empty, expected audio|text; fill it")
    notes: dict[str, object] = {}
    swallowing = _swallowing_cell(path, rows, delimiter)
    if swallowing:
        rows = _line_by_line(path, content, delimiter, swallowing)
        notes["quotes taken as part of the texts, from"] = swallowing
    all_rows = rows
    if columns:
        names: Sequence[str] = _given(columns)
        if "audio" in names and _is_header_of(path, rows, names.index("audio")):
            notes[f"first row skipped as a header ({_shown(', '.join(rows[0][1]))})"] = f"line {rows[0][0]}"
            rows = rows[1:]
    else:
        header = _header(rows[0][1]) or _header_without_audio(path, rows)
        names = header or _columns(path, rows)
        rows = rows[1:] if header else rows
    for kind in ("audio", "text"):
        if kind not in names:
            got = _shown(", ".join(names), 200)
            raise UserError(
                f"no {kind} column in '{path}': got the columns {got} ({_first(all_rows)}); name one of them {kind}, or set columns"
            )
    items: list[SourceItem] = []
    rejected: list[Rejection] = []
    for number, cells in rows:
        # A missing cell at the end is an empty one; one too many means that the text was split.
        row = {name: cell.strip() for name, cell in zip(names, cells, strict=False)}
        try:
            if len(cells) > len(names):
                raise _BadEntry("bad entry", f"got {len(cells)} cells, expected {len(names)}; quote the cells with '{delimiter}' in them")
            items.append(_item(path, row, f"line-{number}", speaker, language))
        except _BadEntry as error:
            rejected.append(Rejection(f"line-{number}", row.get("audio", ""), error.reason, f"line {number}: {error}"))
    return collected("the table", items, rejected, {"columns": ", ".join(names), **notes}, path.stem)


def _rows(content: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """Number of the last line and cells of each row that is not empty."""
    for quoting in (csv.QUOTE_MINIMAL, csv.QUOTE_NONE):
        reader = csv.reader(io.StringIO(content, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        try:
            return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
        except csv.Error as error:
            problem = error
    raise UserError(f"not a table: line {reader.line_num} ({problem}); expected rows of cells with '{delimiter}' between; correct it")


def _swallowing_cell(path: Path, rows: Sequence[tuple[int, list[str]]], delimiter: str) -> str:
    """The place of the first cell that seems to hold further rows, as "line 1 to 3"; empty when there is none.

    Such a cell goes over several lines and holds the delimiter: a bar or a tab is no part of a text. A comma may be, so that one of the
    later lines must name a recording too.
    """
    for number, cells in rows:
        for cell in (cell for cell in cells if "\n" in cell and delimiter in cell):
            later = [part.strip() for line in cell.split("\n")[1:] if delimiter in line for part in line.split(delimiter)]
            if delimiter not in ",;" or any(_is_recording(path, part) for part in later):
                return f"line {number - sum(other.count(chr(10)) for other in cells)} to {number}"
    return ""


def _is_recording(path: Path, cell: str) -> bool:
    """Whether ``cell`` of the table ``path`` is the name of a recording, of one that is missing too."""
    return bool(cell) and (Path(cell).suffix.lower() in AUDIO_SUFFIXES or is_file(_located(path, cell)))


def _line_by_line(path: Path, content: str, delimiter: str, swallowing: str) -> list[tuple[int, list[str]]]:
    """The rows of a table whose quotes mean nothing: each line is one, and all are equally wide; else a UserError that shows them."""
    rows = [(number, line.split(delimiter)) for number, line in enumerate(content.split("\n"), start=1)]
    rows = [(number, cells) for number, cells in rows if any(cell.strip() for cell in cells)]
    if len({len(cells) for _, cells in rows}) == 1:
        return rows
    first = next(at for at, (number, _) in enumerate(rows) if number >= int(swallowing.split()[1]))
    raise UserError(
        f"quotes in doubt in '{path}': {swallowing} would be one cell ({_first(rows[first:])}), expected a row a line; "
        "close the quotation mark on its line, or double those that belong to a text"
    )


def _delimiter(path: Path, content: str) -> str:
    """The delimiter by which the first rows have a header, else by which they name recordings, else the first that they hold."""
    start = "\n".join(content.split("\n")[: 2 * _LOOKED_AT])
    tables = {delimiter: _rows(start, delimiter)[:_LOOKED_AT] for delimiter in DELIMITERS if delimiter in start}
    for delimiter, rows in tables.items():
        if rows and {"audio", "text"} <= set(_header(rows[0][1]) or ()):
            return delimiter
    for delimiter, rows in tables.items():
        if any(len(cells) > 1 and any(is_file(_located(path, cell.strip())) for cell in cells if cell.strip()) for _, cells in rows):
            return delimiter
    if not tables:
        raise UserError(f"one column in '{path}': got '{_shown(start)}', expected audio|text a row; set delimiter")
    return next(iter(tables))


def _header(cells: Sequence[str]) -> list[str] | None:
    """The kind of each column, its own name where that is none of `COLUMNS`; None when the row is no header with audio."""
    names, kinds = _kinds(cells)
    # Of two columns for one thing the better name counts.
    for kind in COLUMNS.keys() & {kind for kind in kinds if kinds.count(kind) > 1}:
        best = min((at for at, other in enumerate(kinds) if other == kind), key=lambda at: COLUMNS[kind].index(names[at]))
        kinds = [names[at] + " (not used)" if other == kind and at != best else other for at, other in enumerate(kinds)]
    if "id" in kinds and "audio" not in kinds and "text" in kinds:
        kinds[kinds.index("id")] = "audio"
    return kinds if "audio" in kinds else None


def _kinds(cells: Sequence[str]) -> tuple[list[str], list[str]]:
    """The cells as names, and the kind of each, the name itself where it is none of `COLUMNS`."""
    names = ["_".join(cell.strip().lower().replace("-", " ").split()) for cell in cells]
    return names, [next((kind for kind, known in COLUMNS.items() if name in known), name) for name in names]


def _header_without_audio(path: Path, rows: Sequence[tuple[int, list[str]]]) -> list[str] | None:
    """The kinds of a first row that names columns but none with recordings; None where it may be a row like the others.

    One known name may be the text of a recording: then none of the first rows begins with a file.
    """
    cells = rows[0][1]
    kinds = _kinds(cells)[1]
    known = set(kinds) & COLUMNS.keys()
    if not known or any(is_file(_located(path, cell.strip())) for cell in cells if cell.strip()):
        return None
    begins = any(is_file(_located(path, row[0].strip())) for _, row in rows[:_LOOKED_AT] if row and row[0].strip())
    return None if len(known) == 1 and begins else kinds


def _is_header_of(path: Path, rows: Sequence[tuple[int, list[str]]], at: int) -> bool:
    """Whether the first row can be no data: its cell ``at`` names no recording but a column, or no file where all others do.

    A missing recording in the first row, named without a suffix, is so taken for a header; the notes say what was skipped.
    """
    cells = [row[at].strip() if at < len(row) else "" for _, row in rows]
    if len(cells) < 2 or _is_recording(path, cells[0]):
        return False
    return _kinds(cells[:1])[1] == ["audio"] or (
        not Path(cells[0]).suffix and all(cell and is_file(_located(path, cell)) for cell in cells[1:])
    )


def _given(columns: Sequence[str]) -> list[str]:
    names = [name.strip() for name in columns]
    unknown = [name for name in names if name not in (*COLUMNS, "-")]
    if unknown or len(set(names) - {"-"}) < len([name for name in names if name != "-"]):
        raise UserError(f"columns: got {','.join(names)}, expected each of {', '.join(COLUMNS)} at most once and - for others; correct it")
    return names


def _columns(path: Path, rows: Sequence[tuple[int, list[str]]]) -> list[str]:
    """The columns of a table without a header: audio and text, or LJSpeech's three. UserError when they are in doubt."""
    widths = Counter(len(cells) for _, cells in rows)
    width = widths.most_common(1)[0][0]
    uneven = sum(count for other, count in widths.items() if other > width) / len(rows)
    if width == 2 and uneven <= _MOST_UNEVEN:
        return ["audio", "text"]
    looked_at = [cells for _, cells in rows[:_LOOKED_AT] if len(cells) == width]
    if width == 3 and uneven <= _MOST_UNEVEN and sum(alike(cells[1], cells[2]) for cells in looked_at) > len(looked_at) / 2:
        return ["audio", "text", "text_normalized (not used)"]
    counts = " or ".join(str(count) for count in sorted(widths))
    raise UserError(
        f"columns in doubt in '{path}': got {counts} of them without a header ({_first(rows)}), "
        "expected audio and text; set columns, such as audio,speaker,text, or write a header line"
    )


def _first(rows: Sequence[tuple[int, list[str]]]) -> str:
    """The first rows as they are understood, for a message."""
    return "; ".join(
        f"line {number}: " + ", ".join(f"{at}='{_shown(cell, 40)}'" for at, cell in enumerate(cells, 1))
        for number, cells in rows[:_SHOWN_ROWS]
    )


def _shown(text: str, most: int = 60) -> str:
    """``text`` as it may stand in a message of one line."""
    return printable(" ".join(text.split()))[:most]
