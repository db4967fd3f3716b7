"""Memory and compute of one training step, found with tensors that have no storage: shapes are checked, nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from kalle.models.discriminators import Discriminators
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM

NUMBER_BYTES = 8


@dataclass(frozen=True)
class Footprint:
    """One step of one process: fp32 bytes that the backward pass needs, floating-point operations, and the batch that was asked about."""

    activation_bytes: int
    flops: int
    batch: str


def without_storage() -> FakeTensorMode:
    """In this context modules and tensors of any size cost nothing. They claim to be on the CPU, for autocast knows no meta device."""
    return FakeTensorMode()


def measure(forward: Callable[[], Any], modules: list[nn.Module]) -> tuple[int, int]:
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
    size, flops = measure(lambda: lm.predict(ids, latents), [lm.train()])
    return Footprint(size, 3 * flops, f"{items} {unit} of {text} text positions and {frames} frames, the largest batch")


def flowvae_footprint(flowvae: FlowVAE, judges: Discriminators | None, items: int, samples: int) -> Footprint:
    """A step on ``items`` crops of ``samples``: the Flow-VAE once, and each player's judgement of real and generated audio."""
    wav = torch.zeros(items, samples)
    size, flops = measure(lambda: flowvae(wav), [flowvae])
    step = 3 * flops
    if judges is not None:
        judged, judging = measure(lambda: judges(wav.requires_grad_()), [judges])
        size, step = size + 2 * judged, step + 2 * 2 * 3 * judging
    return Footprint(size, step, f"{items} crops of {samples} samples")
