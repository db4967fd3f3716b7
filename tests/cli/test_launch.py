from __future__ import annotations

import pytest

from kalle.cli.hydra_entry import folder_per_job
from kalle.cli.train import rank_command
from kalle.errors import UserError
from kalle.training.distributed import started_ranks, wanted_ranks


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}, None),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}, (4, 2)),
        ({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NUM_NODES": "2"}, (8, 2)),
        ({"SLURM_NTASKS": "16", "SLURM_NNODES": "2"}, None),
    ],
)
def test_how_many_processes_were_started(environment: dict[str, str], expected: tuple[int, int] | None) -> None:
    assert started_ranks(environment) == expected


def test_uneven_tasks_are_refused() -> None:
    with pytest.raises(UserError, match="3 tasks on 2 machines"):
        started_ranks({"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_NUM_NODES": "2"})


@pytest.mark.parametrize(
    ("devices", "gpus", "expected"), [("auto", 0, 1), ("auto", 4, 4), (-1, 2, 2), (2, 0, 2), ("3", 4, 3), ([0, 2], 4, 2)]
)
def test_how_many_processes_are_wanted(devices: object, gpus: int, expected: int) -> None:
    assert wanted_ranks(devices, gpus) == expected


@pytest.mark.parametrize(("devices", "gpus"), [(0, 0), ("many", 0), (3, 2)])
def test_devices_that_are_none(devices: object, gpus: int) -> None:
    with pytest.raises(UserError, match=r"trainer\.devices: got"):
        wanted_ranks(devices, gpus)


def test_every_job_of_a_sweep_has_a_folder_of_its_own() -> None:
    assert folder_per_job(["-m", "seed=1,2", "out=runs/a"]) == ["-m", "seed=1,2", "out=runs/a/${hydra:job.num}", "hydra.sweep.dir=runs/a"]
    for own in ("out=a,b", "out=runs/${seed}"):
        assert folder_per_job(["-m", own]) == ["-m", own]


def test_another_rank_gets_the_overrides_of_the_first(tmp_path) -> None:
    """Whatever sys.argv is by then."""
    import hydra.core.hydra_config

    from kalle.cli.hydra_entry import run_hydra

    found: list[list[str]] = []
    words = ["data.latents=a", f"out={tmp_path}", "trainer.devices=2"]
    run_hydra(lambda config: found.append(rank_command(hydra.core.hydra_config.HydraConfig.get())), "train_lm", words)
    assert found[0][1:5] == ["-m", "kalle", "train", "lm"]
    assert found[0][-3:] == words
    assert all("=" in word for word in found[0][5:])
