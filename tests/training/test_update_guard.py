"""Updates that are skipped: nothing but the skip changes, the batch is kept, and too many end the run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kalle.errors import UserError
from kalle.models.lm_batch import WaveBatch
from kalle.training.update_guard import GuardConfig, NormHistory, UpdateGuard, flattened, gradient_norm

Fit = Callable[..., lightning.Trainer]


class Line(lightning.LightningModule):
    """Fits a line to the batch's samples, automatically, or as two players that step one after the other."""

    def __init__(self, manual: bool = False, drop: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.judge = nn.Linear(8, 1), nn.Linear(8, 1)
        self.automatic_optimization = not manual
        self.drop = drop

    def configure_optimizers(self) -> Any:
        players = [self.layer, self.judge] if not self.automatic_optimization else [self.layer]
        return [torch.optim.AdamW(player.parameters(), lr=0.1) for player in players]

    def loss(self, player: nn.Module, batch: WaveBatch) -> Tensor:
        return (player(batch.wav) - 1).square().mean()

    def training_step(self, batch: WaveBatch, batch_idx: int) -> Tensor | None:
        if self.automatic_optimization:
            return self.loss(self.layer, batch)
        optimizers = self.optimizers()
        for optimizer, player in ((optimizers[1].optimizer, self.judge), (optimizers[0], self.layer)):
            optimizer.zero_grad()
            self.manual_backward(self.loss(player, batch))
            if self.global_step in self.drop:
                player.zero_grad(set_to_none=True)
            optimizer.step()
        return None

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        if self.automatic_optimization and self.global_step in self.drop:
            self.layer.zero_grad(set_to_none=True)


def batches(count: int, bad: dict[int, float] | None = None) -> list[WaveBatch]:
    generator = torch.Generator().manual_seed(1)
    made = [torch.randn(4, 8, generator=generator) for _ in range(count)]
    for index, factor in (bad or {}).items():
        made[index] = made[index] * factor
    return [WaveBatch(wav, (f"cut{index}",)) for index, wav in enumerate(made)]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("factor", [math.nan, math.inf, 1e6])
def test_a_bad_batch_changes_nothing_but_the_skip(manual: bool, factor: float, fit: Fit, tmp_path: Path) -> None:
    guard = UpdateGuard(tmp_path, GuardConfig(warmup=2, factor=100.0))
    guarded, reference = Line(manual), Line(manual, drop=(5,))
    trainer = fit(guarded, batches(8, {5: factor}), 8, callbacks=[guard])
    fit(reference, batches(8), 8)
    for (name, one), other in zip(guarded.state_dict().items(), reference.state_dict().values(), strict=True):
        assert torch.equal(one, other), name
    assert guard.skipped == (2 if manual else 1)
    assert float(trainer.callback_metrics["train/skipped"]) == guard.skipped
    kept = torch.load(tmp_path / "step-6.pt", weights_only=True)
    assert kept["batches"][0]["cut_ids"] == ("cut5",)
    torch.testing.assert_close(kept["batches"][0]["wav"], batches(8, {5: factor})[5].wav, equal_nan=True)
    assert len(kept["losses"]) == (2 if manual else 1)
    assert set(kept["gradient_norms"]) == ({0, 1} if manual else {0})


def test_accumulated_gradients_are_judged_and_kept_together(fit: Fit, tmp_path: Path) -> None:
    guard = UpdateGuard(tmp_path, GuardConfig())
    guarded, reference = Line(), Line(drop=(1,))
    fit(guarded, batches(6, {2: math.nan}), 3, callbacks=[guard], accumulate_grad_batches=2)
    fit(reference, batches(6), 3, accumulate_grad_batches=2)
    assert torch.equal(guarded.layer.weight, reference.layer.weight)
    kept = torch.load(tmp_path / "step-2.pt", weights_only=True)
    assert [batch["cut_ids"] for batch in kept["batches"]] == [("cut2",), ("cut3",)]


def test_clipping_still_follows(fit: Fit, tmp_path: Path) -> None:
    """The norm is judged before it is clipped, and clipping copes with an update that has no gradients left."""
    guard = UpdateGuard(tmp_path, GuardConfig(warmup=2))
    fit(Line(), batches(6, {4: 1e6}), 6, callbacks=[guard], gradient_clip_val=1e-3)
    assert guard.skipped == 1


@pytest.mark.parametrize(("limits", "steps"), [({"max_consecutive": 3}, 3), ({"max_consecutive": 99, "max_skipped": 5}, 5)])
def test_too_many_end_the_run_with_a_remedy(limits: dict[str, int], steps: int, fit: Fit, tmp_path: Path) -> None:
    guard = UpdateGuard(tmp_path, GuardConfig(keep_batches=2, **limits))
    with pytest.raises(UserError, match=rf"{steps} (steps in a row|updates) were skipped up to step {steps} .*nan.*lower optimizer.lr"):
        fit(Line(), batches(9, dict.fromkeys(range(9), math.nan)), 9, callbacks=[guard])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1.pt", "step-2.pt"]


def test_a_good_step_ends_the_row(fit: Fit, tmp_path: Path) -> None:
    guard = UpdateGuard(tmp_path, GuardConfig(max_consecutive=2))
    fit(Line(), batches(6, {1: math.nan, 3: math.nan, 5: math.nan}), 6, callbacks=[guard])
    assert (guard.skipped, guard.consecutive) == (3, 1)


def test_its_state_survives_a_checkpoint(fit: Fit, tmp_path: Path) -> None:
    guard, other = UpdateGuard(tmp_path, GuardConfig()), UpdateGuard(tmp_path, GuardConfig())
    fit(Line(manual=True), batches(6, {3: math.nan}), 6, callbacks=[guard])
    torch.save(guard.state_dict(), tmp_path / "state")
    other.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert other.state_dict() == guard.state_dict()
    assert len(other.state_dict()["norms"]["1"]) == 5


def test_a_full_disk_does_not_end_the_run(fit: Fit, tmp_path: Path, caplog) -> None:
    (tmp_path / "file").touch()
    fit(Line(), batches(4, {1: math.nan}), 4, callbacks=[UpdateGuard(tmp_path / "file" / "bad", GuardConfig())])
    assert "is not kept" in caplog.text


@given(norms=st.lists(st.floats(0.1, 10), min_size=1, max_size=40), factor=st.floats(101, 1000))
def test_usual_norms_are_accepted_and_history_is_bounded(norms: list[float], factor: float) -> None:
    history = NormHistory(window=10)
    assert all(history.accepts(norm, factor, warmup=3) for norm in norms)
    assert list(history.norms) == norms[-10:]
    for bad in (math.nan, math.inf):
        assert not history.accepts(bad, factor, warmup=3)


def test_a_refused_norm_does_not_move_the_median() -> None:
    history = NormHistory(10, deque([1.0] * 5))
    assert not any(history.accepts(100.0, 50.0, warmup=3) for _ in range(20))
    assert history.accepts(49.0, 50.0, warmup=3)
    assert NormHistory(10).accepts(1e9, 50.0, warmup=3), "nothing to compare with yet"


def test_gradient_norm_and_flattened() -> None:
    parameters = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert gradient_norm(parameters) == 5.0
    assert gradient_norm(parameters[2:]) == 0.0
    assert flattened(torch.ones(1)) == {"batch": torch.ones(1)}


@pytest.mark.parametrize("wrong", [{"factor": 1.0}, {"window": 0}, {"max_consecutive": 0}])
def test_wrong_values_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        GuardConfig(**wrong)
