"""The limits of a machine and the arithmetic of speaking, against which its speed is read."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch.utils.flop_counter import FlopCounterMode

from kalle.models.backbone import BackboneConfig
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig

QUIET_LOAD = 0.3
"""Load average of the last minute up to which a machine is quiet."""
_READ_BYTES = {"cpu": 2**28, "cuda": 2**31}
_PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
_REPEATS = 5


@dataclass(frozen=True)
class Work:
    """The work of a step, whatever does it."""

    bytes_read: float
    """Of weights and of the cache."""
    flop: float
    """Two a multiply-accumulate."""
    dtype: str = "float32"
    """The type that is multiplied in."""


@dataclass(frozen=True)
class Limits:
    """The rates reached on this machine."""

    read_bytes_per_second: float
    """By the sum of a tensor that no cache holds."""
    flop_per_second: Mapping[str, float]
    """By square products, by the name of their type."""

    def seconds(self, works: Sequence[Work]) -> tuple[float, str]:
        """The least time for ``works`` one after the other, and whether "memory" or "compute" takes the larger part of it.

        A type whose peak was not measured is limited by memory alone.
        """
        memory = compute = 0.0
        for work in works:
            reading = work.bytes_read / self.read_bytes_per_second
            computing = work.flop / self.flop_per_second[work.dtype] if work.dtype in self.flop_per_second else 0.0
            if reading >= computing:
                memory += reading
            else:
                compute += computing
        return memory + compute, "memory" if memory >= compute else "compute"


def measure_limits(device: torch.device, dtypes: Sequence[str] = ("float32", "bfloat16")) -> Limits:
    """Measure ``device`` with torch's number of threads, in about a second on a CPU."""
    numbers = torch.ones(_READ_BYTES[device.type] // 4, device=device)
    read = numbers.numel() * 4 / median_seconds(numbers.sum, device)
    del numbers
    size, peaks = _PRODUCT_SIZE[device.type], {}
    for dtype in dtypes:
        matrix = torch.ones(size, size, device=device, dtype=getattr(torch, dtype))
        peaks[dtype] = 2 * size**3 / median_seconds(partial(torch.matmul, matrix, matrix), device)
    return Limits(read, peaks)


def median_seconds(run: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """The median time of ``run`` after one that does not count."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def load_average() -> float | None:
    """Programs that ran or waited to run in the last minute, on average; None where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def why_not_quiet(load: float | None) -> str | None:
    """The warning for measurements that begin at this ``load``; None on a quiet machine."""
    if load is None or load <= QUIET_LOAD:
        return None
    return f"this machine is not quiet: got a load of {load:.2f}, expected at most {QUIET_LOAD}; compare rows of one run only"


@dataclass(frozen=True)
class Compute:
    """The arithmetic of one utterance."""

    counting: str
    unit: str
    lm: int
    decoder: int

    @property
    def total(self) -> int:
        """Both parts together."""
        return self.lm + self.decoder


def paper_counting(lm: KalleLMConfig, flowvae: FlowVAEConfig, frames: int) -> Compute:
    """Multiply-accumulates of the backbone's linear layers on the whole prefix for every frame, without the text, and of the decoder.

    The arithmetic behind table 4 of the KALL-E paper (arXiv 2412.16846): frame t reads t positions, of one product a weight each.
    """
    positions = frames * (frames + 1) // 2
    products = BackboneConfig.of(lm.backbone).layer_parameters
    return Compute("paper", "multiply-accumulates", positions * products, decoder_flop(flowvae, frames) // 2)


def true_counting(lm: KalleLMConfig, flowvae: FlowVAEConfig, frames: int, text_positions: int) -> Compute:
    """Floating-point operations, two a multiply-accumulate, of products, convolutions and attention: with a cache, text and end frame."""
    return Compute("true", "floating-point operations", cached_flop(lm, frames, text_positions), decoder_flop(flowvae, frames))


@torch.no_grad()
def cached_flop(config: KalleLMConfig, frames: int, text_positions: int) -> int:
    """Operations of reading ``text_positions`` and stepping through ``frames``, the last step of which predicts the end.

    A step costs a constant and a multiple of the positions behind it, so that the first and the last one tell the sum.
    """
    with torch.device("meta"):
        lm = KalleLM(config).eval()

    def step_behind(positions: int) -> int:
        _, state = lm.prefill(torch.zeros(1, positions, dtype=torch.int64, device="meta"))
        return counted_flop(lambda: lm.step(torch.zeros(1, config.latent_dim, device="meta"), state))

    text = torch.zeros(1, text_positions, dtype=torch.int64, device="meta")
    ends = step_behind(text_positions) + step_behind(text_positions + frames - 1)
    return counted_flop(lambda: lm.prefill(text)) + frames * ends // 2


@torch.no_grad()
def decoder_flop(config: FlowVAEConfig, frames: int) -> int:
    """Operations of the Flow-VAE's decoder for ``frames``; a transposed convolution counts what it multiplies."""
    with torch.device("meta"):
        flowvae = FlowVAE(config).eval()
        return counted_flop(lambda: flowvae.decode(torch.zeros(1, frames, config.latent_dim)))


def counted_flop(run: Callable[[], object]) -> int:
    """Floating-point operations of the products, convolutions and attention in ``run``."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
