"""How a process ends: at once where nothing is left to do, and never without what was registered or printed."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import atexit, sys, threading, time
import torch
from kalle.cli.process import leave
class Teardown:
    def __del__(self):
        print("taken apart", flush=True)
kept = Teardown()
atexit.register(lambda: print("registered"))
print("printed")
{before}
leave({code}, {command!r})
"""


def ended(command: str | None, code: int = 0, before: str = "") -> subprocess.CompletedProcess[str]:
    source = CODE.format(command=command, code=code, before=before)
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("code", [0, 2])
def test_say_leaves_at_once_but_loses_nothing(code: int) -> None:
    result = ended("say", code)
    assert (result.returncode, result.stdout) == (code, "printed\nregistered\n")


def test_other_commands_end_the_ordinary_way() -> None:
    result = ended("train")
    assert result.returncode == 0
    assert result.stdout.split("\n")[:2] == ["printed", "registered"]
    assert "taken apart" in result.stdout


def test_a_thread_that_still_works_is_waited_for() -> None:
    result = ended("say", before="threading.Thread(target=lambda: (time.sleep(0.3), print('worked', flush=True))).start()")
    assert result.returncode == 0
    assert "worked" in result.stdout
