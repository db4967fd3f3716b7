"""Readers for a corpus folder with transcripts.jsonl, and for a folder of audio files with a text file beside each."""

from __future__ import annotations

from pathlib import Path

from kalle.data.corpora.items import AUDIO_SUFFIXES, Rejection, Source, SourceItem, unique
from kalle.data.corpora.tables import read_jsonl_corpus
from kalle.data.prepare_files import read_jsonl, read_lines, safe_id
from kalle.errors import UserError

TRANSCRIPTS_NAME = "transcripts.jsonl"
REJECTED_NAME = "rejected.jsonl"
TEXT_SUFFIXES = (".txt", ".lab")


def read_embedded(folder: Path) -> Source:
    """A folder with transcripts.jsonl (see `read_jsonl_corpus`) and, when its builder left items out, rejected.jsonl."""
    if not (folder / TRANSCRIPTS_NAME).is_file():
        raise UserError(f"no corpus in '{folder}': expected {TRANSCRIPTS_NAME} in it; give --corpus DIR or run `kalle prepare asterisk`")
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
        raise UserError(f"no embedded corpus: '{folder}' is in a checkout only; give --corpus DIR or run `kalle prepare asterisk`")
    return folder
