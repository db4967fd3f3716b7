"""Kaldi data folders: wav.scp, text, and optionally segments, utt2spk, utt2lang.

Read here and not by ``lhotse.kaldi``, which runs the commands of a wav.scp, drops recordings that it cannot read, and ends at an
utterance without a text.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from kalle.data.corpora.items import Rejection, Source, SourceItem
from kalle.data.corpora.layout import collected
from kalle.data.corpora.manifests import split_of_part
from kalle.data.prepare_files import read_lines, safe_id
from kalle.errors import UserError

_LAYOUT = "expected wav.scp (recording path) and text (utterance words), there or in train/, dev/ and test/"


def read_kaldi(folder: Path, speaker: str = "unknown", language: str = "") -> Source:
    """A Kaldi data folder, or a folder of several, of which those named dev… and test… are valid and test.

    Relative paths count from the folder, or from the working directory where the file is only there. A wav.scp entry that is a command
    is rejected as "unreadable": nothing in it is run. Raises UserError for another layout or a line of it that cannot be.
    """
    if not folder.is_dir():
        raise UserError(f"folder not found: got '{folder}', {_LAYOUT}; check the path")
    below = sorted(path.parent for path in folder.glob("*/wav.scp"))
    parts = [folder] if (folder / "wav.scp").is_file() else below
    if not parts or not all((part / "text").is_file() for part in parts):
        raise UserError(f"not a Kaldi data folder: got '{folder}', {_LAYOUT}; name the folder that holds these")
    rejected: list[Rejection] = []
    items = [item for part in parts for item in _part(part, speaker, language, rejected)]
    return replace(collected("Kaldi", items, rejected), name=folder.resolve().name)


def _part(folder: Path, speaker: str, language: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    recordings, texts = _mapping(folder / "wav.scp"), _mapping(folder / "text")
    speakers, languages = _mapping(folder / "utt2spk"), _mapping(folder / "utt2lang")
    split = split_of_part(folder.resolve().name)
    table = folder / ("segments" if (folder / "segments").is_file() else "wav.scp")
    segments = _segments(table) if table.name == "segments" else {name: (name, 0.0, None) for name in recordings}
    for name, (recording, start, seconds) in segments.items():
        place = recordings.get(recording)
        if place is None:
            rejected.append(Rejection(safe_id(name), "", "missing", f"no recording '{recording}' in wav.scp"))
        elif place.endswith("|"):
            rejected.append(Rejection(safe_id(name), place, "unreadable", "wav.scp has a command; run it and name the file it makes"))
        elif name not in texts:
            rejected.append(Rejection(safe_id(name), place, "no text", "no line for it in text"))
        else:
            who, spoken = speakers.get(name) or speaker, languages.get(name) or language
            yield SourceItem(safe_id(name), _located(folder, place), texts[name], who, spoken, split, start, seconds)
    for name in sorted(texts.keys() - segments.keys()):
        rejected.append(Rejection(safe_id(name), "", "missing", f"in text, but not in {table.name}"))


def _mapping(path: Path) -> dict[str, str]:
    """First word -> rest of a line; empty for a file that is not there."""
    if not path.is_file():
        return {}
    lines = (line.split(maxsplit=1) for line in read_lines(path) if line.strip())
    return {words[0]: words[1].strip() if len(words) > 1 else "" for words in lines}


def _segments(path: Path) -> dict[str, tuple[str, float, float | None]]:
    """Utterance -> recording, start and duration in seconds; an end of -1 is the end of the recording."""
    found: dict[str, tuple[str, float, float | None]] = {}
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            name, recording, start, end = line.split()[:4]
            seconds = None if float(end) == -1 else round(float(end) - float(start), 6)
            found[name] = (recording, float(start), seconds)
        except ValueError:
            raise UserError(f"cannot read '{path}' line {number}: got '{line}', expected utterance recording start end; mend it") from None
    return found


def _located(folder: Path, place: str) -> Path:
    here = folder.resolve() / place
    return here if here.is_file() or not Path(place).is_file() else Path(place).resolve()
