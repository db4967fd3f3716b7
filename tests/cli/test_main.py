from __future__ import annotations

import errno
import importlib
import logging
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
import typer

from kalle.cli import main as module
from kalle.cli.main import COMMANDS, HYDRA_COMMANDS, dispatch, main
from kalle.errors import UserError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch):
    """Puts ``function`` in the place of the command `train`."""

    def put(function: Any) -> None:
        fake = ModuleType("kalle.cli.train")
        fake.run = function  # type: ignore[attr-defined]
        fake.error_prefix = importlib.import_module("kalle.cli.train").error_prefix  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "kalle.cli.train", fake)

    return put


def raising(error: BaseException) -> Any:
    def run(words: list[str]) -> int:
        raise error

    return run


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("error: ")
    return lines[0]


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(words: list[str], capsys) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    for name, text in COMMANDS.items():
        assert name in out
        assert text in out


def test_version(capsys) -> None:
    from kalle import __version__

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"kalle {__version__}\n"


def test_every_command_has_a_module_that_can_be_called(capsys) -> None:
    assert set(COMMANDS) >= HYDRA_COMMANDS
    for name in COMMANDS:
        found = importlib.import_module(f"kalle.cli.{name}")
        assert hasattr(found, "run" if name in HYDRA_COMMANDS else "app") or hasattr(found, name), name
        if name not in HYDRA_COMMANDS:
            assert main([name, "--help"]) == 0
            assert "Usage: kalle" in capsys.readouterr().out


def test_unknown_command(capsys) -> None:
    assert main(["sing"]) == 2
    assert one_line(capsys) == f"error: unknown command: got 'sing', expected one of {', '.join(COMMANDS)}; see `kalle --help`"


def test_user_error_is_one_line(command, capsys) -> None:
    command(raising(UserError("speed: got 0,\n  expected more; raise it")))
    assert main(["train"]) == 2
    assert one_line(capsys) == r"error: speed: got 0,\n expected more; raise it"


def test_ctrl_c(command, capsys) -> None:
    command(raising(KeyboardInterrupt()))
    assert main(["train"]) == 130
    assert one_line(capsys) == "error: interrupted; run the same command again to continue"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            OSError(errno.ENOSPC, "No space left", "o/last.ckpt"),
            "error: cannot use 'o/last.ckpt': No space left; REMEDY",
        ),
        (
            OSError(errno.ENOSPC, "No space left"),
            "error: the system refuses: No space left; make room on the disk",
        ),
        (PermissionError(errno.EACCES, "Permission denied", "o"), "error: cannot use 'o': Permission denied; REMEDY"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "o"), "error: cannot use 'o': Is a directory; REMEDY"),
    ],
)
def test_a_full_or_forbidden_disk_is_one_line(error: OSError, expected: str, command, capsys) -> None:
    command(raising(error))
    assert main(["train"]) == 2
    line = one_line(capsys).removesuffix(" or choose another folder")
    assert line == expected.replace("REMEDY", "choose another file or folder, or change its permissions")


def test_too_little_gpu_memory_is_one_line(command, capsys) -> None:
    said = (
        "CUDA out of memory. Tried to allocate 12.63 GiB. GPU 0 has a total capacity of 139.80 GiB of which 10.74 GiB is free. "
        "Including non-PyTorch memory, this process has 129.05 GiB memory in use. If reserved but unallocated memory is large try ALLOC."
    )
    command(raising(torch.OutOfMemoryError(said)))
    assert main(["train"]) == 2
    line = one_line(capsys)
    assert "Tried to allocate 12.63 GiB. GPU 0 has a total capacity of 139.80 GiB of which 10.74 GiB is free; ask for less at once" in line
    assert "ALLOC" not in line


@pytest.mark.parametrize("error", [ZeroDivisionError("x"), OSError("no number, no file"), AssertionError()])
def test_a_bug_keeps_its_traceback(error: Exception, command) -> None:
    command(raising(error))
    with pytest.raises(type(error)):
        main(["train"])


