"""Pressing "Speak" without a page, and a hand on the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kalle.serving.handlers import Handlers, View
from kalle.serving.sessions import PageRequest
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions

HI = PageRequest("Hi there.", options=GenerationOptions(seed=3, max_seconds=0.5))


def ran(handlers: Handlers, request: PageRequest, session: str = "a") -> tuple[View, list[View]]:
    begun = handlers.begin(session, request)
    return begun, list(handlers.run(session))


def pcm(handlers: Handlers, session: str = "a") -> np.ndarray:
    job = handlers.backend.sessions.of(session)
    pieces, finished = job.pieces(0)
    assert finished
    return np.frombuffer(b"".join(pieces), dtype="<i2")


def changed(request: PageRequest, **options: object) -> PageRequest:
    """``request`` with other options."""
    return replace(request, options=request.options.changed(**options))


class Gate:
    """Holds the model before a step, so that what is to come in between can."""

    def __init__(self, kalle: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.held, self.go_on = 0, threading.Event(), threading.Event()
        self.most_rows = 0
        self.before: Callable[[int], None] = lambda number: None
        step = type(kalle.lm).step

        def gated(lm: Any, z: Any, state: Any) -> Any:
            self.steps += 1
            self.most_rows = max(self.most_rows, len(z))
            self.before(self.steps)
            return step(lm, z, state)

        monkeypatch.setattr(type(kalle.lm), "step", gated)

    def hold(self, number: int) -> None:
        """Hold before step ``number``."""

        def before(now: int) -> None:
            if now == number:
                self.held.set()
                assert self.go_on.wait(600)

        self.before = before
