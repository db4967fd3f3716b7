"""How a process waits for its threads, and how it ends: at once where nothing is left to do, and never without its output."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kalle.cli.main import SPINS, share_the_cores

CODE = """
import atexit, sys, threading, time, types
sys.modules['torch'] = types.ModuleType('torch')  # only its name counts
from kalle.cli.main import leave
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


def test_waiting_is_short_unless_the_user_says_how() -> None:
    environment = {"OMP_NUM_THREADS": "2"}
    share_the_cores(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_what_the_user_says_stays(given: dict[str, str]) -> None:
    environment = dict(given)
    share_the_cores(environment)
    assert environment == given


def test_the_command_decides_before_torch_reads_it() -> None:
    """OpenMP reads the variable when it is loaded, and torch loads it."""
    code = (
        "import os, sys; from kalle.cli import main as command; "
        "command.main = lambda: print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules) or 0; command.run()"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=60, check=True)
    assert done.stdout.split() == [SPINS, "False"]
