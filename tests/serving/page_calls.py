"""Pressing "Speak" without a page."""

from __future__ import annotations

import numpy as np

from kalle.serving.handlers import Handlers, View
from kalle.serving.jobs import PageRequest

HI = PageRequest("Hi there.", seed=3, max_seconds=0.5)


def ran(handlers: Handlers, request: PageRequest, session: str = "a") -> tuple[View, list[View]]:
    begun = handlers.begin(session, request)
    return begun, list(handlers.run(session))


def pcm(handlers: Handlers, session: str = "a") -> np.ndarray:
    job = handlers.backend.jobs.of(session)
    pieces, finished = job.pieces(0)
    assert finished
    return np.frombuffer(b"".join(pieces), dtype="<i2")
