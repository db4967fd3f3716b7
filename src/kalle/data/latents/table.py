"""The items of shards as columns: tens of millions fit into memory, and forked workers share them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

import numpy as np
import torch
from torch import Tensor

from kalle.data.latents.storage import Folder
from kalle.errors import UserError


class Ragged:
    """N rows of different lengths: their values one after another, and where each begins."""

    def __init__(self, values: np.ndarray, starts: np.ndarray) -> None:
        """``values`` (V,); ``starts`` (N + 1,) int64, from 0 to V."""
        assert (starts[0], starts[-1]) == (0, len(values)), (starts[0], starts[-1], len(values))
        self.values, self.starts = values, starts

    @classmethod
    def joined(cls, parts: Sequence[Ragged]) -> Ragged:
        """The rows of all ``parts`` in turn."""
        if len(parts) == 1:
            return parts[0]
        return cls(np.concatenate([part.values for part in parts]), starts_of(np.concatenate([part.lengths for part in parts])))

    @property
    def lengths(self) -> np.ndarray:
        """Length of each row, (N,) int64."""
        return np.diff(self.starts)

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.values.nbytes + self.starts.nbytes

    def __len__(self) -> int:
        return len(self.starts) - 1

    def row(self, index: int) -> np.ndarray:
        """Row ``index``, a view."""
        return self.values[self.starts[index] : self.starts[index + 1]]

    def take(self, keep: np.ndarray) -> Ragged:
        """The rows that the mask ``keep`` (N,) bool marks."""
        if keep.all():
            return self
        return Ragged(self.values[np.repeat(keep, self.lengths)], starts_of(self.lengths[keep]))


class Texts(Sequence[str]):
    """N strings as UTF-8 bytes."""

    def __init__(self, rows: Ragged) -> None:
        self.rows = rows

    @classmethod
    def of(cls, strings: Iterable[str]) -> Texts:
        """Make a column of ``strings``."""
        encoded = [string.encode() for string in strings]
        lengths = np.array([len(code) for code in encoded], dtype=np.int64)
        return cls(Ragged(np.frombuffer(b"".join(encoded), np.uint8), starts_of(lengths)))

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        try:
            return self.rows.row(range(len(self))[index]).tobytes().decode()
        except UnicodeDecodeError:
            raise UserError(f"damaged index: its text {index} is not UTF-8; remove index.*.safetensors, which is made again") from None


class TokenLists(Sequence[Tensor]):
    """N token sequences; each one is an int32 (L,) tensor when it is read."""

    def __init__(self, rows: Ragged) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | list[Tensor]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return torch.from_numpy(self.rows.row(range(len(self))[index]).astype(np.int32))


def starts_of(lengths: np.ndarray) -> np.ndarray:
    """Where each of the rows of ``lengths`` (N,) begins, and the end of the last, (N + 1,) int64."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


_MAGIC = b"\x93NUMPY\x01\x00"
_HEADER_AT = 10


@dataclass(frozen=True)
class Member:
    """Where the bytes of one array lie."""

    folder: Folder
    name: str
    """Of the shard, relative to the folder."""
    offset: int
    size: int

    def read(self) -> bytearray:
        """The bytes as they are stored."""
        return self.folder.read_range(self.name, self.offset, self.size)

    def load(self) -> np.ndarray:
        """Read the array."""
        return array_of(self.read(), self.folder.where(self.name))


@dataclass(frozen=True)
class StoredItem:
    """One utterance of a shard folder; what it holds stays where it is."""

    id: str
    text: str
    speaker: str | None
    language: str | None
    frames: int
    """Latent frames, or samples of a waveform."""
    members: Mapping[str, Member]
    """Members by the name of their field."""

    @property
    def latents(self) -> Member:
        """The posterior, (T, 2D) float16."""
        return self.members["latents"]

    @property
    def speaker_mels(self) -> Member | None:
        """The log-mels for a speaker encoder, (80, F) float16."""
        return self.members.get("speaker_mels")


