from __future__ import annotations

from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kalle.training.ema import EMA, warmed_averages


@pytest.mark.parametrize(
    ("updates", "decay", "expected"),
    [(0, 0.9999, [0.9, 1.0]), (torch.tensor(8), 0.9999, [0.5, 5.0]), (10**9, 0.99, [0.01, 9.9]), (8, 0.25, [0.75, 2.5])],
)
def test_values_by_hand(updates: Tensor | int, decay: float, expected: list[float]) -> None:
    """After n updates the decay is min(decay, (1 + n) / (10 + n))."""
    averages, current = [torch.tensor([0.0]), torch.tensor([10.0])], [torch.tensor([1.0]), torch.tensor([0.0])]
    warmed_averages(averages, current, updates, decay)
    torch.testing.assert_close(torch.cat(averages), torch.tensor(expected))
    assert [float(value) for value in current] == [1.0, 0.0]


def test_an_average_keeps_its_precision() -> None:
    averages = [torch.tensor([1.0])]
    warmed_averages(averages, [torch.tensor([1.0 + 2**-7], dtype=torch.bfloat16)], 10**9, 0.75)
    assert averages[0].dtype == torch.float32
    assert float(averages[0]) == 1.0 + 2**-9


def test_integers_are_taken_over() -> None:
    averages = [torch.tensor(3)]
    warmed_averages(averages, [torch.tensor(9)], 5, 0.99)
    assert averages[0].dtype == torch.int64
    assert int(averages[0]) == 9


class CountedFloats(TorchDispatchMode):
    """Counts how often a number is read out of a tensor, which on a GPU waits for all work before it."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_an_update_reads_one_number_however_many_weights_there_are() -> None:
    averages, current = [torch.zeros(1) for _ in range(50)], [torch.ones(1) for _ in range(50)]
    with CountedFloats() as counted:
        warmed_averages(averages, current, torch.tensor(3), 0.9)
    assert counted.count == 1


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


def test_validation_and_the_end_use_the_average_and_training_does_not(tmp_path) -> None:
    module, during = Line(), []

    class Spy(lightning.Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            during.append(float(pl_module.weight))

    trainer = lightning.Trainer(
        max_steps=6, max_epochs=-1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, val_check_interval=2, check_val_every_n_epoch=None, callbacks=[EMA(0.5), Spy()],
    )  # fmt: skip
    data = torch.utils.data.DataLoader(torch.zeros(4, 1))
    trainer.fit(module, data, torch.utils.data.DataLoader(torch.zeros(1, 1)))
    averages = expected_averages(6, 0.5)
    assert during == [0, 1, 2, 3, 4, 5]
    assert module.seen == pytest.approx([averages[1], averages[3], averages[5]])
    assert float(module.weight) == pytest.approx(averages[5])
    assert averages[5] < 6
