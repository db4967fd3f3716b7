from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kalle.evaluation.probe import LMProbe, derangement, probe, with_shuffled_texts
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import constant_gaussian_baseline
from kalle.models.lm_batch import LMBatch

D = 3
TEXTS = st.lists(st.lists(st.integers(0, 3), max_size=2).map(tuple), max_size=12)


@given(TEXTS, st.integers(0, 5))
@settings(deadline=None, max_examples=200)
def test_derangement_is_a_permutation_without_fixed_texts_where_possible(values: list[tuple[int, ...]], seed: int) -> None:
    order = derangement(values, seed)
    assert sorted(order) == list(range(len(values)))
    fixed = sum(values[i] == values[order[i]] for i in range(len(values)))
    most = max(Counter(values).values(), default=0)
    # With k of n equal, k - (n - k) of them cannot help getting their own text, and nobody else needs to.
    assert fixed == max(0, 2 * most - len(values))


@given(st.integers(2, 30), st.integers(0, 100))
@settings(deadline=None, max_examples=50)
def test_derangement_depends_on_the_seed_only(count: int, seed: int) -> None:
    values = [(i,) for i in range(count)]
    assert derangement(values, seed) == derangement(values, seed)
    assert all(i != j for i, j in enumerate(derangement(values, seed)))


def batches(equal_texts: bool = False) -> list[LMBatch]:
    generator = torch.Generator().manual_seed(2)
    result = []
    for size, frames in ((3, 6), (2, 9)):
        lengths = torch.tensor([frames - n for n in range(size)])
        mean = torch.randn(size, frames, D, generator=generator)
        posterior = DiagGaussian(mean, -0.5 + 0.3 * torch.randn(size, frames, D, generator=generator))
        ids = torch.full((size, 4), 7) if equal_texts else torch.randint(0, 9, (size, 4), generator=generator)
        result.append(LMBatch(ids, torch.tensor([4, 3, 2][:size]), mean * 0, lengths, posterior))
    return result


class Stub(nn.Module):
    """Predicts one Gaussian everywhere, plus ``reads`` times the first token of the text."""

    device = torch.device("cpu")

    def __init__(self, constant: DiagGaussian, reads: float = 0.0) -> None:
        super().__init__()
        self.constant, self.reads = constant, reads

    def forward(self, batch: LMBatch) -> DiagGaussian:
        shape = (len(batch.text_ids), batch.latents.shape[1] + 1, D)
        shift = self.reads * batch.text_ids[:, :1, None].double()
        return DiagGaussian(self.constant.mean.expand(shape) + shift, self.constant.log_std.expand(shape))


def valid_posteriors(of: list[LMBatch]) -> list[DiagGaussian]:
    return [DiagGaussian(b.posterior.mean[i, :n], b.posterior.log_std[i, :n]) for b in of for i, n in enumerate(b.latent_lengths.tolist())]


@pytest.mark.parametrize("direction", ["prediction_posterior", "posterior_prediction"])
def test_the_best_constant_has_share_one_and_ignores_texts(direction: str) -> None:
    data = batches()
    best = constant_gaussian_baseline(valid_posteriors(data), direction)
    result = probe(Stub(best.distribution), data, direction)
    assert result.share_of_constant == pytest.approx(1, abs=1e-6)
    assert result.shuffled_rise == 0
    assert (result.frames, result.utterances) == (sum(int(b.latent_lengths.sum()) for b in data), 5)
    worse = probe(Stub(DiagGaussian(best.distribution.mean + 1, best.distribution.log_std)), data, direction)
    assert worse.share_of_constant > 1


def test_a_model_that_reads_is_hurt_by_other_texts() -> None:
    data = batches()
    for batch in data:  # the text tells the mean
        batch.posterior.mean.copy_(batch.text_ids[:, :1, None].float().expand_as(batch.posterior.mean))
    result = probe(Stub(DiagGaussian(torch.zeros(D), torch.zeros(D)), reads=1.0), data)
    assert result.shuffled_rise > 0.5
    assert result.share_of_constant < 1


def test_means_are_over_frames_and_utterances_by_hand() -> None:
    data = batches()
    constant = DiagGaussian(torch.zeros(D), torch.zeros(D))
    result = probe(Stub(constant), data)
    kl = torch.cat([constant.kl_to(posterior).mean(-1) for posterior in valid_posteriors(data)])
    assert result.frame_kl == pytest.approx(float(kl.mean()), rel=1e-5)
    # KL(N(0, 1) || N(1, e)) = 1 + (1 + 1) / (2 e^2) - 1/2.
    assert result.end_kl == pytest.approx(0.5 + 1 / 7.38905609893065, rel=1e-5)


def test_shuffled_texts_travel_with_their_lengths_and_nothing_else_moves() -> None:
    data = batches()
    shuffled = list(with_shuffled_texts(data, seed=1))

    def texts(of: list[LMBatch]) -> list[tuple[int, ...]]:
        return [tuple(ids[:n].tolist()) for b in of for ids, n in zip(b.text_ids, b.text_lengths.tolist(), strict=True)]

    assert Counter(texts(shuffled)) == Counter(texts(data))
    assert all(a != b for a, b in zip(texts(shuffled), texts(data), strict=True))
    for before, after in zip(data, shuffled, strict=True):
        assert torch.equal(before.latent_lengths, after.latent_lengths)
        assert before.posterior is after.posterior


def test_the_mode_of_the_model_is_restored() -> None:
    model = Stub(DiagGaussian(torch.zeros(D), torch.zeros(D)))
    for mode in (True, False):
        model.train(mode)
        probe(model, batches(equal_texts=True))
        assert model.training is mode


def test_ratios() -> None:
    result = LMProbe(frame_kl=0.5, end_kl=0.1, shuffled_frame_kl=0.6, constant_frame_kl=2.0, frames=3, utterances=1)
    assert result.share_of_constant == 0.25
    assert result.shuffled_rise == pytest.approx(0.2)
