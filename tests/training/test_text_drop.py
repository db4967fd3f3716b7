from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch, Packing
from kalle.text.tokenizer import Tokenizer, prompt_ids, without_text
from kalle.training.lm import KalleLMTraining, LMObjective

COUNT = 40


@pytest.fixture
def batch() -> LMBatch:
    generator = torch.Generator().manual_seed(3)
    texts = [prompt_ids(Tokenizer.bytes(), "word " * (1 + number % 4)) for number in range(COUNT)]
    ids = torch.nn.utils.rnn.pad_sequence(texts, batch_first=True)
    lengths = torch.tensor([len(text) for text in texts])
    posterior = DiagGaussian(torch.randn(COUNT, 3, 4, generator=generator), torch.full((COUNT, 3, 4), -0.5))
    cuts = tuple(f"cut{number}" for number in range(COUNT))
    latents = posterior.sample(generator=generator)
    return LMBatch(ids, lengths, latents, torch.full((COUNT,), 3), posterior, cut_ids=cuts, epochs=(2,) * COUNT)


@pytest.fixture
def make(toy_lm_config: KalleLMConfig) -> Callable[..., KalleLMTraining]:
    def build(seed: int = 0, packing: Packing | None = None, **objective: Any) -> KalleLMTraining:
        torch.manual_seed(7)
        nothing = partial(torch.optim.AdamW, lr=1e-3)
        return KalleLMTraining(KalleLM(toy_lm_config), nothing, nothing, LMObjective(**objective), seed, packing=packing)  # type: ignore[arg-type]

    return build


def dropped(before: LMBatch, after: LMBatch) -> list[str]:
    return [cut for cut, old, new in zip(before.cut_ids, before.text_lengths, after.text_lengths, strict=True) if old != new]


def test_a_dropped_text_keeps_its_special_tokens_alone(make, batch: LMBatch) -> None:
    assert make(text_drop=0.0).augmented(batch) is batch
    after = make(text_drop=0.5).augmented(batch)
    gone = dropped(batch, after)
    assert 10 < len(gone) < 30
    tokenizer = Tokenizer.bytes()
    bare = torch.tensor([prompt_ids(tokenizer, "a")[0], *prompt_ids(tokenizer, "a")[-2:]])
    for row, cut in enumerate(batch.cut_ids):
        length = int(after.text_lengths[row])
        expected = bare if cut in gone else batch.text_ids[row, :length]
        assert torch.equal(after.text_ids[row, :length], expected)
        assert not after.text_ids[row, length:].any()
    everything = make(text_drop=1.0).augmented(batch)
    assert len(dropped(batch, everything)) == COUNT
    assert torch.equal(everything.text_ids[:, :3], without_text(bare[None]).expand(COUNT, 3))


def test_drops_are_a_function_of_seed_epoch_and_utterance(make, batch: LMBatch) -> None:
    module = make(text_drop=0.5)
    first = dropped(batch, module.augmented(batch, (5, 1, 0)))
    order = list(range(COUNT))[::-1]
    turned = LMBatch(
        batch.text_ids[order], batch.text_lengths[order], batch.latents[order], batch.latent_lengths[order],
        cut_ids=batch.cut_ids[::-1], epochs=batch.epochs,
    )  # fmt: skip
    assert dropped(turned, module.augmented(turned, (9, 9, 9))) == first[::-1]
    later = dataclasses.replace(batch, epochs=(3,) * COUNT)
    assert dropped(later, module.augmented(later)) != first
    assert dropped(batch, make(seed=1, text_drop=0.5).augmented(batch)) != first


def test_the_noise_of_a_sample_is_the_same_with_and_without(make, batch: LMBatch) -> None:
    one, other = (make(text_drop=drop, input_noise=0.5).augmented(batch) for drop in (0.0, 0.5))
    assert torch.equal(one.latents, other.latents)
    assert dropped(one, other)


def test_the_loss_is_that_of_the_shorter_texts_padded_or_packed(make, batch: LMBatch) -> None:
    padded, packed = make(text_drop=0.5), make(text_drop=0.5, packing=Packing(64))
    after = padded.augmented(batch)
    torch.testing.assert_close(packed.losses(after)["total"], padded.losses(after)["total"], atol=1e-5, rtol=1e-5)
    alone = [
        padded.lm.predict_all(after.text_ids[row : row + 1, : int(after.text_lengths[row])], after.latents[row : row + 1]).mean
        for row in range(COUNT)
    ]
    torch.testing.assert_close(padded.lm(after).mean, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("drop", [-0.1, 1.5])
def test_no_probability_is_named(drop: float) -> None:
    with pytest.raises(UserError, match=r"objective\.text_drop: got .*, expected a probability from 0 to 1"):
        LMObjective(text_drop=drop)
