from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import stop_bce
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch, Packing
from kalle.training.lm import KalleLMTraining, LMObjective
from kalle.training.optimisation import WarmupCosine


def utterances(lengths: list[int], seed: int = 3) -> LMBatch:
    generator = torch.Generator().manual_seed(seed)
    frames, count = torch.tensor(lengths), len(lengths)
    mean = 1.5 * torch.randn(count, max(lengths), 4, generator=generator)
    posterior = DiagGaussian(mean, torch.full_like(mean, -0.5))
    valid = (torch.arange(max(lengths)) < frames[:, None])[..., None]
    ids = torch.randint(0, 256, (count, 5), generator=generator)
    return LMBatch(ids, torch.full((count,), 5), posterior.sample(generator=generator) * valid, frames, posterior)


@pytest.fixture
def make(toy_lm_config: KalleLMConfig) -> Callable[..., KalleLMTraining]:
    def build(packing: Packing | None = None, steps: int = 60, stop_head: bool = True, **objective: Any) -> KalleLMTraining:
        torch.manual_seed(7)
        schedule = WarmupCosine(warmup_steps=3, total_steps=steps, final_ratio=0.1)
        lm = KalleLM(dataclasses.replace(toy_lm_config, stop_head=stop_head))
        return KalleLMTraining(lm, partial(torch.optim.AdamW, lr=1e-2), schedule, LMObjective(**objective), packing=packing)

    return build


def test_learns_where_utterances_end(make, fit) -> None:
    batch = utterances([9, 6, 4])
    module = make(steps=90)
    fit(module, [batch], 90)
    with torch.no_grad():
        logit = module.lm(batch).stop_logit
    rows = torch.arange(10)
    assert bool((logit[rows == batch.latent_lengths[:, None]] > 0).all())
    assert bool((logit[rows < batch.latent_lengths[:, None]] < 0).all())


@pytest.mark.parametrize("packing", [None, Packing(16)])
def test_the_total_holds_the_weighted_loss_of_the_head(packing: Packing | None, make) -> None:
    batch = utterances([9, 6, 4])
    losses = make(packing, stop_weight=0.3, stop_positive_weight=20.0).losses(batch)
    plain = make(packing, stop_head=False).losses(batch)
    assert "stop_bce" not in plain
    assert torch.equal(losses["frame_kl"], plain["frame_kl"])
    torch.testing.assert_close(losses["total"], plain["total"] + 0.3 * losses["stop_bce"])
    expected = stop_bce(make().lm(batch).stop_logit, batch.latent_lengths, 20.0)
    torch.testing.assert_close(losses["stop_bce"], expected)


def test_both_reductions_agree_in_one_process(make) -> None:
    batch, module = utterances([9, 6, 4]), make(stop_weight=0.3)
    losses = module.losses(batch)
    torch.testing.assert_close(module._over_ranks(losses, batch), losses["total"])


def test_validation_is_the_mean_over_all_rows_of_the_split(make, fit) -> None:
    batches = [utterances([9, 6, 4]), utterances([30], seed=4)]
    module = make(steps=1)
    trainer = fit(module, batches[:1], 1, valid=batches)
    assert float(trainer.callback_metrics["train/stop_bce"]) > 0
    with torch.no_grad():
        values = [float(module.losses(batch)["stop_bce"]) for batch in batches]
    assert values[0] != pytest.approx(values[1], rel=1e-2)
    assert float(trainer.callback_metrics["val/stop_bce"]) == pytest.approx((22 * values[0] + 31 * values[1]) / 53, rel=1e-5)


@pytest.mark.parametrize("key", ["stop_weight", "stop_positive_weight"])
def test_a_weight_that_is_no_number_is_named(key: str) -> None:
    with pytest.raises(UserError, match=rf"objective\.{key}: got 'x', expected a number"):
        LMObjective(**{key: "x"})
