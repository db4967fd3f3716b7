"""Batches, the data that models read, and the position of each utterance in the rows of the backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian

Batch = TypeVar("Batch", "LMBatch", "WaveBatch")


@dataclass(frozen=True)
class LMBatch:
    """Texts and latents of B utterances, right-padded (L text positions, T latent frames of D dimensions).

    ``text_ids`` (B, L) int64 holds every special token; ``text_lengths`` and ``latent_lengths`` are (B,) int64.
    ``latents`` (B, T, D) are the samples fed to the model, zeros beyond ``latent_lengths``; ``posterior`` (B, T, D)
    holds the training targets of the same frames. With a speaker encoder ``speaker_mels`` is (B, 80, F) and
    ``speaker_noise`` (B, H) the standard normal draw of its latent; without noise the mean of the latent is used.
    ``speaker_kept`` (B,) bool is False for utterances that are to be read without their speaker; None keeps all.
    ``cut_ids`` and ``epochs`` name the utterances of the batch, and the epoch of the data in which each was drawn.
    """

    text_ids: Tensor
    text_lengths: Tensor
    latents: Tensor
    latent_lengths: Tensor
    posterior: DiagGaussian | None = None
    speaker_mels: Tensor | None = None
    speaker_noise: Tensor | None = None
    cut_ids: tuple[str, ...] = ()
    speaker_kept: Tensor | None = None
    epochs: tuple[int, ...] = ()

    def to(self, device: str | torch.device) -> LMBatch:
        """The same batch with every tensor on ``device``."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> LMBatch:
        """The same batch in page-locked memory (called by PyTorch's loader when ``pin_memory`` is set)."""
        return _map_tensors(self, Tensor.pin_memory)


@dataclass(frozen=True)
class WaveBatch:
    """``wav`` (B, S) float32 in [-1, 1], mono, at the model's sample rate; random crops are numbered within their cut by ``crops``."""

    wav: Tensor
    cut_ids: tuple[str, ...]
    crops: tuple[int, ...] = ()

    def to(self, device: str | torch.device) -> WaveBatch:
        """The same batch with the audio on ``device``."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> WaveBatch:
        """The same batch in page-locked memory (called by PyTorch's loader when ``pin_memory`` is set)."""
        return _map_tensors(self, Tensor.pin_memory)


def _map_tensors(batch: Batch, function: Callable[[Tensor], Tensor]) -> Batch:
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = function(value)
        elif isinstance(value, DiagGaussian):
            changed[field.name] = DiagGaussian(function(value.mean), function(value.log_std))
    return dataclasses.replace(batch, **changed)


@dataclass(frozen=True)
class Packing:
    """Several utterances a row, each seeing only itself."""

    row_positions: int | None = 2048
    """Longest row, though never shorter than the longest utterance; None puts a batch into one row. Attention whose mask is a
    matrix (sdpa) costs memory by the square of it."""

    def __post_init__(self) -> None:
        if self.row_positions is not None and self.row_positions < 1:
            raise UserError(f"row_positions: got {self.row_positions}, expected at least 1, or null for one row; correct it")


@dataclass(frozen=True)
class RowLayout:
    """B documents in R rows of W positions; a row is padded at its end only."""

    row: Tensor
    """(B,) int64: the row of each document."""
    start: Tensor
    """(B,) int64: its first position in that row."""
    lengths: Tensor
    """(B,) int64: its positions."""
    rows: int
    width: int
    position_ids: Tensor | None
    """(R, W) int64, counted from the start of each document and 0 in padding; None where every document begins its row."""

    @property
    def positions(self) -> int:
        """Positions R * W that the backbone computes."""
        return self.rows * self.width

    @property
    def padding_share(self) -> Tensor:
        """Share of the computed positions that hold nothing, a scalar."""
        return 1 - self.lengths.sum() / self.positions


def padded_layout(lengths: Tensor) -> RowLayout:
    """A row for each document; ``lengths`` is (B,) int64."""
    rows = torch.arange(len(lengths), device=lengths.device)
    return RowLayout(rows, torch.zeros_like(lengths), lengths, len(lengths), int(lengths.max()), None)


def packed_layout(lengths: Tensor, packing: Packing) -> RowLayout:
    """Documents one behind the other in the fewest rows that first fit finds, nearly equally full; ``lengths`` is (B,) int64."""
    sizes: list[int] = lengths.tolist()
    room = sum(sizes) if packing.row_positions is None else max(packing.row_positions, *sizes, 1)
    longest_first = sorted(range(len(sizes)), key=lambda index: -sizes[index])
    row, start, filled = _first_fit(sizes, longest_first, room)
    balanced = _emptiest_first(sizes, longest_first, len(filled))
    if max(balanced[2]) < max(filled):  # rows are padded to the fullest
        row, start, filled = balanced
    width = max(filled)
    positions = torch.zeros(len(filled), width, dtype=torch.int64)
    for document, size in enumerate(sizes):
        positions[row[document], start[document] : start[document] + size] = torch.arange(size)
    device = lengths.device
    return RowLayout(
        torch.tensor(row, device=device), torch.tensor(start, device=device), lengths, len(filled), width, positions.to(device)
    )


def _first_fit(sizes: list[int], order: list[int], room: int) -> tuple[list[int], list[int], list[int]]:
    """Row and start of each document, and what each row holds: every document in the first row with room for it."""
    row, start, filled = [0] * len(sizes), [0] * len(sizes), [0]
    for document in order:
        size = sizes[document]
        place = next((index for index, used in enumerate(filled) if used + size <= room), len(filled))
        if place == len(filled):
            filled.append(0)
        row[document], start[document] = place, filled[place]
        filled[place] += size
    return row, start, filled


def _emptiest_first(sizes: list[int], order: list[int], rows: int) -> tuple[list[int], list[int], list[int]]:
    """The same with every document in the row that holds least so far."""
    row, start, filled = [0] * len(sizes), [0] * len(sizes), [0] * rows
    for document in order:
        place = min(range(rows), key=filled.__getitem__)
        row[document], start[document] = place, filled[place]
        filled[place] += sizes[document]
    return row, start, filled
