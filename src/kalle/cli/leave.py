"""The end of a process."""

from __future__ import annotations

import atexit
import os
import sys
import threading

AT_ONCE = frozenset({"say"})
"""Commands after which nothing is left to do but to end: one process, no thread of theirs, every file closed."""


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
