"""The plan of a training in numbers: data, steps, memory, compute and disk.

Memory and compute of a step are found with tensors that have no storage: shapes are checked, nothing is computed.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from kalle.checkpoint import resolve_device
from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule
from kalle.models.discriminators import Discriminators
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.models.lm_batch import Packing, packed_layout
from kalle.training.config import TrainingConfig, precision_of
from kalle.training.distributed import process_count

NUMBER_BYTES = 8


MIXED_ACTIVATIONS = 0.6
"""Of the fp32 bytes, with bf16: matrix products keep half, norms and losses all."""


@dataclass(frozen=True)
class Footprint:
    """One step of one process: fp32 bytes that the backward pass needs, floating-point operations, and the batch they belong to."""

    activation_bytes: int
    flops: int
    batch: str


@dataclass(frozen=True)
class SplitCount:
    """How much one split holds."""

    items: int
    hours: float
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Plan:
    """The numbers; `lines` puts them into sentences."""

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
    config: TrainingConfig,
    parameters: tuple[int, int],
    data: LMDataModule | FlowVAEDataModule,
    resumed_from: Path | None,
    footprint: Footprint | None = None,
) -> Plan:
    """The plan of ``config``; ``parameters`` are all and the trained ones. UserError for data that cannot be read."""
    device, trainer = resolve_device(config.device), config.trainer
    processes = process_count(trainer.devices, trainer.num_nodes, device)
    joined = torch.distributed.is_available() and torch.distributed.is_initialized()
    batches = len(data.train_dataloader())
    out = Path(config.out)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    return Plan(
        stage=config.stage,
        parameters=parameters[0],
        trained=parameters[1],
        averaged=config.callbacks.ema is not None,
        precision=precision_of(config),
        processes=processes,
        splits=lm_splits(data) if isinstance(data, LMDataModule) else flowvae_splits(data),
        # A process group that exists has split the batches already.
        batches_per_epoch=batches if joined else math.ceil(batches / processes),
        accumulate=trainer.accumulate_grad_batches,
        max_steps=trainer.max_steps if trainer.max_steps > 0 else None,
        max_epochs=trainer.max_epochs if (trainer.max_epochs or -1) > 0 else None,
        kept_checkpoints=0 if config.callbacks.checkpoint is None else config.callbacks.checkpoint.keep,
        resumed_from=resumed_from,
        free_bytes=shutil.disk_usage(existing).free,
        footprint=footprint,
    )


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


def largest_rows(data: LMDataModule, packing: Packing | None) -> tuple[int, int, int]:
    """Rows, text positions and frames of the batch of the first epoch that computes most; in packed rows text and frames are shares."""
    dataset, found = data.dataset("train"), []
    texts, audios = dataset.text_lengths, dataset.audio_lengths
    for batch in data.plan("train", shuffle=True)(0):
        items = [sample % len(dataset) for sample in batch]
        text, audio = texts[items], audios[items]
        if packing is None:
            found.append((len(items), int(text.max()), int(audio.max())))
        else:
            layout = packed_layout(torch.from_numpy(text + audio), packing)
            read = max(1, round(layout.width * int(text.sum()) / int((text + audio).sum())))
            found.append((layout.rows, read, layout.width - read))
    return max(found, key=lambda size: size[0] * sum(size[1:]))


def without_storage() -> FakeTensorMode:
    """In this context modules and tensors of any size cost nothing. They claim to be on the CPU, for autocast knows no meta device."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def measure_memory(forward: Callable[[], Any], modules: list[nn.Module]) -> tuple[int, int]:
    """Bytes saved for the backward pass and operations of ``forward``, whose tensors have no storage.

    Parameters are not counted, nor square attention matrices: the kernels in use do not keep them. Nor single numbers, of which a
    real step may keep one that this does not.
    """
    weights = {id(parameter) for module in modules for parameter in module.parameters()}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        square = tensor.dim() == 4 and tensor.shape[-1] == tensor.shape[-2] > 1
        if id(tensor) not in weights and not square:
            saved[tensor.untyped_storage()._cdata] = tensor  # kept, so that no other storage takes its number
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    storages = {tensor.untyped_storage()._cdata for module in modules for tensor in module.parameters()}
    sizes = [tensor.untyped_storage().nbytes() for number, tensor in saved.items() if number not in storages]
    size = sum(nbytes for nbytes in sizes if nbytes > NUMBER_BYTES)
    return size, int(counter.get_total_flops())


def lm_footprint(lm: KalleLM, items: int, text: int, frames: int, unit: str = "utterances") -> Footprint:
    """A step on ``items`` rows (each a ``unit``) of ``text`` positions and ``frames`` latents; the backward pass costs two forward passes.

    To be called inside `without_storage`, like `flowvae_footprint`.

    A speaker encoder, small beside the backbone, is left out.
    """
    ids = torch.zeros(items, text, dtype=torch.int64)
    latents = torch.zeros(items, frames, lm.config.latent_dim)
    size, flops = measure_memory(lambda: lm.predict(ids, latents), [lm.train()])
    return Footprint(size, 3 * flops, f"{items} {unit} of {text} text positions and {frames} frames, the largest batch")


def flowvae_footprint(flowvae: FlowVAE, discriminators: Discriminators | None, items: int, samples: int) -> Footprint:
    """A step on ``items`` crops of ``samples``: the Flow-VAE once; the discriminators on real and generated audio in both updates."""
    wav = torch.zeros(items, samples)
    size, flops = measure_memory(lambda: flowvae(wav), [flowvae])
    step = 3 * flops
    if discriminators is not None:
        scored, scoring = measure_memory(lambda: discriminators(wav.requires_grad_()), [discriminators])
        size, step = size + 2 * scored, step + 2 * 2 * 3 * scoring
    return Footprint(size, step, f"{items} crops of {samples} samples")
