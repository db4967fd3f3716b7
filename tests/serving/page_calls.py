"""Pressing "Speak" without a page."""

from __future__ import annotations

import numpy as np

from kalle.serving.asked import Asked
from kalle.serving.handlers import Handlers, View

HI = Asked("Hi there.", seed=3, max_seconds=0.5)


def ran(handlers: Handlers, asked: Asked, session: str = "a") -> tuple[View, list[View]]:
    begun = handlers.begin(session, asked)
    return begun, list(handlers.run(session))


def pcm(handlers: Handlers, session: str = "a") -> np.ndarray:
    job = handlers.studio.jobs.of(session)
    pieces, finished = job.pieces(0)
    assert finished
    return np.frombuffer(b"".join(pieces), dtype="<i2")
