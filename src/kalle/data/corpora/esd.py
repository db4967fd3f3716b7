"""ESD, the emotional speech dataset: ten Mandarin and ten English speakers, five emotions each."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from kalle.data.corpora.items import Rejection, Source, SourceItem
from kalle.data.corpora.layout import collected, find_root
from kalle.data.prepare_files import safe_id
from kalle.errors import UserError
from kalle.text.languages import detect_language

EMOTIONS = {
    **{"angry": "angry", "happy": "happy", "neutral": "neutral", "sad": "sad", "surprise": "surprise"},
    **{"生气": "angry", "愤怒": "angry", "快乐": "happy", "开心": "happy", "中立": "neutral", "伤心": "sad", "惊喜": "surprise"},
}
SPLITS = {"train": "train", "evaluation": "valid", "test": "test"}
_LAYOUT = "0001/0001.txt (id, text, emotion) and 0001/Angry/*.wav or 0001/Angry/{train,evaluation,test}/*.wav, and so on to 0020"


def read_esd(folder: Path) -> Source:
    """Every wav that a speaker's list names, its emotion kept; train, evaluation and test folders, where there are some, are the split.

    The lists are in UTF-8, UTF-16 or GB 18030. Raises UserError for another layout or encoding.
    """
    root = find_root(folder, ("[0-9][0-9][0-9][0-9]/[0-9][0-9][0-9][0-9].txt",), "ESD", _LAYOUT)
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    for speaker in sorted(root.glob("[0-9][0-9][0-9][0-9]")):
        items += _speaker(speaker, rejected)
    return collected("ESD", items, rejected)


def _speaker(folder: Path, rejected: list[Rejection]) -> Iterator[SourceItem]:
    audio = {path.stem: path.resolve() for path in sorted(folder.rglob("*.wav")) if not path.name.startswith("._")}
    table = folder / f"{folder.name}.txt"
    rows = _table(table) if table.is_file() else {}
    language = detect_language(" ".join(text for text, _ in rows.values()))
    for name, (text, label) in rows.items():
        path = audio.pop(name, None)
        if path is None:
            rejected.append(Rejection(safe_id(name), "", "missing", f"named in {table.name}, but there is no such wav"))
            continue
        places = [part.lower() for part in path.relative_to(folder.resolve()).parts[:-1]]
        emotion = next((EMOTIONS[word] for word in [*places, label.lower()] if word in EMOTIONS), label)
        split = next((SPLITS[place] for place in places if place in SPLITS), None)
        yield SourceItem(safe_id(name), path, text, folder.name, language, split, custom={"emotion": emotion})
    for name, path in audio.items():
        rejected.append(Rejection(safe_id(name), str(path), "no text", f"no line for it in {table.name}"))


def _table(path: Path) -> dict[str, tuple[str, str]]:
    """Id -> text and label."""
    rows = {}
    for line in _decoded(path).splitlines():
        cells = [cell.strip() for cell in line.split("\t")]
        if cells[0]:
            rows[cells[0]] = (cells[1] if len(cells) > 1 else "", cells[2] if len(cells) > 2 else "")
    return rows


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    encodings = ("utf-16",) if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ("utf-8-sig", "gb18030")
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError:
            continue
    raise UserError(f"cannot read '{path}': got an unknown encoding, expected UTF-8, UTF-16 or GB 18030; convert it with iconv")
