from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from kalle.errors import UserError
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lora import LoRAConfig, add_lora
from kalle.training.optimisation import (
    Exponential,
    WarmupCosine,
    draws_dropout,
    finish_training,
    freeze,
    parameter_counts,
    parameter_groups,
)


def rates(make, steps: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule: LambdaLR = make(optimizer)
    result = []
    for _ in range(steps):
        result.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return result


def test_warmup_cosine_by_hand() -> None:
    got = rates(WarmupCosine(warmup_steps=4, total_steps=12, final_ratio=0.1), 15)
    assert got[:5] == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0])
    assert got[8] == pytest.approx(2 * (0.1 + 0.9 * 0.5))
    assert got[6] == pytest.approx(2 * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4))))
    assert got[12:] == pytest.approx([0.2] * 3)
    assert all(a >= b for a, b in itertools.pairwise(got[4:]))


def test_warmup_cosine_without_warmup_and_shorter_than_its_warmup() -> None:
    assert rates(WarmupCosine(0, 2), 4) == pytest.approx([2.0, 1.0, 0.0, 0.0])
    assert rates(WarmupCosine(10, 5), 5) == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_exponential_by_hand() -> None:
    assert rates(Exponential(0.5), 4) == pytest.approx([2.0, 1.0, 0.5, 0.25])
    assert rates(Exponential(1.0, warmup_steps=2), 4) == pytest.approx([1.0, 2.0, 2.0, 2.0])
    assert rates(Exponential(0.5, warmup_steps=2), 3) == pytest.approx([1.0, 1.0, 0.5])


def test_a_cosine_needs_an_end() -> None:
    for steps in (0, -1):
        with pytest.raises(UserError, match=rf"scheduler.total_steps: got {steps}, expected at least 1"):
            WarmupCosine(1, steps)


@pytest.fixture
def lm(toy_lm_config: KalleLMConfig) -> KalleLM:
    torch.manual_seed(0)
    return KalleLM(toy_lm_config)


def test_frozen_parts_do_not_reach_the_optimizer(lm: KalleLM) -> None:
    everything = parameter_counts(lm)
    assert everything[0] == everything[1]
    freeze(lm, ["backbone.embed_tokens.*", "backbone.layers.0.*"])
    names = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert "backbone.layers.1.mlp.up_proj.weight" in names
    assert not any("embed_tokens" in name or "layers.0." in name for name in names)
    given = sum(parameter.numel() for group in parameter_groups(lm) for parameter in group["params"])
    assert given == parameter_counts(lm)[0] < everything[1] == parameter_counts(lm)[1]


def test_a_pattern_that_fits_nothing_is_an_error(lm: KalleLM) -> None:
    with pytest.raises(UserError, match=r"freeze: no parameter fits 'backbone.embed'; names begin with audio_linear, backbone"):
        freeze(lm, ["audio_linear.*", "backbone.embed"])
    assert all(parameter.requires_grad for parameter in lm.parameters())
    with pytest.raises(UserError):
        freeze(lm, ["*"])


def test_decay_can_spare_norms_biases_and_embeddings(lm: KalleLM) -> None:
    assert [set(group) for group in parameter_groups(lm)] == [{"params"}]
    kept, bare = parameter_groups(lm, decay_all=False)
    assert "weight_decay" not in kept
    assert bare["weight_decay"] == 0
    assert all(parameter.ndim == 2 for parameter in kept["params"])
    spared = {id(parameter) for parameter in bare["params"]}
    assert id(lm.backbone.embed_tokens.weight) in spared
    assert id(lm.audio_linear.bias) in spared
    assert len(kept["params"]) + len(bare["params"]) == len(list(lm.parameters()))


def test_dropout_is_seen(lm: KalleLM) -> None:
    assert not draws_dropout(lm)
    add_lora(lm, LoRAConfig(rank=1, dropout=0.1))
    assert draws_dropout(lm)
    names = set(lm.state_dict())
    finish_training(lm)
    assert not any("lora" in name for name in lm.state_dict())
    assert len(lm.state_dict()) < len(names)


def test_adapters_can_be_frozen_in_part(lm: KalleLM) -> None:
    add_lora(lm, LoRAConfig(rank=1, also_train=("audio_linear.*",)))
    freeze(lm, ["backbone.layers.0.*", "audio_linear.bias"])
    training = {name for name, parameter in lm.named_parameters() if parameter.requires_grad}
    assert "audio_linear.weight" in training
    assert "audio_linear.bias" not in training
    assert any(".layers.1." in name for name in training)
    assert not any(".layers.0." in name for name in training)
