"""Pressing "Speak" without a page."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from kalle.serving.handlers import Handlers, View
from kalle.serving.jobs import PageRequest
from kalle.synthesis.options import GenerationOptions

HI = PageRequest("Hi there.", options=GenerationOptions(seed=3, max_seconds=0.5))


def ran(handlers: Handlers, request: PageRequest, session: str = "a") -> tuple[View, list[View]]:
    begun = handlers.begin(session, request)
    return begun, list(handlers.run(session))


def pcm(handlers: Handlers, session: str = "a") -> np.ndarray:
    job = handlers.backend.jobs.of(session)
    pieces, finished = job.pieces(0)
    assert finished
    return np.frombuffer(b"".join(pieces), dtype="<i2")


def changed(request: PageRequest, **options: object) -> PageRequest:
    """``request`` with other options."""
    return replace(request, options=request.options.changed(**options))
