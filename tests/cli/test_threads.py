from __future__ import annotations

import os
import subprocess
import sys

import pytest

from kalle.cli.process import SPINS, share_the_cores


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
