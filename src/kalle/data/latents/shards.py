"""Shard folders: lhotse Shar shards of posteriors, or of waveforms, written so that an incomplete shard is never taken for a complete one.

OUT/SPLIT/cuts.000000.jsonl.gz      lhotse cuts: id, text, speaker, language, number of frames
OUT/SPLIT/latents.000000.tar        (T, 2D) float16 of every cut: mean, then log_std
OUT/SPLIT/speaker_mels.000000.tar   optional, (80, F) float16 log-mels for a speaker encoder
OUT/SPLIT/recording.000000.tar      instead of both, FLAC (`kalle.data.latents.waves`)
OUT/progress/SPLIT.000000.json      written last: fingerprint of what went in, size of each file
OUT/index.SPLIT.safetensors         where everything lies, written when every shard is there
OUT/info.json, OUT/.completed       written after it
"""

from __future__ import annotations

import contextlib
import gzip
import json
import logging
import os
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from lhotse.cut import Cut, MonoCut
from lhotse.shar import SharWriter
from lhotse.supervision import SupervisionSegment
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from kalle.checkpoint import read_json, write_json
from kalle.data.corpus.cuts import COMPLETED_NAME
from kalle.data.latents.storage import Folder
from kalle.data.latents.table import Ragged, Table, Texts, array_of, numbered
from kalle.errors import UserError
from kalle.files import parse_json, write_atomic
from kalle.gaussian import DiagGaussian

LATENTS = "latents"
SPEAKER_MELS = "speaker_mels"
INFO_NAME = "info.json"


class Record(Protocol):
    """The source of a shard."""

    def to_cut(self) -> Cut:
        """The cut, what belongs into the shard in memory."""
        ...


@dataclass(frozen=True)
class LatentRecord:
    """One encoded utterance on its way to a shard."""

    id: str
    text: str
    speaker: str | None
    language: str | None
    sources: tuple[str, ...]
    """Ids of the cuts it was made of."""
    samples: int
    sample_rate_hz: int
    latents: np.ndarray
    """(T, 2D) float16: mean, then log_std."""
    speaker_mels: np.ndarray | None = None
    """(80, F) float16."""

    def to_cut(self) -> MonoCut:
        """A cut without audio that carries the arrays in memory."""
        seconds = self.samples / self.sample_rate_hz
        supervision = SupervisionSegment(
            id=self.id, recording_id=self.id, start=0, duration=seconds, text=self.text, speaker=self.speaker, language=self.language
        )
        custom = {"num_frames_latent": len(self.latents), "sources": list(self.sources)}
        cut = MonoCut(id=self.id, start=0, duration=seconds, channel=0, supervisions=[supervision], custom=custom)
        cut = cut.attach_tensor(LATENTS, self.latents)
        return cut if self.speaker_mels is None else cut.attach_tensor(SPEAKER_MELS, self.speaker_mels)


