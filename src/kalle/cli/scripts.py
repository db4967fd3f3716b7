"""Shared parts of the scripts that take the release's own flags."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping

import typer

from kalle.cli.interrupts import interruptible
from kalle.cli.main import USAGE_ERROR
from kalle.errors import UserError


def script_main(run: Callable[[], None], interrupted: str, flags: Mapping[str, str] | None = None) -> int:
    """Call ``run``; a user's mistake, or what the system refuses, is one line and exit code 2, Ctrl-C the line ``interrupted`` and 130.

    ``flags`` maps the flags that messages name to what the script calls them.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        with interruptible(interrupted):
            run()
    except UserError as error:
        return fail(str(error), flags)
    except OSError as error:
        return fail(f"{error.strerror}: '{error.filename}'" if error.filename else str(error), flags)
    except typer.Exit as end:
        return end.exit_code
    return 0


def fail(message: str, flags: Mapping[str, str] | None = None) -> int:
    """Print ``message`` with the script's own ``flags``; returns the exit code of a mistake."""
    for theirs, ours in (flags or {}).items():
        message = message.replace(theirs, ours)
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return USAGE_ERROR
