from __future__ import annotations

import pytest

from kalle.cli.threads import SPINS, share_the_cores


def test_waiting_is_short_unless_the_user_says_how() -> None:
    environment = {"OMP_NUM_THREADS": "2"}
    share_the_cores(environment)
    assert environment == {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": SPINS}


@pytest.mark.parametrize("given", [{"GOMP_SPINCOUNT": "5"}, {"OMP_WAIT_POLICY": "ACTIVE"}])
def test_what_the_user_says_stays(given: dict[str, str]) -> None:
    environment = dict(given)
    share_the_cores(environment)
    assert environment == given
