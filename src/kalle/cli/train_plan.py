"""What a training is going to do, in numbers: data, steps, memory, compute and disk."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule
    from kalle.training.footprint import Footprint

MIXED_ACTIVATIONS = 0.6
"""Of the fp32 bytes, with bf16: matrix products keep half, norms and losses all."""


@dataclass(frozen=True)
class SplitCount:
    """How much one split holds."""

    items: int
    hours: float
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """The numbers; `lines` words them."""

    stage: str
    parameters: int
    trained: int
    averaged: bool
    precision: str
    processes: int
    splits: Mapping[str, SplitCount]
    batches_per_epoch: int
    accumulate: int
    max_steps: int | None
    max_epochs: int | None
    kept_checkpoints: int
    resumed_from: Path | None
    free_bytes: int
    footprint: Footprint | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Updates an epoch."""
        return math.ceil(self.batches_per_epoch / self.accumulate)

    @property
    def steps(self) -> int:
        """Updates of the whole run."""
        ends = [self.max_steps] if self.max_steps is not None else []
        return min([*ends, *([self.max_epochs * self.steps_per_epoch] if self.max_epochs is not None else [])])

    @property
    def checkpoint_bytes(self) -> int:
        """fp32 weights and AdamW's two moments, and the averaged weights."""
        return 4 * self.parameters * (2 if self.averaged else 1) + 8 * self.trained

    def lines(self) -> list[str]:
        """One fact a line."""
        found = [self._data(), self._steps()]
        if self.footprint is not None:
            found += [self._memory(self.footprint), self._compute(self.footprint)]
        needed = (self.kept_checkpoints + 1) * self.checkpoint_bytes + 4 * self.parameters
        found.append(
            f"disk: {_bytes(self.checkpoint_bytes)} a checkpoint, at most {_bytes(needed)} with the weights ({_bytes(self.free_bytes)} free"
            + ("; TOO LITTLE: make room, or lower callbacks.checkpoint.keep)" if needed > self.free_bytes else ")")
        )
        start = "the first step" if self.resumed_from is None else f"'{self.resumed_from}'"
        found.append(f"start: {start}")
        return found

    def _data(self) -> str:
        parts = []
        for name, split in self.splits.items():
            reasons = "".join(f", {count} left out: {reason}" for reason, count in split.left_out.items())
            parts.append(f"{name} {split.items} utterances, {split.hours:.2f} h{reasons}")
        return "data: " + "; ".join(parts)

    def _steps(self) -> str:
        epochs = self.steps / self.steps_per_epoch
        hours = epochs * self.splits["train"].hours
        amount = f"{epochs:.1f} epochs, {hours:.1f} h of speech"
        return f"steps: {self.steps} of {self.steps_per_epoch} an epoch on {self.processes} process(es): {amount}"

    def _memory(self, footprint: Footprint) -> str:
        weights, copies = 4 * self.parameters, 4 * self.parameters if self.averaged else 0
        factor = 1.0 if self.precision.startswith("32") else MIXED_ACTIVATIONS
        activations = round(factor * footprint.activation_bytes)
        total = weights + 12 * self.trained + copies + activations
        return (
            f"memory a process, estimated: {_bytes(total)} = weights {_bytes(weights)}, gradients {_bytes(4 * self.trained)}, "
            f"AdamW {_bytes(8 * self.trained)}, average {_bytes(copies)}, activations {_bytes(activations)} ({footprint.batch})"
        )

    def _compute(self, footprint: Footprint) -> str:
        step = footprint.flops * self.accumulate
        hours = [f"{self.steps * step / rate / 3600:.3g} h at {rate / 1e12:g} TFLOP/s" for rate in (0.1e12, 10e12, 300e12)]
        return f"compute: at most {step / 1e12:.3g} TFLOP a step and process; then {', '.join(hours)}"


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def make_plan(
    config: DictConfig, stage: str, parameters: tuple[int, int], data: Any, resumed_from: Path | None, footprint: Footprint | None = None
) -> Plan:
    """The plan of ``config``; ``parameters`` are all and the trained ones. UserError for data that cannot be read."""
    from kalle.checkpoint import resolve_device

    splits = lm_splits(data) if stage == "lm" else flowvae_splits(data)
    processes = process_count(config)
    # A process group that exists has split the batches already.
    batches = len(data.train_dataloader()) if _joined() else math.ceil(len(data.train_dataloader()) / processes)
    precision = config.precision
    if precision == "auto":
        precision = "bf16-mixed" if resolve_device(config.device).type == "cuda" else "32-true"
    out = Path(config.out)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    callbacks = config.callbacks
    checkpoint = callbacks.get("checkpoint")
    return Plan(
        stage=stage,
        parameters=parameters[0],
        trained=parameters[1],
        averaged=callbacks.get("ema") is not None,
        precision=str(precision),
        processes=processes,
        splits=splits,
        batches_per_epoch=batches,
        accumulate=config.trainer.accumulate_grad_batches,
        max_steps=config.trainer.max_steps if config.trainer.max_steps > 0 else None,
        max_epochs=config.trainer.max_epochs if (config.trainer.max_epochs or -1) > 0 else None,
        kept_checkpoints=0 if checkpoint is None else checkpoint.keep,
        resumed_from=resumed_from,
        free_bytes=shutil.disk_usage(existing).free,
        footprint=footprint,
    )


def _joined() -> bool:
    import torch.distributed

    return torch.distributed.is_available() and torch.distributed.is_initialized()


def process_count(config: DictConfig) -> int:
    """How many processes train, as far as the configuration and the environment say."""
    import os

    import torch

    if "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    devices, nodes = config.trainer.devices, config.trainer.get("num_nodes") or 1
    if isinstance(devices, int) and devices > 0:
        return devices * nodes
    if isinstance(devices, Sequence) and not isinstance(devices, str):
        return len(devices) * nodes
    automatic = config.device == "auto" and torch.cuda.is_available()
    return (torch.cuda.device_count() if automatic else 1) * nodes


def lm_splits(data: LMDataModule) -> dict[str, SplitCount]:
    """Utterances, hours and what is left out, from the shards' headers."""
    info = data.info()
    seconds_per_frame = info["hop_length"] / info["sample_rate_hz"]
    counts = {}
    for split in ("train", "valid"):
        dataset = data.dataset(split)
        frames = int(dataset.audio_lengths.sum()) - (0 if data.speaker is None else len(dataset))
        counts[split] = SplitCount(len(dataset), frames * seconds_per_frame / 3600, dict(dataset.rejected))
    return counts


def flowvae_splits(data: FlowVAEDataModule) -> dict[str, SplitCount]:
    """Utterances and hours, from the manifests."""
    counts = {}
    for split in ("train", "valid"):
        lengths = data.reader(split).lengths()
        counts[split] = SplitCount(len(lengths), float(lengths.sum()) / data.sample_rate_hz / 3600, {})
    return counts
