"""Time a training step of the paper's decoder by either activation in turns: scripts/compare_activations.py SIZE [FRAMES [ROUNDS]]."""

from __future__ import annotations

import statistics
import sys
import time

import torch
from torch import Tensor

from kalle.cli.bench_common import Size, configuration
from kalle.evaluation.benchmark import PeakMemory
from kalle.models.flowvae.bigvgan import BigVGANDecoder, set_way

CPU = torch.device("cpu")
BATCH = 2


def step(decoder: BigVGANDecoder, z: Tensor, way: str) -> tuple[float, int]:
    """CPU seconds of a forward and a backward pass, and the most bytes of memory that the process took for them."""
    set_way(decoder, way, CPU)
    decoder.zero_grad()
    with PeakMemory(CPU) as before:
        pass
    with PeakMemory(CPU) as memory:
        started = time.process_time()
        decoder(z).square().mean().backward()
        seconds = time.process_time() - started
    return seconds, memory.bytes - before.bytes


def main(size: str, frames: int, rounds: int) -> None:
    """Print seconds and memory of both and their ratio.

    Seconds are those behind the first round, memory that of the first round, the smaller first: later ones hold what was freed.
    """
    torch.set_num_threads(1)
    config = configuration("flowvae", Size(size))
    torch.manual_seed(0)
    decoder, z = BigVGANDecoder(config.decoder, config.latent_dim), torch.randn(BATCH, config.latent_dim, frames)
    step(decoder, z[..., :1], "numba")  # which compiles
    first, *turns = ([step(decoder, z, way) for way in ("numba", "none")] for _ in range(rounds + 1))
    ratios = [plain[0] / fused[0] for fused, plain in turns]
    for name, memory, column in zip(("numba", "alias_free_torch"), first, zip(*turns, strict=True), strict=True):
        seconds = statistics.median(one[0] for one in column)
        sys.stdout.write(f"{size}, {BATCH} x {frames} frames, {name}: {seconds:.2f} s, {memory[1] / 2**20:.0f} MB\n")
    sys.stdout.write(f"ratio of the seconds: {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 6, int(sys.argv[3]) if len(sys.argv) > 3 else 5)
