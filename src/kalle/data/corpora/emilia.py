"""Emilia and what follows its form: x.json beside x.mp3 in folders, in WebDataset tars, or lists as its first release had them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalle.data.corpora.inside import TarMember
from kalle.data.corpora.items import AUDIO_SUFFIXES, Rejection, Source, SourceItem
from kalle.data.corpora.layout import collected
from kalle.data.corpora.manifests import from_cuts, language_code, plain_fields
from kalle.data.prepare_files import safe_id
from kalle.errors import UserError

_LAYOUT = "expected x.json beside x.mp3 at any depth, or *.tar with such pairs, or raw/EN/*.jsonl (Emilia)"
_TEXT_KEYS = ("text", "transcript", "caption")
_KEPT = ("dnsmos", "emotion", "phone_count")


def read_emilia(folder: Path, language: str = "") -> Source:
    """Clips with their JSON: text, speaker, language; dnsmos is kept. ``folder`` may be one tar. Nothing of a tar is unpacked.

    A clip without JSON is rejected as "no text", JSON without a clip as "missing". Raises UserError for another layout and for a
    compressed tar, in which nothing can be found without reading it all.
    """
    tars = [folder] if folder.is_file() else sorted(folder.rglob("*.tar"))
    rejected: list[Rejection] = []
    items: list[SourceItem] = []
    if (folder / "raw").is_dir() and any(folder.glob("raw/*/*.jsonl")):
        items += _lists(folder, rejected)
    elif folder.is_dir():
        items += _folder(folder, language, rejected)
    elif not folder.is_file():
        raise UserError(f"not found: got '{folder}', {_LAYOUT}; check the path")
    for tar in tars:
        items += _tar(tar.resolve(), language, rejected)
    if not items and not rejected:
        raise UserError(f"not the layout of Emilia: got '{folder}', {_LAYOUT}; name the folder that holds these")
    return collected("Emilia", items, rejected, {"tars": len(tars)} if tars else None)


def _item(key: str, audio: Path, content: bytes, language: str, inside: TarMember | None) -> SourceItem:
    """Raises ValueError for what is no JSON object."""
    row = json.loads(content)
    if not isinstance(row, dict):
        raise ValueError(f"holds a {type(row).__name__}")
    text = next((str(row[name]) for name in _TEXT_KEYS if row.get(name)), "")
    spoken = language_code(str(row.get("language") or "")) or language
    custom = plain_fields({name: row.get(name) for name in _KEPT})
    return SourceItem(safe_id(key), audio, text, str(row.get("speaker") or "unknown"), spoken, inside=inside, custom=custom)


def _folder(folder: Path, language: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    paths: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() in AUDIO_SUFFIXES and paths.setdefault(path.with_suffix(""), path.resolve()) != path.resolve():
            rejected.append(Rejection(safe_id(path.stem), str(path), "duplicate id", f"the name of '{paths[path.with_suffix('')]}'"))
    for path in sorted(folder.rglob("*.json")):
        audio = paths.pop(path.with_suffix(""), None)
        if audio is None:
            rejected.append(Rejection(safe_id(path.stem), "", "missing", f"no audio beside '{path}'"))
            continue
        try:
            yield _item(path.stem, audio, path.read_bytes(), language, None)
        except ValueError as error:
            rejected.append(Rejection(safe_id(path.stem), str(audio), "no text", f"'{path}' is not a JSON object ({error})"))
    for stem, audio in paths.items():
        rejected.append(Rejection(safe_id(stem.name), str(audio), "no text", f"no {stem.name}.json beside it"))


def _lists(folder: Path, rejected: list[Rejection]) -> Iterator[SourceItem]:
    """The first release, by lhotse's recipe; lines of the lists that it returns no cut for are "missing"."""
    from lhotse.recipes.emilia import prepare_emilia
    from lhotse.serialization import load_jsonl

    from kalle.data.corpora.recipes import quietly

    for path in sorted(folder.glob("raw/*/")):
        arguments = {"lang": path.name.lower(), "num_jobs": 1}
        cuts = quietly(prepare_emilia, "Emilia", folder, "raw/EN/*.jsonl and the clips these name", **arguments)
        found = {cut.id: cut for cut in cuts}
        yield from from_cuts(cuts, None, rejected)
        for table in sorted(path.glob("*.jsonl")):
            for row in load_jsonl(table):
                name = Path(str(row.get("wav"))).stem
                if name not in found:
                    rejected.append(Rejection(safe_id(name), "", "missing", f"named in '{table}', but there is no such clip"))


@dataclass
class _Pair:
    content: bytes | None = None
    audio: list[TarMember] = field(default_factory=list)


def _tar(path: Path, language: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    """The pairs of one archive. Its headers and JSON are read, its audio is only located."""
    pairs: dict[str, _Pair] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                name = Path(member.name)
                if not member.isfile() or name.name.startswith("."):
                    continue
                key = str(name.with_suffix(""))
                if name.suffix.lower() == ".json":
                    pairs.setdefault(key, _Pair()).content = _content(archive, member)
                elif name.suffix.lower() in AUDIO_SUFFIXES:
                    pairs.setdefault(key, _Pair()).audio.append(TarMember(member.name, member.offset_data, member.size))
                archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"cannot read '{path}' ({error}); expected a whole tar that is not compressed; fetch or unpack it again") from None
    for key, pair in pairs.items():
        yield from _paired(path, key, pair, language, rejected)


def _content(archive: tarfile.TarFile, member: Any) -> bytes:
    file = archive.extractfile(member)
    assert file is not None, member.name
    return file.read()


def _paired(path: Path, key: str, pair: _Pair, language: str, rejected: list[Rejection]) -> Iterator[SourceItem]:
    name = Path(key).name
    if not pair.audio:
        rejected.append(Rejection(safe_id(name), f"{path}:{key}", "missing", "JSON without audio of the same name"))
        return
    if pair.content is None:
        rejected.append(Rejection(safe_id(name), f"{path}:{pair.audio[0].name}", "no text", "audio without JSON of the same name"))
        return
    for extra in pair.audio[1:]:
        rejected.append(Rejection(safe_id(name), f"{path}:{extra.name}", "duplicate id", f"the id of {pair.audio[0].name}"))
    try:
        yield _item(name, path, pair.content, language, pair.audio[0])
    except ValueError as error:
        rejected.append(Rejection(safe_id(name), f"{path}:{pair.audio[0].name}", "no text", f"its JSON is not an object ({error})"))
