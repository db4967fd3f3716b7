"""Lists of many small things as a few arrays: a string object costs Python fifty bytes before its first letter."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import overload

import numpy as np
import torch
from torch import Tensor


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
        """The ``strings``."""
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
        return self.rows.row(range(len(self))[index]).tobytes().decode()


class TokenLists(Sequence[Tensor]):
    """N token sequences; each one is an int32 (L,) tensor when asked for."""

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
