from __future__ import annotations

import pytest
import torch

from training.distributed import kalle_on_ranks, on_ranks


def shared_sum(offset: float) -> torch.Tensor:
    value = torch.tensor([offset + torch.distributed.get_rank()])
    torch.distributed.all_reduce(value)
    return value


def fail_on_rank_one() -> None:
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("rank one")


@pytest.mark.slow
def test_ranks_share_and_report() -> None:
    assert [float(value) for value in on_ranks(shared_sum, 10.0)] == [21.0, 21.0]
    with pytest.raises(Exception, match="rank one"):
        on_ranks(fail_on_rank_one)


@pytest.mark.slow
def test_commands_run_once_a_rank() -> None:
    results = kalle_on_ranks(["--version"])
    assert [result.returncode for result in results] == [0, 0]
    assert all(result.stdout.startswith("kalle ") for result in results)
