"""What travels from the data modules to the models."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

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
    ``cut_ids`` and ``epochs`` say of which utterances the batch is a visit, and in which epoch of the data.
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
