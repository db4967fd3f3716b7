"""Teacher-forced KL of a language model beside two comparisons: a constant prediction, and the wrong texts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from kalle.gaussian import DiagGaussian
from kalle.losses.latent import Direction, constant_gaussian_baseline, next_distribution_loss
from kalle.models.lm import KalleLM
from kalle.models.lm_batch import LMBatch


@dataclass(frozen=True)
class LMProbe:
    """KL in nats per dimension over all frames of a set of utterances."""

    frame_kl: float
    end_kl: float
    shuffled_frame_kl: float
    """The same frames predicted with the texts dealt to other utterances."""
    constant_frame_kl: float
    """The best constant Gaussian of the same direction, fitted on these very frames."""
    frames: int
    utterances: int

    @property
    def share_of_constant(self) -> float:
        """``frame_kl / constant_frame_kl``; 1 means that nothing was learnt."""
        return self.frame_kl / self.constant_frame_kl

    @property
    def shuffled_rise(self) -> float:
        """Relative rise of the KL when the texts are shuffled; 0 means that the text is ignored."""
        return self.shuffled_frame_kl / self.frame_kl - 1


def probe(lm: KalleLM, batches: Iterable[LMBatch], direction: Direction = "prediction_posterior", seed: int = 0) -> LMProbe:
    """Score ``lm`` on ``batches``, with their own texts and with texts permuted over the whole set.

    The permutation depends on ``seed`` only and gives no item a text equal to its own (where the set allows it).
    """
    kept = [batch.to(lm.device) for batch in batches]
    frame_kl, end_kl, frames, utterances = _mean_losses(lm, kept, direction)
    shuffled, _, _, _ = _mean_losses(lm, list(with_shuffled_texts(kept, seed)), direction)
    constant = constant_gaussian_baseline(_posteriors(kept), direction)
    return LMProbe(frame_kl, end_kl, shuffled, float(constant.kl.mean()), frames, utterances)


@torch.no_grad()
def _mean_losses(lm: KalleLM, batches: list[LMBatch], direction: Direction) -> tuple[float, float, int, int]:
    was_training = lm.training
    lm.eval()
    frame_sum = end_sum = 0.0
    frames = utterances = 0
    for batch in batches:
        loss = next_distribution_loss(lm(batch), batch, direction)
        frame_sum += float(loss.frame_kl) * int(loss.frames)
        end_sum += float(loss.end_kl) * int(loss.utterances)
        frames += int(loss.frames)
        utterances += int(loss.utterances)
    lm.train(was_training)
    return frame_sum / frames, end_sum / utterances, frames, utterances


def with_shuffled_texts(batches: list[LMBatch], seed: int) -> Iterator[LMBatch]:
    """The same batches with their texts permuted over all of them."""
    texts = [ids[:length] for batch in batches for ids, length in zip(batch.text_ids, batch.text_lengths, strict=True)]
    order = derangement([tuple(text.tolist()) for text in texts], seed)
    start = 0
    for batch in batches:
        rows = [texts[i] for i in order[start : start + len(batch.text_ids)]]
        start += len(rows)
        lengths = torch.tensor([len(row) for row in rows], device=batch.text_lengths.device)
        yield dataclasses.replace(batch, text_ids=pad_sequence(rows, batch_first=True), text_lengths=lengths)


def derangement(values: list[tuple[int, ...]], seed: int) -> list[int]:
    """A permutation of the indices that puts no value where an equal one was, as far as swapping can."""
    order = np.random.default_rng(seed).permutation(len(values)).tolist()
    for i in range(len(order)):
        if values[order[i]] != values[i]:
            continue
        for j in range(len(order)):
            if values[order[j]] != values[i] and values[order[i]] != values[j]:
                order[i], order[j] = order[j], order[i]
                break
    return order


def _posteriors(batches: list[LMBatch]) -> Iterator[DiagGaussian]:
    for batch in batches:
        assert batch.posterior is not None, "the probe needs the posteriors of its batches"
        yield batch.posterior[_valid(batch)]


def _valid(batch: LMBatch) -> Tensor:
    return torch.arange(batch.latents.shape[1], device=batch.latents.device) < batch.latent_lengths[:, None]
