"""How the threads of one computation wait for each other."""

from __future__ import annotations

from collections.abc import MutableMapping

SPINS = "1000"
"""Some tens of microseconds: longer than threads of an idle machine wait for each other, shorter than a turn of another program."""
_OF_THE_USER = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")


def share_the_cores(environment: MutableMapping[str, str]) -> None:
    """Have GNU's OpenMP, which torch computes with on Linux, give up a core soon while it waits; to be called before torch is imported.

    Left alone, each thread waits by counting for milliseconds. Where another program runs too, the one that is waited for has no core to
    run on: a small model then speaks several times slower on two cores than on one. What the user set is left as it is.
    """
    if not any(name in environment for name in _OF_THE_USER):
        environment["GOMP_SPINCOUNT"] = SPINS
