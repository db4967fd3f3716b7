from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import next_distribution_loss
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch
from kalle.models.text_weights import CompactEmbedding, compact_vocabulary, expand_vocabulary

USED = torch.tensor([7, 3, 200, 3, 11])


@pytest.fixture
def lm(toy_lm_config: KalleLMConfig) -> KalleLM:
    torch.manual_seed(0)
    return KalleLM(toy_lm_config)


@pytest.fixture
def batch() -> LMBatch:
    generator = torch.Generator().manual_seed(1)
    mean = torch.randn(2, 6, 4, generator=generator)
    posterior = DiagGaussian(mean, torch.full_like(mean, -0.5))
    ids = torch.tensor([[7, 3, 200, 11, 11], [3, 3, 200, 0, 0]])  # padded with a token that has no row
    return LMBatch(ids, torch.tensor([5, 3]), posterior.sample(generator=generator), torch.tensor([6, 4]), posterior)


def train(lm: KalleLM, batch: LMBatch, make: Callable[..., torch.optim.Optimizer], steps: int = 4) -> None:
    optimizer = make(lm.parameters())
    for _ in range(steps):
        optimizer.zero_grad()
        next_distribution_loss(lm(batch), batch).total.backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()


def test_training_the_used_rows_is_training_the_table(lm: KalleLM, batch: LMBatch) -> None:
    whole, before = copy.deepcopy(lm), lm.backbone.embed_tokens.weight.detach().clone()
    compact_vocabulary(lm, USED)
    assert lm.backbone.embed_tokens.weight.shape == (4, 16)
    for model in (lm, whole):
        train(model, batch, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0))
    expand_vocabulary(lm)
    ours, theirs = lm.state_dict(), whole.state_dict()
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, atol=1e-6, rtol=1e-5)
    table = ours["backbone.embed_tokens.weight"]
    unused = [row for row in range(len(table)) if row not in USED.tolist()]
    assert torch.equal(table[unused], before[unused])
    assert not torch.isclose(table[USED], before[USED]).any(1).all()


def test_weight_decay_is_the_difference(lm: KalleLM, batch: LMBatch) -> None:
    """What the docs say: the whole table's unused rows shrink under decay, ours stay."""
    whole = copy.deepcopy(lm)
    compact_vocabulary(lm, USED)
    for model in (lm, whole):
        train(model, batch, lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5))
    expand_vocabulary(lm)
    ours, theirs = (model.backbone.embed_tokens.weight.detach() for model in (lm, whole))
    torch.testing.assert_close(ours[USED], theirs[USED], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(theirs[50], ours[50] * (1 - 1e-2 * 0.5) ** 4)


def test_unused_tokens_can_be_read_but_not_trained(lm: KalleLM) -> None:
    whole = copy.deepcopy(lm).eval()
    compact_vocabulary(lm, USED)
    ids = torch.tensor([[7, 50, 200], [60, 3, 11]])
    with pytest.raises(AssertionError, match=r"tokens without a row in training: \[50, 60\]"):
        lm.backbone.embed_tokens(ids)
    lm.eval()
    assert torch.equal(lm.backbone.embed_tokens(ids), whole.backbone.embed_tokens(ids))
    assert torch.equal(lm.predict(ids).mean, whole.predict(ids).mean)


def test_the_mapping_travels_with_the_state(lm: KalleLM, batch: LMBatch) -> None:
    other = copy.deepcopy(lm)
    compact_vocabulary(lm, USED)
    train(lm, batch, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    compact_vocabulary(other, USED)
    other.load_state_dict(lm.state_dict())
    assert torch.equal(other.eval()(batch).mean, lm.eval()(batch).mean)
    expand_vocabulary(other)
    compact_vocabulary(other, torch.tensor([7, 3, 200, 12]))
    with pytest.raises(UserError, match="the checkpoint trains 4 text tokens, this run 4 others, of other texts"):
        other.load_state_dict(lm.state_dict())


def test_copies_share_the_table(lm: KalleLM) -> None:
    compact_vocabulary(lm, USED)
    copied = copy.deepcopy(lm)
    one, other = lm.backbone.embed_tokens, copied.backbone.embed_tokens
    assert isinstance(one, CompactEmbedding)
    assert isinstance(other, CompactEmbedding)
    assert one._table is other._table
    assert one.weight is not other.weight
    assert sum(tensor.numel() for tensor in one.state_dict().values()) == 4 * 16 + lm.vocab_size


def test_frozen_stays_frozen(lm: KalleLM) -> None:
    lm.backbone.embed_tokens.requires_grad_(False)
    compact_vocabulary(lm, USED)
    assert not lm.backbone.embed_tokens.weight.requires_grad
    expand_vocabulary(lm)
    assert not lm.backbone.embed_tokens.weight.requires_grad
    expand_vocabulary(lm)
