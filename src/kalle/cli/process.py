"""The process of a command or a script: its threads, an interrupt, a mistake in the words of its flags, its end."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping

from kalle.errors import UserError

SPINS = "1000"
"""Some tens of microseconds: longer than threads of an idle machine wait for each other, shorter than a turn of another program."""
_OF_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
AT_ONCE = frozenset({"say"})
"""Commands after which nothing is left to do but to end: one process, no thread of theirs, every file closed."""


def share_the_cores(environment: MutableMapping[str, str]) -> None:
    """Have GNU's OpenMP, which torch computes with on Linux, give up a core soon while it waits; to be called before torch is imported.

    Left alone, each thread waits by counting for milliseconds. Where another program runs too, the one that is waited for has no core to
    run on: a small model then speaks several times slower on two cores than on one. What the user set is left as it is.
    """
    if not any(name in environment for name in _OF_THE_USER):
        environment["GOMP_SPINCOUNT"] = SPINS


def leave(code: int, command: str | None) -> None:
    """End the process with ``code``.

    After a command of `AT_ONCE` it ends once what was registered with ``atexit`` has run and the streams are flushed. Unloading the CUDA
    libraries that torch brings touches 120 MB that were never needed, and takes half a second.
    """
    others = [thread for thread in threading.enumerate() if thread is not threading.main_thread() and not thread.daemon]
    if command not in AT_ONCE or "torch" not in sys.modules or others:
        sys.exit(code)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:  # the reader is gone; the ordinary way says so
        sys.exit(code)
    os._exit(code)


@contextlib.contextmanager
def interruptible(message: str = "interrupted; run the same command again") -> Iterator[None]:
    """Ctrl-C as one line and exit code 130; typer itself would add an empty line."""
    import typer

    from kalle.cli.main import INTERRUPTED

    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"error: {message}", err=True)
        raise typer.Exit(INTERRUPTED) from None


def script_main(run: Callable[[], None], interrupted: str, flags: Mapping[str, str] | None = None) -> int:
    """Call ``run``; a user's mistake, or what the system refuses, is one line and exit code 2, Ctrl-C the line ``interrupted`` and 130.

    ``flags`` maps the flags that messages name to what the script calls them.
    """
    import typer

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
    from kalle.cli.main import USAGE_ERROR

    for theirs, ours in (flags or {}).items():
        message = message.replace(theirs, ours)
    sys.stderr.write(f"error: {' '.join(message.split())}\n")
    return USAGE_ERROR
