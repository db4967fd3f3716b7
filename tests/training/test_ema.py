from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils._python_dispatch import TorchDispatchMode

from kalle.training.callbacks import EMA, ema_update


class Weights(nn.Module):
    """Two weights and a counter."""

    def __init__(self, first: float, second: float, count: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.tensor([first], dtype=dtype))
        self.register_buffer("second", torch.tensor([second], dtype=dtype))
        self.register_buffer("count", torch.tensor(count))


def average_of(model: nn.Module, updates: int, decay: float) -> AveragedModel:
    average = AveragedModel(model, multi_avg_fn=ema_update(decay), use_buffers=True)
    average.n_averaged.fill_(updates)
    return average


@pytest.mark.parametrize(
    ("updates", "decay", "expected"),
    [(1, 0.9999, [9 / 11, 20 / 11]), (8, 0.9999, [0.5, 5.0]), (10**9, 0.99, [0.01, 9.9]), (8, 0.25, [0.75, 2.5]), (0, 0.9, [1.0, 0.0])],
)
def test_values_by_hand(updates: int, decay: float, expected: list[float]) -> None:
    """After n updates the decay is min(decay, (1 + n) / (10 + n)); the first copies, and a counter is taken over."""
    average, current = average_of(Weights(0.0, 10.0, 3), updates, decay), Weights(1.0, 0.0, 9)
    average.update_parameters(current)
    torch.testing.assert_close(torch.cat([average.module.first.detach(), average.module.second]), torch.tensor(expected))
    assert (int(average.module.count), int(average.n_averaged)) == (9, updates + 1)
    assert (float(current.first.detach()), float(current.second), int(current.count)) == (1.0, 0.0, 9)


class NumbersRead(TorchDispatchMode):
    """Counts how often a number is read out of a tensor, which on a GPU waits for all work before it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_the_numbers_an_update_reads_do_not_grow_with_the_weights() -> None:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(25)))
    average = average_of(model, 3, 0.9)
    with NumbersRead() as read:
        average.update_parameters(model)
    assert read.count <= 3


class Line(lightning.LightningModule):
    """One weight that an SGD step moves from n to n + 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return -self.weight.sum()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.seen.append(float(self.weight))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


def expected_averages(steps: int, decay: float) -> list[float]:
    """The first update copies the weights; the ones after it average."""
    average, values = 1.0, [1.0]
    for n in range(1, steps):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * (n + 1)
        values.append(average)
    return values


def test_validation_and_the_end_use_the_average_and_training_does_not() -> None:
    module, during = Line(), []

    class Spy(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            during.append(float(pl_module.weight))

    trainer = lightning.Trainer(
        max_steps=6, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=2, check_val_every_n_epoch=None,
        callbacks=[EMA(0.5), Spy()],
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.zeros(4, 1))
    trainer.fit(module, data, torch.utils.data.DataLoader(torch.zeros(1, 1)))
    averages, tolerance = expected_averages(6, 0.5), 1e-6
    assert during == [0, 1, 2, 3, 4, 5]
    assert module.seen == pytest.approx([averages[1], averages[3], averages[5]], rel=tolerance)
    assert float(module.weight) == pytest.approx(averages[5], rel=tolerance)
    assert averages[5] < 6
