"""A recording to learn from."""

from __future__ import annotations

import numpy as np

RATE_HZ = 16000
TEXT = "one two three"


def sweep(seconds: float = 0.4, low_hz: float = 150.0) -> np.ndarray:
    """A recording whose frames differ from each other."""
    time = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    return (0.3 * np.sin(2 * np.pi * (low_hz + 900 * time) * time)).astype(np.float32)