def test_arguments_and_exit_code_are_handed_on(command) -> None:
    seen: list[list[str]] = []
    command(lambda words: seen.append(words) or 3)
    assert main(["train", "lm", "-m", "a=1"]) == 3
    assert seen == [["lm", "-m", "a=1"]]
    assert dispatch(["train"]) == 3


def test_arguments_default_to_the_process_s(command, monkeypatch) -> None:
    command(lambda words: len(words))
    monkeypatch.setattr(sys, "argv", ["kalle", "train", "a", "b"])
    assert main() == 2


def test_usage_errors_of_typer_are_one_line(capsys) -> None:
    unfinished = ["data", "retranscribe", "x"]
    for words in (["say", "--no-such-option"], ["say", "--seed", "x"], ["convert", "nonsense"], ["prepare", "nonsense"], unfinished):
        assert main(words) == 2, words
        line = one_line(capsys)
        assert line.endswith("; see --help")
        assert ".;" not in line


@pytest.mark.parametrize(
    "words", [["prepare", "csv", "x.csv", "--out", ""], ["prepare", "csv", "x.csv", "--out="], ["say", "hi", "-o", ""]]
)
def test_an_empty_place_to_write_to_is_not_the_current_folder(words: list[str], capsys) -> None:
    assert main(words) == 2
    assert "got an empty text, expected a path" in one_line(capsys)


@pytest.mark.parametrize("name", ["voices", "convert", "bench", "prepare"])
def test_a_group_without_a_command_prints_its_help(name: str, capsys) -> None:
    assert main([name]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.lstrip().startswith(f"Usage: kalle {name}")
    assert "error:" not in captured.err
    assert captured.err.count("\n") > 5


@pytest.mark.parametrize(("error", "code"), [(typer.Exit(4), 4), (typer.Abort(), 130)])
def test_typer_s_own_ways_out(error: Exception, code: int, command) -> None:
    command(raising(error))
    assert main(["train"]) == code


def test_logging_is_set_up_for_people() -> None:
    main(["--version"])
    assert logging.getLogger().handlers
    assert module.USAGE_ERROR == 2


def test_a_missing_extra_is_one_line_with_its_remedy(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command(raising(ModuleNotFoundError("No module named 'lightning'", name="lightning.pytorch")))
    assert main(["train", "lm"]) == 2
    assert "pip install" in (line := one_line(capsys))
    assert "[train]" in line
    command(raising(ModuleNotFoundError("No module named 'kalle.nothing'", name="kalle.nothing")))
    with pytest.raises(ModuleNotFoundError):
        main(["train", "lm"])


def test_a_reader_that_leaves_ends_the_command_quietly() -> None:
    code = "import sys; from kalle.cli import main as m; m.dispatch = lambda given: print('x' * 10 ** 6) or 0; sys.exit(m.main(['say']))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (141, b"")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["--completion", "bash"], ["prepare", "--help"], ["train", "lm", "--help"]])
def test_nobody_reads_what_is_printed(words: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "kalle", *words], stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_streams_that_the_caller_closed() -> None:
    for end, code in ((">&-", 0), ("<&- >&- 2>&-", 0), ("2>&-", 0)):
        assert subprocess.run(["sh", "-c", f"'{sys.executable}' -m kalle --version {end}"], check=False).returncode == code
    assert subprocess.run(["sh", "-c", f"'{sys.executable}' -m kalle nonsense 2>&-"], check=False).returncode == 2


def test_a_name_is_no_order_to_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "folder", "\x1b[31mred\x9b", "--out", "out"]) == 2
    assert "'\\x1b[31mred\\x9b'" in one_line(capsys)


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    code = "from kalle.cli.main import open_streams; open_streams(); print('caf\\udce9 \\u2502')"
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, check=True)
    assert done.stdout.split() == [rb"caf\udce9", rb"\u2502"]