class ShardFolder:
    """The shards of one split of the shard folder ``root``."""

    def __init__(self, root: Path, split: str, fields: Sequence[str] = (LATENTS,), form: str = "numpy", command: str = "encode") -> None:
        """``fields`` name the tars; ``form`` is what lhotse calls the format of their members. ``command`` is for messages."""
        self.root, self.split, self.fields, self.form, self.command = root, split, tuple(fields), form, command

    def files(self, number: int) -> list[Path]:
        """The files of one shard, in the order in which they are moved into place."""
        folder = self.root / self.split
        return [folder / f"{field}.{number:06d}.tar" for field in self.fields] + [folder / f"cuts.{number:06d}.jsonl.gz"]

    def record_path(self, number: int) -> Path:
        """The progress file of one shard."""
        return self.root / "progress" / f"{self.split}.{number:06d}.json"

    def finished(self, number: int, fingerprint: str) -> dict[str, Any] | None:
        """The record of a complete shard; None when the shard has to be written.

        A UserError when a complete shard was made from something else: mixing two encoders in a folder would go unnoticed.
        """
        if not self.record_path(number).is_file():
            return None
        try:
            record = read_json(self.record_path(number))
        except UserError:
            return None  # incomplete or damaged
        sizes = {path.name: path.stat().st_size for path in self.files(number) if path.is_file()}
        if sizes != record.get("bytes"):
            return None
        if record.get("fingerprint") != fingerprint:
            raise UserError(
                f"'{self.root}' already holds {' and '.join(self.fields)} of another encoder, corpus or setting (shard {number} of "
                f"'{self.split}'); give a new output folder, or delete this one to {self.command} again"
            )
        return record

    def write(self, number: int, records: Iterable[Record], fingerprint: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write one shard beside the folder, move it into place, then record it with ``facts``; returns what was recorded."""
        self.record_path(number).unlink(missing_ok=True)
        (self.root / index_name(self.split)).unlink(missing_ok=True)
        partial = self.root / f".partial.{self.split}.{number:06d}"  # of its own, for other ranks write beside it
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            fields = dict.fromkeys(self.fields, self.form)
            with _shar_writer(str(partial), fields=fields, shard_size=2**31, shard_offset=number) as writer:
                for record in records:
                    writer.write(record.to_cut())
            (self.root / self.split).mkdir(exist_ok=True)
            # lhotse opens no file for a shard without a single utterance.
            written = [path for path in self.files(number) if (partial / path.name).is_file()]
            for path in written:
                if path.suffix == ".gz":
                    _without_time(partial / path.name)
            for path in written:
                os.replace(partial / path.name, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sizes = {path.name: path.stat().st_size for path in written}
        recorded = {"fingerprint": fingerprint, "bytes": sizes, **facts}
        write_json(self.record_path(number), recorded)
        return recorded

    def check_only(self, shards: int) -> None:
        """A UserError when the split holds files that do not belong to its first ``shards`` shards."""
        expected = {path for number in range(shards) for path in self.files(number)}
        folder = self.root / self.split
        strange = sorted(path.name for path in folder.iterdir() if path not in expected) if folder.is_dir() else []
        if strange:
            raise UserError(
                f"'{folder}' holds files of another run: {', '.join(strange[:5])}; "
                f"give a new output folder, or delete this one to {self.command} again"
            )


def _without_time(path: Path) -> None:
    """Zero the time of writing in the header of a gzip file (RFC 1952, MTIME), so that equal shards are equal files."""
    with path.open("r+b") as file:
        file.seek(4)
        file.write(bytes(4))


@contextlib.contextmanager
def _shar_writer(*arguments: Any, **options: Any) -> Iterator[SharWriter]:
    """A SharWriter that leaves no stream open on failure: its destructors would write again, and print what the disk says to that."""
    writer = SharWriter(*arguments, **options)
    try:
        with writer:
            yield writer
    except BaseException:
        for part in writer.writers.values():
            shard = getattr(part, "tar_writer", part)
            for stream in (getattr(shard, "tarstream", None), shard.stream, getattr(shard.stream, "file", None)):
                if stream is not None:
                    with contextlib.suppress(OSError, ValueError):
                        stream.close()
        raise


def read_info(folder: str | Path | Folder) -> dict[str, Any]:
    """The info.json of a complete latent folder; a UserError when it is none, or an unfinished one."""
    root = folder if isinstance(folder, Folder) else Folder(folder)
    if not root.exists(COMPLETED_NAME) or not root.exists(INFO_NAME):
        raise UserError(
            f"not a complete latent folder: got '{root}', expected {INFO_NAME} and {COMPLETED_NAME} in it; run `kalle encode … out={root}`"
        )
    info = read_info_file(root)
    if info.get("kind") == "waves":
        raise UserError(f"not a latent folder: '{root}' holds waveforms; give one that `kalle encode` wrote")
    numbers = [info.get(key, 1) for key in ("latent_dim", "sample_rate_hz", "hop_length", "total_frames")]
    statistics = [info.get(key, [0.0]) for key in ("mean", "std")]
    whole = all(isinstance(number, int) and number > 0 for number in numbers) and isinstance(info.get("encoder_hash"), str)
    if not whole or not all(isinstance(one, list) and one for one in statistics):
        raise UserError(f"damaged '{root.where(INFO_NAME)}': its sizes or statistics are wrong; run `kalle encode` again")
    return info


def read_info_file(root: Folder) -> dict[str, Any]:
    """The info.json of a shard folder of either kind, with the counts of its splits; a UserError when it is damaged."""
    try:
        info = parse_json(root.read(INFO_NAME))
        if not all(isinstance(count, dict) for count in info["splits"].values()):
            raise ValueError("its splits are no counts")
    except UserError:
        raise
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise UserError(f"damaged '{root.where(INFO_NAME)}' ({error}); write or copy the folder again") from None
    return info


def read_items(folder: str | Path | Folder, split: str) -> Table:
    """All utterances of ``split``, in stored order, without their arrays.

    A UserError when the folder is not complete or has no such split.
    """
    root = folder if isinstance(folder, Folder) else Folder(folder)
    info = read_info(root)
    if split not in info["splits"]:
        raise UserError(f"no split '{split}' in '{root}': got {', '.join(info['splits'])}; encode it, or name another split")
    return whole_table(read_table(root, split, latent_fields(bool(info.get("speaker_mels"))), latent_frames), root, split, info)


def whole_table(table: Table, folder: Folder, split: str, info: Mapping[str, Any]) -> Table:
    """``table`` when it has as many items as info.json says; else a UserError."""
    expected = info["splits"][split].get("utterances", len(table))
    if len(table) != expected:
        got = f"'{folder.where(split)}' holds {len(table)} utterances, {INFO_NAME} says {expected}"
        raise UserError(f"incomplete shards: {got}; write or copy the folder again")
    return table


def latent_fields(speaker_mels: bool) -> tuple[str, ...]:
    """The tars of a latent shard."""
    return (LATENTS, SPEAKER_MELS) if speaker_mels else (LATENTS,)


def latent_frames(cut: Mapping[str, Any]) -> int:
    """Number of latent frames of a cut as `LatentRecord` writes it."""
    return int(cut["custom"]["num_frames_latent"])


def iter_posteriors(folder: Path, split: str) -> Iterator[DiagGaussian]:
    """The stored posterior of every utterance of ``split`` in turn, (T, D) fp32, padding-free."""
    root = Folder(folder)
    for name in root.sizes(split):
        if name.startswith(f"{LATENTS}."):
            for offset, size in tar_members(root, f"{split}/{name}").values():
                stored = array_of(root.read_range(f"{split}/{name}", offset, size), name)
                yield DiagGaussian.from_parameters(torch.from_numpy(stored).float())


logger = logging.getLogger(__name__)
INDEX_VERSION = 2
Frames = Callable[[dict[str, Any]], int]
"""From a cut, as lhotse writes it, to its length."""


def index_name(split: str) -> str:
    """The file name of the index of one split."""
    return f"index.{split}.safetensors"


def read_table(folder: Folder, split: str, fields: Sequence[str], frames: Frames) -> Table:
    """All items of ``split``, in stored order, with where their ``fields`` lie.

    ``frames`` is called only where there is no index. UserError for an incomplete shard.
    """
    sizes = folder.sizes(split)
    shards = shard_names(sizes, fields)
    if folder.exists(index_name(split)):
        table = _from_index(folder, split, fields, shards, sizes)
        if table is not None:
            return table
        logger.warning("'%s' does not fit the shards; reading them instead", folder.where(index_name(split)))
    return _from_shards(folder, split, fields, shards, frames)


def shard_names(sizes: Mapping[str, int], fields: Sequence[str]) -> list[dict[str, str]]:
    """The files of each shard by field, and its manifest as "cuts"; a UserError when one lacks a file."""
    numbers = sorted(name.split(".")[1] for name in sizes if name.startswith("cuts.") and name.endswith(".jsonl.gz"))
    shards = [{"cuts": f"cuts.{number}.jsonl.gz", **{field: f"{field}.{number}.tar" for field in fields}} for number in numbers]
    missing = [name for shard in shards for name in shard.values() if name not in sizes]
    if missing:
        raise UserError(f"missing shard: no '{missing[0]}' beside its cuts ({len(missing)} missing); write or copy the folder again")
    return shards


def write_index(root: Path, split: str, fields: Sequence[str], frames: Frames) -> None:
    """Write the index of a complete split, unless one that fits is there."""
    folder = Folder(root)
    sizes = folder.sizes(split)
    shards = shard_names(sizes, fields)
    if folder.exists(index_name(split)) and _from_index(folder, split, fields, shards, sizes) is not None:
        return
    table = _from_shards(folder, split, fields, shards, frames)
    files = [name for shard in shards for name in shard.values()]
    arrays = {
        "ids": table.ids.rows.values,
        "ids.starts": table.ids.rows.starts,
        "texts": table.texts.rows.values,
        "texts.starts": table.texts.rows.starts,
        "speaker": table.speaker,
        "language": table.language,
        "frames": table.frames,
        "shard": table.shard,
        **{f"{field}.offset": column for field, column in table.offsets.items()},
        **{f"{field}.size": column for field, column in table.sizes.items()},
    }
    facts = {
        "version": INDEX_VERSION,
        "speakers": table.speakers,
        "languages": table.languages,
        "files": {name: sizes[name] for name in files},
    }
    # One entry, for safetensors writes several in any order, and equal folders are to be equal files.
    write_atomic(root / index_name(split), save_arrays(arrays, {"facts": json.dumps(facts)}))


def _from_index(
    folder: Folder, split: str, fields: Sequence[str], shards: Sequence[Mapping[str, str]], sizes: Mapping[str, int]
) -> Table | None:
    """The table of the index; None when it is of other files than those that are there."""
    content = folder.read(index_name(split))
    try:
        arrays = load_arrays(content)
        header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return _table_of(folder, split, fields, shards, sizes, arrays, parse_json(header["__metadata__"]["facts"]))
    except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, AssertionError):
        return None


def _table_of(
    folder: Folder,
    split: str,
    fields: Sequence[str],
    shards: Sequence[Mapping[str, str]],
    sizes: Mapping[str, int],
    arrays: Mapping[str, np.ndarray],
    facts: Mapping[str, Any],
) -> Table | None:
    expected = {name: sizes[name] for shard in shards for name in shard.values()}
    listed, items = facts.get("files", {}), len(arrays["frames"])
    columns = [
        arrays[name] for name in ("speaker", "language", "shard", *[f"{field}.{part}" for field in fields for part in ("offset", "size")])
    ]
    lists = [arrays["ids.starts"], arrays["texts.starts"]]
    if any(len(column) != items for column in columns) or any(len(starts) != items + 1 or (np.diff(starts) < 0).any() for starts in lists):
        return None
    bounds = {"speaker": len(facts["speakers"]), "language": len(facts["languages"]), "shard": len(shards)}
    if any(column.dtype.kind not in "iu" or (column < 0).any() for column in (*columns, *lists, arrays["frames"])):
        return None
    if any((arrays[name] >= bound).any() for name, bound in bounds.items()):
        return None
    if not all(isinstance(name, str | None) for name in (*facts["speakers"], *facts["languages"])):
        return None
    if facts.get("version") != INDEX_VERSION or any(listed.get(name) != size for name, size in expected.items()):
        return None
    if sum(name.startswith("cuts.") for name in listed) != len(shards) or any(f"{field}.offset" not in arrays for field in fields):
        return None
    return Table(
        Texts(Ragged(arrays["ids"], arrays["ids.starts"])),
        Texts(Ragged(arrays["texts"], arrays["texts.starts"])),
        tuple(facts["speakers"]),
        arrays["speaker"],
        tuple(facts["languages"]),
        arrays["language"],
        arrays["frames"],
        arrays["shard"],
        _placed(folder, split, fields, shards),
        {field: arrays[f"{field}.offset"] for field in fields},
        {field: arrays[f"{field}.size"] for field in fields},
    )


def _placed(
    folder: Folder, split: str, fields: Sequence[str], shards: Sequence[Mapping[str, str]]
) -> tuple[tuple[Folder, Mapping[str, str]], ...]:
    return tuple((folder, {field: f"{split}/{shard[field]}" for field in fields}) for shard in shards)


def _from_shards(folder: Folder, split: str, fields: Sequence[str], shards: Sequence[Mapping[str, str]], frames: Frames) -> Table:
    ids: list[str] = []
    texts: list[str] = []
    speakers: list[str | None] = []
    languages: list[str | None] = []
    numbers: dict[str, list[int]] = {"frames": [], "shard": []}
    places: dict[str, list[tuple[int, int]]] = {field: [] for field in fields}
    for number, shard in enumerate(shards):
        members = {field: tar_members(folder, f"{split}/{shard[field]}") for field in fields}
        for name, text, speaker, language, length in _rows_of(folder, f"{split}/{shard['cuts']}", frames):
            ids.append(name)
            texts.append(text)
            speakers.append(speaker)
            languages.append(language)
            numbers["frames"].append(length)
            numbers["shard"].append(number)
            for field in fields:
                if name not in members[field]:
                    raise UserError(f"incomplete shard: no '{name}' in '{folder.where(shard[field])}'; write or copy the folder again")
                places[field].append(members[field][name])
    located = {field: np.array(places[field], np.int64).reshape(-1, 2) for field in fields}
    return Table(
        Texts.of(ids),
        Texts.of(texts),
        *numbered(speakers),
        *numbered(languages),
        np.array(numbers["frames"], np.int32),
        np.array(numbers["shard"], np.int32),
        _placed(folder, split, fields, shards),
        {field: np.ascontiguousarray(located[field][:, 0]) for field in fields},
        {field: located[field][:, 1].astype(np.int32) for field in fields},
    )


def _rows_of(folder: Folder, name: str, frames: Frames) -> Iterator[tuple[str, str, str | None, str | None, int]]:
    """Id, text, speaker, language and length of every cut in one manifest."""
    try:
        for line in gzip.decompress(folder.read(name)).splitlines():
            if line.strip():
                cut = parse_json(line)
                said = (cut.get("supervisions") or [{}])[0]
                speaker, language, length = said.get("speaker"), said.get("language"), frames(cut)
                if not isinstance(speaker, str | None) or not isinstance(language, str | None) or not 0 <= length < 2**31:
                    raise ValueError(f"cut '{cut['id']}': got the speaker {speaker!r:.40}, language {language!r:.40}, length {length}")
                name, text = str(cut["id"]), str(said.get("text") or "")
                f"{name}{text}".encode()  # half of a surrogate pair is found here
                yield name, text, speaker, language, length
    except UserError:
        raise
    except (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UserError(f"unreadable manifest: '{folder.where(name)}' ({reason}); write or copy the folder again") from None


def tar_members(folder: Folder, name: str) -> dict[str, tuple[int, int]]:
    """Offset and size of what each cut has in an uncompressed shard, by cut id."""
    try:
        with folder.open(name) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            data = [member for member in archive if not member.name.endswith((".json", ".nodata", ".nometa"))]
            return {member.name.rpartition(".")[0]: (member.offset_data, member.size) for member in data}
    except (tarfile.TarError, OSError, EOFError, ValueError, LookupError, OverflowError) as error:
        raise UserError(f"unreadable shard: '{folder.where(name)}' ({error}); write or copy the folder again") from None
