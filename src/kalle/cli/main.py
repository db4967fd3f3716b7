"""The `kalle` command: one module a command, each imported only when it runs."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Sequence
from typing import Any

COMMANDS = {
    "say": "speak a text, or a whole book, into a file",
    "stream": "speak a text and play it while it is being made",
    "voices": "make, list, show and play voices",
    "adapt": "learn one voice from a recording (test-time training) and keep it as a small adapter",
    "web": "a page for the browser, on this machine only unless told otherwise",
    "prepare": "turn recordings and texts into a corpus folder",
    "data": "check a corpus, filter it, or write it as shards",
    "encode": "write the Flow-VAE posteriors of a corpus as shards",
    "train": "train a Flow-VAE or a language model (`kalle train flowvae|lm`, then any Hydra override)",
    "evaluate": "score synthesis, reconstruction or a folder of wavs",
    "calibrate": "measure where speech ends, and store the stop rule with the weights",
    "bench": "measure speed and memory on this machine",
    "export": "copy a weight folder with 16-bit weights, in files small enough to ship",
    "convert": "turn released weights into a weight folder and back",
    "download": "fetch released weights from the hub, verified",
    "doctor": "check what works on this machine, with a remedy for the rest",
}
"""Command name -> one line of help; the module is kalle.cli.NAME."""

HYDRA_COMMANDS = frozenset({"encode", "evaluate", "train"})
"""These take Hydra overrides, which only Hydra can parse."""

USAGE_ERROR = 2
HELP_ALL = "--help-all"
INTERRUPTED = 130
CLOSED_PIPE = 141
"""128 and the number of SIGPIPE."""


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    more = [
        "`kalle COMMAND --help` explains one; `kalle --version` prints the version;",
        "`kalle --completion bash|zsh|fish` prints what completes words in your shell.",
    ]
    return "\n".join(["usage: kalle COMMAND [OPTIONS]", "", *lines, "", *more])


def typer_command(name: str) -> Any:
    """The click command of ``name``, one of those that typer runs."""
    import typer
    from typer.main import get_command

    module = importlib.import_module(f"kalle.cli.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer(add_completion=False, rich_markup_mode=None)
        app.command()(getattr(module, name))
    return get_command(app)


def _run_typer(name: str, arguments: Sequence[str]) -> int:
    command = typer_command(name)
    code = command.main(args=_with_help(command, arguments), prog_name=f"kalle {name}", standalone_mode=False)
    return int(code) if isinstance(code, int) else 0


def _with_help(command: Any, arguments: Sequence[str]) -> list[str]:
    """``arguments`` for ``command``, in which --help-all is a --help that shows the rarer options, too; --help says how many there are."""
    for each in (command, *getattr(command, "commands", {}).values()):
        rare = [parameter for parameter in each.params if getattr(parameter, "hidden", False)]
        if HELP_ALL in arguments:
            for parameter in rare:
                parameter.hidden = False
        elif rare:
            each.epilog = f"{HELP_ALL} shows {len(rare)} more options."
    return ["--help" if argument == HELP_ALL else argument for argument in arguments]


def dispatch(arguments: Sequence[str]) -> int:
    """Run the command named first; returns the exit code. Errors propagate."""
    name, rest = arguments[0], list(arguments[1:])
    if name in HYDRA_COMMANDS:
        return int(importlib.import_module(f"kalle.cli.{name}").run(rest))
    return _run_typer(name, rest)


def _fail(message: str, code: int = USAGE_ERROR) -> int:
    from kalle.cli.launch import error_prefix

    sys.stderr.write(error_prefix() + " ".join(message.split()) + "\n")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. A user's mistake is one line on stderr and exit code 2; anything else is a bug and shows its traceback."""
    from kalle.errors import UserError

    given = list(sys.argv[1:] if arguments is None else arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not given or given[0] in ("-h", "--help", "help"):
        sys.stdout.write(_help() + "\n")
        return 0
    if given[0] == "--version":
        from kalle import __version__

        sys.stdout.write(f"kalle {__version__}\n")
        return 0
    if given[0] in ("--completion", "--complete"):
        return _completion(given)
    if given[0] not in COMMANDS:
        return _fail(f"unknown command: got {given[0]!r}, expected one of {', '.join(COMMANDS)}; see `kalle --help`")
    try:
        code = dispatch(given)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        return _closed_pipe()
    except UserError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        from kalle.extras import missing_extra

        missing = missing_extra(error.name or "")
        if missing is None:
            raise
        return _fail(str(missing))
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to continue", INTERRUPTED)
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return _fail(_refusal(error))
    except Exception as error:
        return _fail(too_much(error)) if is_too_much(error) else _fail_usage(error)


def _completion(given: Sequence[str]) -> int:
    from kalle.cli.completion import COMPLETE, candidates, script
    from kalle.errors import UserError

    if given[0] == COMPLETE:
        sys.stdout.write("".join(f"{word}\n" for word in candidates(given[1:])))
        return 0
    try:
        sys.stdout.write(script(given[1] if len(given) > 1 else ""))
    except UserError as error:
        return _fail(str(error))
    return 0


def _closed_pipe() -> int:
    """The reader of the output is gone, as in `kalle voices list | head -1`: end silently, as other programs do."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains when it flushes
    return CLOSED_PIPE


def _refusal(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.filename is None:
        return f"the system refuses: {reason}; make room on the disk or choose another folder"
    return f"cannot use '{error.filename}': {reason}; choose another file or folder, or change its permissions"


def is_too_much(error: Exception) -> bool:
    """Whether ``error`` is torch's for too little GPU memory, known by its name: importing torch to ask would take seconds."""
    return type(error).__name__ == "OutOfMemoryError"


def too_much(error: Exception) -> str:
    """The sizes that the allocator reports, and a remedy; its own advice assumes a program that fits."""
    said = ". ".join(str(error).split(". ")[:3]).removesuffix(".")
    return f"{said}; ask for less at once: a smaller data.max_positions, data.batch_size, --positions or --batch, or another device"


def _fail_usage(error: Exception) -> int:
    # typer raises click's exceptions in non-standalone mode; click may be vendored, so they are known by their interface.
    if type(error).__name__ == "Exit":
        return int(getattr(error, "exit_code", 0))
    if type(error).__name__ == "Abort":
        return _fail("interrupted", INTERRUPTED)
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stderr.write(f"{error.format_message()}\n")  # type: ignore[attr-defined]
        return USAGE_ERROR
    if callable(getattr(error, "format_message", None)):
        return _fail(f"{error.format_message()}; see --help", getattr(error, "exit_code", USAGE_ERROR))  # type: ignore[attr-defined]
    raise error


def run() -> None:
    """The console script: `main`, and the end of the process."""
    from kalle.cli.process import leave, share_the_cores

    share_the_cores(os.environ)
    leave(main(), sys.argv[1] if len(sys.argv) > 1 else None)


if __name__ == "__main__":
    run()
