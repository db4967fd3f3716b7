"""How much memory a piece of work needed."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"
"""What Linux takes to start the peak of the resident set anew (proc(5), clear_refs)."""


class PeakMemory:
    """Context manager: ``bytes`` afterwards is the most resident memory the process held inside, weights included.

    On CUDA it is that of torch's allocator. Where the system can't start its peak anew, ``bytes`` is the peak since the
    process began, and ``since_start`` says so.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.bytes = 0
        self.since_start = False

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        else:
            self.since_start = not _restart_peak()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else _peak_bytes()


def _restart_peak() -> bool:
    try:
        _RESET.write_text(_RESET_PEAK)
    except OSError:
        return False
    return True


def _peak_bytes() -> int:
    if _STATUS.is_file():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
