"""Ctrl-C in the commands that typer runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kalle.cli.main import INTERRUPTED


@contextmanager
def interruptible(message: str = "interrupted; run the same command again") -> Iterator[None]:
    """Ctrl-C as one line and exit code 130; typer itself would add an empty line."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(INTERRUPTED) from None
