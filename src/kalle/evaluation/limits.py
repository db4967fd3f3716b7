"""The limits of a machine, measured in the run that they are compared with: how fast it reads memory and how fast it multiplies."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

QUIET_LOAD = 0.3
"""Load average of the last minute up to which a machine is quiet."""
_READ_BYTES = {"cpu": 2**28, "cuda": 2**31}
_PRODUCT_SIZE = {"cpu": 1536, "cuda": 8192}
_REPEATS = 5


@dataclass(frozen=True)
class Work:
    """What a step has to do, whatever does it."""

    bytes_read: float
    """Of weights and of the cache."""
    flop: float
    """Two a multiply-accumulate."""
    dtype: str = "float32"
    """The type that is multiplied in."""


@dataclass(frozen=True)
class Limits:
    """What was reached on this machine."""

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
    """What to say of measurements that begin at this ``load``; None on a quiet machine."""
    if load is None or load <= QUIET_LOAD:
        return None
    return f"this machine is not quiet: got a load of {load:.2f}, expected at most {QUIET_LOAD}; compare rows of one run only"