@dataclass(frozen=True)
class Table(Sequence[StoredItem]):
    """N items. Strings and numbers are columns; ``table[index]`` makes the `StoredItem`.

    Shards are numbered over all folders: ``shards[n]`` is the folder of shard n and its names by field.
    """

    ids: Texts
    texts: Texts
    speakers: tuple[str | None, ...]
    speaker: np.ndarray
    """(N,) int32, into ``speakers``."""
    languages: tuple[str | None, ...]
    language: np.ndarray
    """(N,) int32, into ``languages``."""
    frames: np.ndarray
    """(N,) int32"""
    shard: np.ndarray
    """(N,) int32, into ``shards``."""
    shards: tuple[tuple[Folder, Mapping[str, str]], ...]
    offsets: Mapping[str, np.ndarray]
    """(N,) int64 by field."""
    sizes: Mapping[str, np.ndarray]
    """(N,) int32 by field."""

    def __len__(self) -> int:
        return len(self.frames)

    @overload
    def __getitem__(self, index: int) -> StoredItem: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredItem]: ...
    def __getitem__(self, index: int | slice) -> StoredItem | list[StoredItem]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        members = {field: self.member(index, field) for field in self.offsets}
        speaker, language = self.speakers[self.speaker[index]], self.language_of(index)
        return StoredItem(self.ids[index], self.texts[index], speaker, language, int(self.frames[index]), members)

    def __iter__(self) -> Iterator[StoredItem]:
        return (self[index] for index in range(len(self)))

    def language_of(self, index: int) -> str | None:
        """Language of item ``index`` (ISO 639-1) where its corpus said so."""
        return self.languages[self.language[index]]

    def member(self, index: int, field: str) -> Member:
        """Where ``field`` of item ``index`` lies."""
        folder, names = self.shards[self.shard[index]]
        return Member(folder, names[field], int(self.offsets[field][index]), int(self.sizes[field][index]))

    @property
    def nbytes(self) -> int:
        """Bytes of all columns."""
        numbers = [self.speaker, self.language, self.frames, self.shard, *self.offsets.values(), *self.sizes.values()]
        return self.ids.rows.nbytes + self.texts.rows.nbytes + sum(column.nbytes for column in numbers)

    def take(self, keep: np.ndarray) -> Table:
        """The items that the mask ``keep`` (N,) bool marks."""
        if keep.all():
            return self
        return Table(
            Texts(self.ids.rows.take(keep)),
            Texts(self.texts.rows.take(keep)),
            self.speakers,
            self.speaker[keep],
            self.languages,
            self.language[keep],
            self.frames[keep],
            self.shard[keep],
            self.shards,
            {field: column[keep] for field, column in self.offsets.items()},
            {field: column[keep] for field, column in self.sizes.items()},
        )


def numbered(names: Sequence[str | None]) -> tuple[tuple[str | None, ...], np.ndarray]:
    """The distinct ``names`` in order of appearance, at least None, and the place of each name among them, (N,) int32."""
    distinct = tuple(dict.fromkeys(names)) or (None,)
    order = {name: index for index, name in enumerate(distinct)}
    return distinct, np.array([order[name] for name in names], np.int32)


def _joined_names(columns: Sequence[tuple[tuple[str | None, ...], np.ndarray]]) -> tuple[tuple[str | None, ...], np.ndarray]:
    distinct, places = numbered([name for names, _ in columns for name in names])
    starts = np.cumsum([0, *(len(names) for names, _ in columns)])
    return distinct, np.concatenate([places[start:][column] for start, (_, column) in zip(starts, columns, strict=False)])


def joined_tables(tables: Sequence[Table]) -> Table:
    """The items of all ``tables`` in turn, with the fields that all of them have."""
    if len(tables) == 1:
        return tables[0]
    before = np.cumsum([0, *(len(table.shards) for table in tables)])
    fields = [field for field in tables[0].offsets if all(field in table.offsets for table in tables)]
    speakers, speaker = _joined_names([(table.speakers, table.speaker) for table in tables])
    languages, language = _joined_names([(table.languages, table.language) for table in tables])
    return Table(
        Texts(Ragged.joined([table.ids.rows for table in tables])),
        Texts(Ragged.joined([table.texts.rows for table in tables])),
        speakers,
        speaker,
        languages,
        language,
        np.concatenate([table.frames for table in tables]),
        np.concatenate([table.shard + np.int32(first) for table, first in zip(tables, before, strict=False)]),
        tuple(shard for table in tables for shard in table.shards),
        {field: np.concatenate([table.offsets[field] for table in tables]) for field in fields},
        {field: np.concatenate([table.sizes[field] for table in tables]) for field in fields},
    )


@functools.lru_cache(maxsize=4096)
def _layout(header: bytes) -> tuple[np.dtype, tuple[int, ...]]:
    """Type and shape from the header of a .npy file; few differ, and parsing one costs more than reading the array."""
    facts = ast.literal_eval(header.decode("latin-1"))
    dtype = np.dtype(facts["descr"])
    if facts["fortran_order"] or dtype.kind != "f":
        raise ValueError("not a C-ordered array of numbers")
    return dtype, tuple(facts["shape"])


def array_of(content: bytearray, address: str) -> np.ndarray:
    """The array of a .npy file (version 1, C order), over ``content``; a UserError about ``address`` when it is none."""
    try:
        if content[: len(_MAGIC)] != _MAGIC:
            raise ValueError("no .npy header")
        start = _HEADER_AT + int.from_bytes(content[_HEADER_AT - 2 : _HEADER_AT], "little")
        dtype, shape = _layout(bytes(content[_HEADER_AT:start]))
        return np.frombuffer(content, dtype, offset=start).reshape(shape)
    except (ValueError, SyntaxError, LookupError, TypeError, AttributeError, RecursionError, MemoryError, OverflowError) as error:
        raise UserError(f"unreadable array in '{address}': {str(error)[:200]}; write or copy the folder again") from None
