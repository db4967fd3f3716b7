"""The speed of training: real trainers, their steps timed one by one, baselines alternating so that they share the machine's other load."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from torch.utils.data import DataLoader

from kalle.data.loading.samplers import FixedSizeBatchSampler, Sample
from kalle.losses.latent import next_distribution_loss
from kalle.models.batch import LMBatch, WaveBatch
from kalle.models.lm import KalleLM

Amount = Callable[[Any], int]
"""The unit of a batch, such as frames."""


@dataclass
class Rival:
    """One way to train, and what was measured of it."""

    name: str
    module: Callable[[], lightning.LightningModule]
    """Makes the module, with the same weights every time."""
    loader: Callable[[], DataLoader]
    precision: str = "32-true"
    seconds: list[float] = field(default_factory=list)
    """Wall time of each step, the wait for its batch included."""
    frames: list[int] = field(default_factory=list)
    """Latent frames that each step trained on."""
    padding: list[float] = field(default_factory=list)
    """Share of the positions of each step that held nothing."""

    @property
    def step_seconds(self) -> float:
        """Median wall time of a step."""
        return statistics.median(self.seconds)

    @property
    def frames_per_second(self) -> float:
        """Frames over wall time, of all steps together."""
        return sum(self.frames) / sum(self.seconds)

    @property
    def padding_share(self) -> float:
        """Mean share of padding."""
        return statistics.fmean(self.padding) if self.padding else 0.0


class StepClock(Callback):
    """Times the steps behind the first ``warmup`` into a rival."""

    def __init__(self, rival: Rival, warmup: int, frames: Amount, device: torch.device) -> None:
        self.rival, self.warmup, self.frames, self.device = rival, warmup, frames, device
        self._last = 0.0

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From the end of one step to the end of the next."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        now = time.perf_counter()
        if batch_idx >= self.warmup:
            self.rival.seconds.append(now - self._last)
            self.rival.frames.append(self.frames(batch))
            share = trainer.callback_metrics.get("train/padding_share")
            if share is not None:
                self.rival.padding.append(float(share))
        self._last = now


def race(
    rivals: Sequence[Rival],
    device: torch.device,
    *,
    steps: int,
    rounds: int,
    warmup: int,
    frames: Amount,
    watch: Callable[[Rival], Any] | None = None,
) -> None:
    """Give every rival ``rounds`` turns of ``warmup`` and then ``steps`` timed steps.

    ``watch(rival)``, when given, is a context manager around each turn, for memory.
    """
    assert warmup > 0, "the first step has no beginning"
    for _ in range(rounds):
        for rival in rivals:
            clock = StepClock(rival, warmup, frames, device)
            trainer = lightning.Trainer(
                max_steps=warmup + steps,
                max_epochs=-1,
                accelerator="gpu" if device.type == "cuda" else "cpu",
                devices=1,
                precision=rival.precision,  # type: ignore[arg-type]
                callbacks=[clock],
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )
            module, loader = rival.module(), rival.loader()
            if watch is None:
                trainer.fit(module, loader, weights_only=True)
            else:
                with watch(rival):
                    trainer.fit(module, loader, weights_only=True)


class PlainLMTraining(lightning.LightningModule):
    """The baseline of `kalle bench train lm`: padded rows, AdamW, the loss."""

    def __init__(self, lm: KalleLM, learning_rate: float = 5e-5) -> None:
        super().__init__()
        self.lm, self.learning_rate = lm, learning_rate

    def training_step(self, batch: LMBatch, batch_idx: int) -> Tensor:
        """The loss of one padded batch."""
        real = int((batch.text_lengths + batch.latent_lengths).sum())
        widest = int((batch.text_lengths + batch.latent_lengths).max())
        self.log("train/padding_share", 1 - real / (len(batch.text_ids) * widest), batch_size=1)
        return next_distribution_loss(self.lm(batch), batch).total

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW over everything."""
        return torch.optim.AdamW(self.lm.parameters(), self.learning_rate)


class _VisitBatches:
    """Batches of a plan as a PyTorch batch sampler, without this project's bookkeeping."""

    def __init__(self, plan: FixedSizeBatchSampler) -> None:
        self.plan = plan

    def __iter__(self) -> Any:
        return iter([[Sample(0, item) for item in batch] for batch in self.plan(0)])

    def __len__(self) -> int:
        return len(self.plan(0))


def plain_loader(dataset: Any, batch_size: int, seed: int) -> DataLoader:
    """Random batches of ``batch_size`` items, loaded in the process itself."""
    sampler: Any = _VisitBatches(FixedSizeBatchSampler(len(dataset), batch_size, seed=seed))
    return DataLoader(dataset, batch_size=None, sampler=sampler, collate_fn=_same)


def _same(batch: Any) -> Any:
    return batch


def lm_frames(batch: LMBatch) -> int:
    """Latent frames of a batch, padding not counted."""
    return int(batch.latent_lengths.sum())


def wave_frames(batch: WaveBatch, hop_length: int) -> int:
    """Latent frames of a batch of crops."""
    return batch.wav.numel() // hop_length


def wave_amount(hop_length: int) -> Amount:
    """`wave_frames` with its hop."""
    return partial(wave_frames, hop_length=hop_length)


def matmul_flops_per_second(device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 1.0) -> float:
    """Floating-point operations a second of square matrix products, the roof of this device for ``dtype``: the best of many."""
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or best == float("inf"):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def lm_step_flops(lm: KalleLM, batch: LMBatch) -> int:
    """Model operations of a training step on ``batch``, padding not counted: 6 per weight and position, and causal attention.

    The text embedding is looked up, not multiplied. Attention takes 2 products of 2 * heads * head_dim * (positions seen) per position and
    layer, three times with the backward pass (as in PaLM, arXiv 2204.02311, appendix B, halved for the causal mask).
    """
    config = lm.backbone.config
    weights = sum(p.numel() for name, p in lm.named_parameters() if "embed_tokens" not in name and not name.startswith("speaker"))
    lengths = (batch.text_lengths + batch.latent_lengths).double()
    width = config.num_attention_heads * (config.head_dim or config.hidden_size // config.num_attention_heads)
    attention = 6.0 * config.num_hidden_layers * width * float((lengths * (lengths + 1)).sum())
    return int(6 * weights * float(lengths.sum()) + attention)
