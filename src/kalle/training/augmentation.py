"""Noise on a batch in training: a function of the seed, the epoch and the utterance, whatever the batch, the rank or the step."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from kalle.data.seeds import derived_seed
from kalle.models.batch import LMBatch
from kalle.text.prompt import without_text


def visit_generators(batch: LMBatch, seed: int, step: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator for every utterance of ``batch``.

    It follows from ``seed``, the epoch and the cut id; for a batch that does not say which visits it holds, from ``seed``, ``step`` (the
    step, the rank, …) and the place in the batch.
    """
    if batch.epochs:
        keys: list[tuple[int | str, ...]] = list(zip(batch.epochs, batch.cut_ids, strict=True))
    else:
        keys = [("step", *step, index) for index in range(len(batch.text_ids))]
    return [torch.Generator().manual_seed(derived_seed("augmentation", seed, *key)) for key in keys]


def drop_speakers(batch: LMBatch, probability: float, generators: Sequence[torch.Generator]) -> LMBatch:
    """Have each utterance read without its speaker with ``probability``; one number is drawn from each generator whatever that is."""
    kept = torch.tensor([float(torch.rand((), generator=generator)) >= probability for generator in generators])
    if batch.speaker_mels is None or bool(kept.all()):
        return batch
    return dataclasses.replace(batch, speaker_kept=kept.to(batch.text_lengths.device))


def drop_texts(batch: LMBatch, probability: float, generators: Sequence[torch.Generator]) -> LMBatch:
    """Have each utterance read without its words (`without_text`) with ``probability``, for classifier-free guidance.

    Such a row is as much shorter as its words were long. One number is drawn from each generator where ``probability`` is not 0.
    """
    if probability == 0:
        return batch
    dropped = [row for row, generator in enumerate(generators) if float(torch.rand((), generator=generator)) < probability]
    ids, lengths = batch.text_ids.clone(), batch.text_lengths.clone()
    for row in dropped:
        kept = without_text(batch.text_ids[row, : int(batch.text_lengths[row])])
        ids[row] = 0
        ids[row, : len(kept)], lengths[row] = kept, len(kept)
    return dataclasses.replace(batch, text_ids=ids, text_lengths=lengths)


def add_input_noise(
    batch: LMBatch, largest: float, mean: Tensor | float, std: Tensor | float, generators: Sequence[torch.Generator]
) -> LMBatch:
    """Mix noise into the input latents, sqrt(k) eps + sqrt(1 - k) z with k ~ U(0, ``largest``) per frame (CALM, arXiv 2509.06926).

    In units of the latents' ``mean`` and ``std`` ((D,) or numbers), so that both are preserved. Padding stays as it is.
    """
    if largest == 0:
        return batch
    share = torch.zeros(*batch.latents.shape[:2], 1)
    noise = torch.zeros(batch.latents.shape)
    for index, (generator, frames) in enumerate(zip(generators, batch.latent_lengths.tolist(), strict=True)):
        share[index, :frames] = largest * torch.rand((frames, 1), generator=generator)
        noise[index, :frames] = torch.randn((frames, batch.latents.shape[2]), generator=generator)
    share, noise = share.to(batch.latents.device), noise.to(batch.latents.device)
    latents = mean + share.sqrt() * noise * std + (1 - share).sqrt() * (batch.latents - mean)
    return dataclasses.replace(batch, latents=latents)
