from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR

from kalle.errors import UserError
from kalle.training.optimisation import Exponential, WarmupCosine


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
