"""Resumable stages of a recipe: `kalle` commands in order, each run once."""

from __future__ import annotations

import logging
import re
import shlex
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kalle.checkpoint import read_json, write_json
from kalle.cli.main import INTERRUPTED, USAGE_ERROR, dispatch, is_too_much, too_much
from kalle.errors import UserError

logger = logging.getLogger(__name__)
STEADY_SECONDS = 120.0


def override(key: str, value: object) -> str:
    """``key=value`` for Hydra where ``value`` is any text or path, with commas, quotes and brackets in it."""
    # A backslash means something to Hydra only in front of a quote, the closing one included.
    text = re.sub(r"(\\*)('|$)", lambda found: 2 * found[1] + found[2].replace("'", r"\'"), str(value))
    return f"{key}='{text}'"


def recipe_main(work: Callable[[], object], out: Path) -> int:
    """Run ``work`` of a recipe that writes into the folder ``out``; returns the exit code.

    A UserError, and what the system refuses, is one line on standard error and 2; Ctrl-C is 130.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    try:
        work()
    except UserError as error:
        return _fail(str(error), USAGE_ERROR)
    except OSError as error:
        return _fail(f"cannot use '{error.filename or out}': {error.strerror or error}; choose another --out", USAGE_ERROR)
    except Exception as error:
        if not is_too_much(error):
            raise
        return _fail(too_much(error), USAGE_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to continue", INTERRUPTED)
    return 0


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"error: {message}\n")
    return code


class Stages:
    """Runs stages in order, once each, and remembers what is done and how long it took, interruptions included."""

    def __init__(self, out: Path, settings: dict[str, object], expected: Mapping[str, float] | None = None) -> None:
        """``expected`` are the stages to come, in order, with the seconds each may take: then every stage says how many are left."""
        self.path = out / "stages.json"
        self.expected = dict(expected or {})
        state: dict[str, Any] = read_json(self.path) if self.path.is_file() else {"settings": settings, "seconds": {}, "done": []}
        if state["settings"] != settings:
            raise UserError(f"'{out}' holds a run with {state['settings']}, expected {settings}; use another --out or delete it")
        self.settings = settings
        self.seconds: dict[str, float] = state["seconds"]
        self.done: list[str] = state["done"]

    def run(self, name: str, action: Callable[[], object]) -> None:
        """Run ``action`` unless stage ``name`` is done."""
        if name in self.done:
            logger.info("[%s] done before, in %.0f s", name, self.seconds[name])
            return
        if name in self.expected:
            logger.info("[%s] %s", name, self.place(name))
        started = time.monotonic()
        try:
            action()
            self.done.append(name)
        finally:
            self.seconds[name] = round(self.seconds.get(name, 0.0) + time.monotonic() - started, 1)
            write_json(self.path, {"settings": self.settings, "seconds": self.seconds, "done": self.done})

    def place(self, name: str) -> str:
        """Which of the expected stages ``name`` is and how long the rest may take, at the pace of those that are done.

        As if `STEADY_SECONDS` had gone as expected before, for the first stages are short and load what all need.
        """
        names = list(self.expected)
        done = [each for each in names if each in self.done]
        took, wanted = (sum(seconds[each] for each in done) for seconds in (self.seconds, self.expected))
        pace = (took + STEADY_SECONDS) / (wanted + STEADY_SECONDS)
        left = pace * sum(seconds for each, seconds in self.expected.items() if each not in self.done)
        return f"stage {names.index(name) + 1} of {len(names)}, about {max(1, round(left / 60))} min left"

    def command(self, name: str, *arguments: str) -> None:
        """Run a `kalle` command as a stage."""

        def action() -> None:
            logger.info("[%s] kalle %s", name, shlex.join(arguments))
            code = dispatch(arguments)
            if code:
                raise UserError(f"stage '{name}' ended with exit code {code}; see above, then run it again")

        self.run(name, action)
