"""Reading what lies in the shards of a split, from its index when there is one and from the shards themselves when not.

ROOT/index.SPLIT.safetensors holds the columns of `kalle.data.items.Table`. Without it every manifest has to be parsed and every
header of every tar visited, at each start and, on an object store, over the network.
"""

from __future__ import annotations

import gzip
import json
import logging
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays

from kalle.data.columns import Ragged, Texts
from kalle.data.items import Table
from kalle.data.storage import Folder
from kalle.errors import UserError
from kalle.files import write_atomic

logger = logging.getLogger(__name__)

INDEX_VERSION = 1
Frames = Callable[[dict[str, Any]], int]
"""From a cut, as lhotse writes it, to its length."""


def index_name(split: str) -> str:
    """The file name of the index of one split."""
    return f"index.{split}.safetensors"


def read_table(folder: Folder, split: str, fields: Sequence[str], frames: Frames) -> Table:
    """All items of ``split``, in stored order, with where their ``fields`` lie.

    ``frames`` is asked only where there is no index. UserError for a torn shard.
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
    """Write the index of a whole split, unless one that fits is there."""
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
        "frames": table.frames,
        "shard": table.shard,
        **{f"{field}.offset": column for field, column in table.offsets.items()},
        **{f"{field}.size": column for field, column in table.sizes.items()},
    }
    facts = {"version": INDEX_VERSION, "speakers": table.speakers, "files": {name: sizes[name] for name in files}}
    # One entry, for safetensors writes several in any order, and equal folders are to be equal files.
    write_atomic(root / index_name(split), save_arrays(arrays, {"facts": json.dumps(facts)}))


def _from_index(
    folder: Folder, split: str, fields: Sequence[str], shards: Sequence[Mapping[str, str]], sizes: Mapping[str, int]
) -> Table | None:
    """The table of the index; None when it is of other files than those that are there."""
    content = folder.read(index_name(split))
    try:
        arrays = load_arrays(content)
    except SafetensorError:
        return None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    facts = json.loads(header.get("__metadata__", {}).get("facts", "{}"))
    expected = {name: sizes[name] for shard in shards for name in shard.values()}
    listed = facts.get("files", {})
    if facts.get("version") != INDEX_VERSION or any(listed.get(name) != size for name, size in expected.items()):
        return None
    if sum(name.startswith("cuts.") for name in listed) != len(shards) or any(f"{field}.offset" not in arrays for field in fields):
        return None
    return Table(
        Texts(Ragged(arrays["ids"], arrays["ids.starts"])),
        Texts(Ragged(arrays["texts"], arrays["texts.starts"])),
        tuple(facts["speakers"]),
        arrays["speaker"],
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
    numbers: dict[str, list[int]] = {"frames": [], "shard": []}
    places: dict[str, list[tuple[int, int]]] = {field: [] for field in fields}
    for number, shard in enumerate(shards):
        members = {field: tar_members(folder, f"{split}/{shard[field]}") for field in fields}
        for cut in read_cuts(folder, f"{split}/{shard['cuts']}"):
            said = (cut.get("supervisions") or [{}])[0]
            ids.append(cut["id"])
            texts.append(said.get("text") or "")
            speakers.append(said.get("speaker"))
            numbers["frames"].append(frames(cut))
            numbers["shard"].append(number)
            for field in fields:
                if cut["id"] not in members[field]:
                    raise UserError(f"torn shard: no '{cut['id']}' in '{folder.where(shard[field])}'; write or copy the folder again")
                places[field].append(members[field][cut["id"]])
    names = tuple(dict.fromkeys(speakers)) or (None,)
    order = {name: index for index, name in enumerate(names)}
    located = {field: np.array(places[field], np.int64).reshape(-1, 2) for field in fields}
    return Table(
        Texts.of(ids),
        Texts.of(texts),
        names,
        np.array([order[name] for name in speakers], np.int32),
        np.array(numbers["frames"], np.int32),
        np.array(numbers["shard"], np.int32),
        _placed(folder, split, fields, shards),
        {field: np.ascontiguousarray(located[field][:, 0]) for field in fields},
        {field: located[field][:, 1].astype(np.int32) for field in fields},
    )


def read_cuts(folder: Folder, name: str) -> list[dict[str, Any]]:
    """The cuts of one manifest as dictionaries."""
    try:
        return [json.loads(line) for line in gzip.decompress(folder.read(name)).splitlines() if line.strip()]
    except (OSError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"unreadable manifest: '{folder.where(name)}' ({error}); write or copy the folder again") from None


def tar_members(folder: Folder, name: str) -> dict[str, tuple[int, int]]:
    """Offset and size of what each cut has in an uncompressed shard, by cut id."""
    try:
        with folder.open(name) as stream, tarfile.open(fileobj=stream, mode="r:") as archive:
            data = [member for member in archive if not member.name.endswith((".json", ".nodata", ".nometa"))]
            return {member.name.rpartition(".")[0]: (member.offset_data, member.size) for member in data}
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"unreadable shard: '{folder.where(name)}' ({error}); write or copy the folder again") from None
