"""The `kalle` command: one module a command, each imported only when it runs; shell completion; how a process starts and ends."""

from __future__ import annotations

import ast
import atexit
import contextlib
import importlib
import io
import itertools
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from kalle.errors import UserError, one_line

COMMANDS = {
    "say": "speak a text, or a whole book, into a file",
    "stream": "speak a text and play it while it is being made",
    "voices": "make, list, show and play voices",
    "adapt": "learn one voice from a recording (test-time training) and keep it as a small adapter",
    "serve": "speech over HTTP as OpenAI's API does: many requests at once, streamed or whole",
    "web": "a page for the browser, on this machine only unless told otherwise",
    "prepare": "turn recordings and texts into a corpus folder",
    "data": "check a corpus, filter it, or write it as shards",
    "encode": "write the Flow-VAE posteriors of a corpus as shards",
    "train": "train a Flow-VAE or a language model (`kalle train flowvae|lm`, then any Hydra override)",
    "evaluate": "score synthesis, reconstruction or a folder of wavs",
    "compare": "compare scored runs item by item; a gate for releasing weights",
    "listening": "make a listening test (MOS, SMOS) as a static page, and score it",
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
    try:
        code = command.main(args=_with_help(command, arguments), prog_name=f"kalle {name}", standalone_mode=False)
    except SystemExit:
        if type(sys.stdout).__name__ == "PacifyFlushWrapper":  # put there by click, which ends with 1 for a closed pipe
            raise BrokenPipeError from None
        raise
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
    for option in ("--out", "--output", "-o"):
        if (option, "") in itertools.pairwise(rest) or f"{option}=" in rest:  # which would mean the current folder
            raise UserError(f"{option}: got an empty text, expected a path; give one, as {option} PATH")
    return _run_typer(name, rest)


def _fail(message: str, code: int = USAGE_ERROR) -> int:
    from kalle.cli.train import error_prefix

    sys.stderr.write(f"{error_prefix()}{one_line(' '.join(message.split()))}\n")
    return code


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. A user's mistake is one line on stderr and exit code 2; anything else is a bug and shows its traceback.

    A reader that is gone, of the output or of the messages, ends it silently.
    """
    code = 0
    try:
        code = _answer(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return _closed_pipe() if code == 0 else code
    return code


def _answer(arguments: Sequence[str] | None) -> int:
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
        return dispatch(given)
    except BrokenPipeError:
        raise
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
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # else the interpreter complains when it flushes
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
        return _fail(f"{error.format_message().rstrip('.')}; see --help", getattr(error, "exit_code", USAGE_ERROR))  # type: ignore[attr-defined]
    raise error


def run() -> None:
    """The console script: `main`, and the end of the process."""
    share_the_cores(os.environ)
    open_streams()
    leave(main(), sys.argv[1] if len(sys.argv) > 1 else None)


COMPLETE = "--complete"
"""The scripts call ``kalle --complete WORD…`` with the words behind `kalle`, the last of them unfinished."""
SCRIPTS = {
    "bash": """_kalle() {
    local IFS=$'\\n'
    COMPREPLY=($(kalle --complete "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
    [[ ${COMPREPLY[0]} == *= ]] && compopt -o nospace
}
complete -o default -F _kalle kalle
""",
    "zsh": """#compdef kalle
_kalle() {
    local -a found
    found=(${(f)"$(kalle --complete "${(@)words[2,CURRENT]}" 2>/dev/null)"})
    if (( ${#found} )); then compadd -S '' -- "${(M)found[@]:#*=}"; compadd -- "${(@)found:#*=}"; else _files; fi
}
compdef _kalle kalle
""",
    "fish": """function __kalle_complete
    kalle --complete (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null
end
complete -c kalle -a '(__kalle_complete)'
""",
}


def script(shell: str) -> str:
    """The script for ``shell``; a UserError for one there is none for."""
    if shell not in SCRIPTS:
        raise UserError(f"--completion: got '{shell}', expected {', '.join(SCRIPTS)}; for bash: eval \"$(kalle --completion bash)\"")
    return SCRIPTS[shell]


def candidates(words: Sequence[str]) -> list[str]:
    """Words that may stand for the last of ``words``; none where it is a file or free text."""
    *before, unfinished = words or [""]
    if not before:
        found = [*COMMANDS, "--help", "--version", "--completion"]
    elif before[0] in HYDRA_COMMANDS:
        found = _keys(before)
    elif before[0] in COMMANDS:
        found = _options(before, unfinished)
    else:
        found = list(SCRIPTS) if before == ["--completion"] else []
    return [word for word in found if word.startswith(unfinished)]


def _options(before: Sequence[str], unfinished: str) -> list[str]:
    """Flags and subcommands of a command that typer runs."""
    command: Any = typer_command(before[0])
    for word in before[1:]:
        command = getattr(command, "commands", {}).get(word, command)
    flags = [flag for parameter in command.params for flag in parameter.opts if flag.startswith("--")]
    return [*getattr(command, "commands", {}), *(["--help", *flags] if unfinished.startswith("-") else [])]


def _keys(before: Sequence[str]) -> list[str]:
    """The top keys of a command that Hydra composes, as KEY=."""
    from kalle.cli.hydra_entry import configs_dir

    stages = getattr(importlib.import_module(f"kalle.cli.{before[0]}"), "STAGES", ())
    if before[0] == "train" and len(before) == 1:
        return list(stages) or ["flowvae", "lm"]
    if before[0] == "train":
        if before[1] not in stages:
            return []
        return [f"{name}=" for name in _training_fields("FlowVAETrainingConfig" if before[1] == "flowvae" else "LMTrainingConfig")]
    path = configs_dir() / f"{before[0]}.yaml"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    keys = [line.partition(":")[0] for line in lines if line and line[0].isalpha() and ":" in line]
    return [f"{key}=" for key in keys if key not in ("defaults", "hydra")]


def _training_fields(name: str) -> list[str]:
    """The fields of a training's configuration, read from its source: importing it takes seconds."""
    source = Path(__file__).parents[1] / "training" / "config.py"
    classes = [node for node in ast.parse(source.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]
    fields = [field for cls in classes if cls.name in ("TrainingConfig", name) for field in cls.body if isinstance(field, ast.AnnAssign)]
    return sorted({ast.unparse(field.target) for field in fields if "ClassVar" not in ast.unparse(field.annotation)})


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


def open_streams() -> None:
    """Give the process the standard streams that its caller closed, as ``>&-`` does: Python leaves None in their place.

    What the encoding of the output lacks, such as a byte of a file's name that is not UTF-8 or a line of a table in ASCII, is escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: PTH123, SIM115 (it stays open to the end)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


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
    for theirs, ours in (flags or {}).items():
        message = message.replace(theirs, ours)
    sys.stderr.write(f"error: {one_line(' '.join(message.split()))}\n")
    return USAGE_ERROR


if __name__ == "__main__":
    run()
