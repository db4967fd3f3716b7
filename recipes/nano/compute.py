"""What the weights cost: seconds of every stage and the machine, over all continuations."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kalle.checkpoint import read_json, write_json

FILE_NAME = "compute.json"


def machine(device: str) -> dict[str, Any]:
    """Processor, cores, threads and device of this process."""
    found = {"cpu": _processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    if device != "cpu" and torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def earlier_runs(start: Path | None) -> list[dict[str, Any]]:
    """The runs that made the weights in ``start``, as far as they came with a `FILE_NAME`."""
    path = None if start is None else start / FILE_NAME
    return [] if path is None or not path.is_file() else list(read_json(path)["runs"])


def write_compute(path: Path, earlier: list[dict[str, Any]], run: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Write ``path``: the earlier runs, this one with its ``seconds`` by stage, and the sum over all of them."""
    runs = [*earlier, {**run, "seconds": dict(seconds)}]
    found = {"runs": runs, "total_seconds": round(sum(sum(each["seconds"].values()) for each in runs), 1)}
    write_json(path, found)
    return found
