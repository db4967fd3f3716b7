"""Peak memory of one `kalle say`, in a process of its own, for a peak belongs to a process. Prints bytes as the last line.

python recipes/nano/say_memory.py WEIGHTS "A text." OUT.wav
"""

from __future__ import annotations

import sys

import torch

from kalle.cli.main import dispatch
from kalle.evaluation.benchmark import PeakMemory


def run(weights: str, text: str, out: str) -> int:
    """Speak, and return the most resident bytes of this process."""
    with PeakMemory(torch.device("cpu")) as memory:
        dispatch(["say", text, "-o", out, "--model", weights, "--seed", "0", "--device", "cpu"])
    return memory.bytes


if __name__ == "__main__":
    if len(sys.argv) != 4 or sys.argv[1] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n")
        sys.exit(0 if "--help" in sys.argv or "-h" in sys.argv else 2)
    sys.stdout.write(f"{run(*sys.argv[1:])}\n")
