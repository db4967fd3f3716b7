"""Skips updates that would ruin the weights, stores their batches for inspection, and ends a run that has too many."""

from __future__ import annotations

import dataclasses
import logging
import math
import statistics
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.optim import Optimizer

from kalle.checkpoint import check_fields, check_range
from kalle.errors import UserError
from kalle.files import DiskError
from kalle.training.checkpointing import save_atomic

logger = logging.getLogger(__name__)


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """The L2 norm over all gradients, of all ranks' parts where they are sharded; 0.0 without any."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return 0.0
    norm = torch.nn.utils.get_total_norm(gradients)
    return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)


@dataclasses.dataclass
class NormHistory:
    """The norms of the last ``window`` accepted updates of one optimizer."""

    window: int
    norms: deque[float] = dataclasses.field(default_factory=deque)

    def accepts(self, norm: float, factor: float, warmup: int) -> bool:
        """Whether ``norm`` is finite and, behind ``warmup`` updates, at most ``factor`` medians; an accepted norm joins the history."""
        if not math.isfinite(norm):
            return False
        if len(self.norms) >= min(warmup, self.window) and self.norms and norm > factor * statistics.median(self.norms):
            return False
        self.norms.append(norm)
        while len(self.norms) > self.window:
            self.norms.popleft()
        return True


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """Which updates are skipped, and when a run that skips too many ends."""

    factor: float = 50.0
    """An update is skipped when its gradient norm is not finite, or larger than this many running medians."""
    window: int = 100
    """Updates in the median."""
    warmup: int = 20
    """Updates before anything but NaN and infinity is skipped."""
    max_consecutive: int = 10
    """Steps in a row that skip; then the run ends."""
    max_skipped: int | None = 1000
    """Skipped updates of the whole run; null: any number."""
    keep_batches: int = 10
    """Of the skipped, written for inspection."""

    def __post_init__(self) -> None:
        check_fields(self, "callbacks.guard")
        check_range(self, "callbacks.guard", "max_skipped", "keep_batches")
        for name in ("window", "warmup", "max_consecutive"):
            if getattr(self, name) < 1:
                raise UserError(f"callbacks.guard.{name}: got {getattr(self, name)}, expected at least 1; correct it")
        if self.factor <= 1:
            raise UserError(
                f"callbacks.guard.factor: got {self.factor}, expected more than 1; correct it, or callbacks.guard=null for no guard"
            )


class UpdateGuard(Callback):
    """Checks every update by its gradient norm before clipping; a refused one is skipped: its gradients are dropped.

    AdamW then changes neither weights nor moments; schedules and counters advance. The norm is that of the synchronised gradients, so all
    ranks decide alike. With accumulated gradients the sum is checked, and all its batches are kept. Each optimizer (a GAN has two) has a
    history of its own. What was skipped is logged as train/skipped and written to ``folder``/step-N.pt (with several ranks
    step-N.rank-R.pt), the first ``keep_batches`` of them: tensors, cut ids, losses, norm, all loadable with ``weights_only=True``.

    A UserError ends the run after ``max_consecutive`` steps in a row or ``max_skipped`` updates in total.
    """

    def __init__(self, folder: str | Path, config: GuardConfig) -> None:
        self.folder, self.config = Path(folder), config
        self.skipped = self.consecutive = self.kept = 0
        self._histories: dict[int, NormHistory] = {}
        self._batches: list[tuple[int, Any]] = []
        self._losses: list[Tensor] = []
        self._refused: list[tuple[int, float]] = []
        self._hooks: list[Any] = []
        self._begun_step = -1

    def state_dict(self) -> dict[str, Any]:
        """Counts and histories: a resumed run must decide alike."""
        norms = {str(index): list(history.norms) for index, history in self._histories.items()}
        return {"skipped": self.skipped, "consecutive": self.consecutive, "kept": self.kept, "norms": norms}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.skipped, self.consecutive, self.kept = state_dict["skipped"], state_dict["consecutive"], state_dict["kept"]
        for index, norms in state_dict["norms"].items():
            self._histories[int(index)] = NormHistory(self.config.window, deque(norms))

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Under manual optimisation, hook into the optimizers, because Lightning does not see all of them."""
        if pl_module.automatic_optimization:
            return
        norms: dict[int, Tensor] = getattr(pl_module, "gradient_norms", {})
        for index, optimizer in enumerate(trainer.optimizers):

            def before_step(optimizer: Optimizer, *_: Any, index: int = index) -> None:
                self._check(index, optimizer, norms.pop(index, None))

            self._hooks.append(optimizer.register_step_pre_hook(before_step))

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, batch: Any, batch_idx: int) -> None:
        """Store the batches of this update."""
        if not self._batches:
            self._begun_step = trainer.global_step
        self._batches.append((batch_idx, batch))

    def on_before_backward(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, loss: Tensor) -> None:
        """Store its losses, on their device."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, optimizer: Optimizer) -> None:
        """Check an automatic update."""
        if pl_module.automatic_optimization:
            self._check(0, optimizer, None)

    def _check(self, index: int, optimizer: Optimizer, norm: Tensor | None) -> None:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        value = gradient_norm(parameters) if norm is None else float(norm)
        history = self._histories.setdefault(index, NormHistory(self.config.window))
        if not history.accepts(value, self.config.factor, self.config.warmup):
            self._refused.append((index, value))
            for parameter in parameters:
                parameter.grad = None

    def on_train_batch_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, *arguments: Any) -> None:
        """Count and store refused updates; end the run when there are too many."""
        pl_module.log("train/skipped", float(self.skipped + len(self._refused)))
        if trainer.global_step == self._begun_step:  # gradients are being accumulated
            return
        refused, batches, losses = self._refused, self._batches, self._losses
        self._refused, self._batches, self._losses = [], [], []
        if not refused:
            self.consecutive = 0
            return
        self.skipped += len(refused)
        self.consecutive += 1
        step = trainer.global_step
        norms = ", ".join(f"{norm:.3g}" for _, norm in refused)
        if trainer.is_global_zero:
            logger.warning("step %d is skipped: gradient norm %s (%d skipped so far)", step, norms, self.skipped)
        if self.kept < self.config.keep_batches:
            self.kept += 1
            self._keep(trainer, refused, batches, losses)
        self._check_limits(step, norms)

    def _keep(self, trainer: lightning.Trainer, refused: list[tuple[int, float]], batches: list[Any], losses: list[Tensor]) -> None:
        rank = f".rank-{trainer.global_rank}" if trainer.world_size > 1 else ""
        content = {
            "step": trainer.global_step,
            "epoch": trainer.current_epoch,
            "rank": trainer.global_rank,
            "gradient_norms": dict(refused),
            "losses": [float(loss) for loss in losses],
            "batches": [{"batch_idx": index, **flattened(batch)} for index, batch in batches],
        }
        try:
            save_atomic(content, self.folder / f"step-{trainer.global_step}{rank}.pt")
        except DiskError as error:
            logger.warning("the batch of the skipped step %d is not kept: %s", trainer.global_step, error)

    def _check_limits(self, step: int, norms: str) -> None:
        remedy = (
            f"look at '{self.folder}', then lower optimizer.lr or warm up longer and resume from a checkpoint before the trouble, "
            "or raise callbacks.guard.factor if the norms are only large"
        )
        if self.consecutive >= self.config.max_consecutive:
            raise UserError(f"{self.consecutive} steps in a row were skipped up to step {step} (last gradient norm {norms}); {remedy}")
        limit = self.config.max_skipped
        if limit is not None and self.skipped >= limit:
            raise UserError(f"{self.skipped} updates were skipped up to step {step} (last gradient norm {norms}); {remedy}")

    def teardown(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Remove the hooks from the optimizers."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []


def flattened(batch: Any, prefix: str = "") -> dict[str, Any]:
    """The tensors (on the CPU) and plain values of a batch, fields of fields as ``outer.inner``."""
    if not dataclasses.is_dataclass(batch):
        return {prefix or "batch": batch.detach().cpu() if isinstance(batch, Tensor) else batch}
    values: dict[str, Any] = {}
    for field in dataclasses.fields(batch):
        values |= flattened(getattr(batch, field.name), f"{prefix}.{field.name}" if prefix else field.name)
    return values
