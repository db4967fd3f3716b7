"""Real processes, killed or told to end at random moments, alone and in pairs, against runs that nothing disturbed."""

from __future__ import annotations

import csv
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kalle.training.checkpointing import LAST, step_of, step_paths
from training.distributed import free_port, rank_environment

STEPS = 40
Overrides = Sequence[str]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Run:
    """`kalle train` in ``ranks`` processes, with its stderr by rank beside ``out``."""

    def __init__(self, stage: str, overrides: Overrides, out: Path, ranks: int = 1) -> None:
        self.out = out
        out.parent.mkdir(parents=True, exist_ok=True)
        port = free_port()
        several = [f"trainer.devices={ranks}"] if ranks > 1 else []
        command = [sys.executable, "-m", "kalle", "train", stage, *overrides, *several, f"out={out}"]
        self.processes: list[subprocess.Popen[bytes]] = []
        self.errors: list[Path] = []
        for rank in range(ranks):
            path = out.with_name(f"{out.name}-{time.monotonic_ns()}-{rank}.err")
            plain = {key: value for key, value in rank_environment(0, 1, port).items() if "RANK" not in key and "WORLD" not in key}
            environment = rank_environment(rank, ranks, port) if ranks > 1 else plain
            with path.open("wb") as file:
                self.processes.append(
                    subprocess.Popen(command, stdout=file, stderr=file, env=environment, cwd=out.parent, start_new_session=True)
                )
            self.errors.append(path)

    @property
    def running(self) -> bool:
        return all(process.poll() is None for process in self.processes)

    def rows(self) -> int:
        """Lines of its table of metrics, which grow as it goes."""
        table = self.out / "csv" / "version_0" / "metrics.csv"
        return table.read_bytes().count(b"\n") if table.is_file() else 0

    @property
    def started(self) -> bool:
        """Whether it has said what it is going to do, which is after its table was cut to the checkpoint."""
        return any(b"disk: " in path.read_bytes() for path in self.errors)

    def last_step(self) -> int:
        table = self.out / "csv" / "version_0" / "metrics.csv"
        if not table.is_file():
            return 0
        lines = table.read_text().splitlines()
        column = lines[0].split(",").index("step")
        return max((int(line.split(",")[column]) for line in lines[1:] if line.count(",") == lines[0].count(",")), default=0)

    def wait_for(self, condition: Callable[[], bool], seconds: float = 600) -> bool:
        until = time.monotonic() + seconds
        while self.running and time.monotonic() < until:
            if condition():
                return True
            time.sleep(0.0005)
        return False

    def kill(self) -> None:
        """Every process and its data workers at once, as a machine that loses its power."""
        for process in self.processes:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.wait()

    def wait(self) -> list[int]:
        try:
            return [process.wait(600) for process in self.processes]
        finally:
            for process in self.processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)

    def said(self) -> str:
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in self.errors)


def newest(out: Path) -> int:
    """Steps in the newest checkpoint, 0 without any."""
    paths = step_paths(out / "checkpoints")
    return step_of(paths[0]) or 0 if paths else 0


def finished(stage: str, overrides: Overrides, out: Path, ranks: int = 1) -> None:
    run = Run(stage, overrides, out, ranks)
    assert set(run.wait()) == {0}, run.said()


def log(out: Path) -> list[dict[str, str]]:
    """By step, everything logged about it; a value that appears twice is an error."""
    assert [path.name for path in (out / "csv").iterdir()] == ["version_0"]
    merged: dict[int, dict[str, str]] = {}
    with (out / "csv" / "version_0" / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            values = {name: value for name, value in row.items() if value and name not in ("step", "epoch")}
            step = merged.setdefault(int(row["step"]), {})
            assert not values.keys() & step.keys(), f"twice: {row}"
            step |= values
    return [{"step": str(step), **merged[step]} for step in sorted(merged)]


def flat(value: Any, where: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, inner in value.items() for k, v in flat(inner, f"{where}/{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for index, inner in enumerate(value) for k, v in flat(inner, f"{where}/{index}").items()}
    return {where: value}


def assert_same_end(one: Path, other: Path, stage: str) -> None:
    assert log(one) == log(other)
    tables = [out / "csv" / "version_0" / "metrics.csv" for out in (one, other)]
    assert tables[0].read_bytes() == tables[1].read_bytes()
    states = [torch.load(out / "checkpoints" / LAST, weights_only=True) for out in (one, other)]
    for key in ("global_step", "state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "callbacks"):
        a, b = flat(states[0][key]), flat(states[1][key])
        assert a.keys() == b.keys(), key
        for name, value in a.items():
            same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
            assert same, f"{key}{name}"
    weights = [load_file(out / "weights" / stage / "model.safetensors") for out in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def longer(stage: str, overrides: Overrides, *more: str) -> list[str]:
    """Dropout draws from the global generators, data workers prepare ahead, and epochs are a few batches long."""
    dropout = ["lora=default", "lora.rank=2", "lora.dropout=0.2"] if stage == "lm" else []
    words = [f"trainer.max_steps={STEPS}", "trainer.val_check_interval=15", "callbacks.checkpoint.every_steps=7", "data.num_workers=1"]
    return [*overrides, *words, *dropout, *more]


def test_dropout_draws_from_the_global_generators(lm_overrides: list[str], tmp_path: Path) -> None:
    """Otherwise the tests below would say nothing about them."""
    finished("lm", longer("lm", lm_overrides, "trainer.max_steps=3"), tmp_path / "with")
    finished("lm", longer("lm", lm_overrides, "trainer.max_steps=3", "lora.dropout=0.0"), tmp_path / "without")
    assert log(tmp_path / "with")[2]["train/total"] != log(tmp_path / "without")[2]["train/total"]


@pytest.mark.parametrize(("stage", "ranks", "seed"), [("lm", 1, 0), ("lm", 1, 1), ("flowvae", 1, 2), ("lm", 2, 3), ("flowvae", 2, 4)])
def test_killed_at_random_moments(
    stage: str, ranks: int, seed: int, lm_overrides: list[str], flowvae_overrides: list[str], tmp_path: Path
) -> None:
    overrides = longer(stage, lm_overrides if stage == "lm" else flowvae_overrides)
    finished(stage, overrides, tmp_path / "whole", ranks)
    moments, kills = random.Random(seed), 0
    for _ in range(3):
        before = newest(tmp_path / "cut")
        run = Run(stage, overrides, tmp_path / "cut", ranks)
        # Rows of the part that is made anew vanish when the run has started, so count from the checkpoint that it goes on from.
        wanted = before + moments.randint(1, STEPS // 3)
        if run.wait_for(lambda run=run, wanted=wanted, before=before: run.started and run.last_step() >= min(wanted, STEPS - 2)):
            time.sleep(moments.random() * 0.05)
            kills += run.running
        run.kill()
    assert kills >= 2, run.said()
    finished(stage, overrides, tmp_path / "cut", ranks)
    assert_same_end(tmp_path / "whole", tmp_path / "cut", stage)


def test_killed_while_it_writes_a_checkpoint(lm_overrides: list[str], tmp_path: Path) -> None:
    overrides = longer("lm", lm_overrides, "callbacks.checkpoint.every_steps=5", "trainer.max_steps=40")
    finished("lm", overrides, tmp_path / "whole")
    folder, caught = tmp_path / "cut" / "checkpoints", 0
    for count in (2, 2, 2):
        run = Run("lm", overrides, tmp_path / "cut")
        before = len(step_paths(folder))
        written = run.wait_for(lambda before=before, count=count: len(step_paths(folder)) >= min(2, before + count))
        if written and run.wait_for(lambda: any(folder.glob("*.ckpt.*.partial"))):
            run.kill()
            caught += any(folder.glob("step-*.ckpt.*.partial"))
        run.kill()
        assert step_paths(folder), "what was saved before is still there"
    print(f"killed inside a write: {caught} of 3")
    finished("lm", overrides, tmp_path / "cut")
    assert not list(folder.glob("*.partial"))
    assert_same_end(tmp_path / "whole", tmp_path / "cut", "lm")


@pytest.mark.parametrize(
    ("number", "ranks", "told"),
    [(signal.SIGTERM, 1, (0,)), (signal.SIGUSR1, 1, (0,)), (signal.SIGTERM, 2, (1,)), (signal.SIGUSR1, 2, (0, 1))],
)
def test_preemption_saves_and_ends_with_its_code(
    number: int, ranks: int, told: tuple[int, ...], lm_overrides: list[str], tmp_path: Path
) -> None:
    """One rank hearing it is enough, and all stop at the same step."""
    overrides = longer("lm", lm_overrides, "callbacks.checkpoint.every_steps=1000", "trainer.val_check_interval=1000")
    finished("lm", overrides, tmp_path / "whole", ranks)
    run = Run("lm", overrides, tmp_path / "cut", ranks)
    assert run.wait_for(lambda: run.rows() >= 20), run.said()
    for rank in told:
        os.kill(run.processes[rank].pid, number)
    assert run.wait() == [128 + number] * ranks, run.said()
    (saved,) = step_paths(tmp_path / "cut" / "checkpoints")
    step = torch.load(saved, weights_only=True)["global_step"]
    assert f"stopped by {signal.Signals(number).name} at step {step}; saved, run the same command again to continue" in run.said()
    assert 9 <= step < STEPS
    finished("lm", overrides, tmp_path / "cut", ranks)
    assert_same_end(tmp_path / "whole", tmp_path / "cut", "lm")


def test_another_number_of_processes_goes_on_with_a_warning(lm_overrides: list[str], tmp_path: Path) -> None:
    """The epoch starts anew; weights, moments, schedule and step stay."""
    overrides = longer("lm", lm_overrides, "trainer.max_steps=9", "scheduler.total_steps=30")
    finished("lm", overrides, tmp_path / "run", ranks=2)
    run = Run("lm", longer("lm", lm_overrides, "trainer.max_steps=30", "scheduler.total_steps=30"), tmp_path / "run")
    assert run.wait() == [0], run.said()
    assert "1 processes instead of 2" in run.said()
    assert [int(row["step"]) for row in log(tmp_path / "run") if "train/total" in row] == list(range(30))


def test_two_ranks_skip_together_when_one_has_a_bad_batch(lm_overrides: list[str], tmp_path: Path) -> None:
    from training.distributed import on_ranks

    results = on_ranks(guarded_on_rank, str(tmp_path / "bad"))
    assert results[0]["skipped"] == results[1]["skipped"] == 1
    assert torch.equal(results[0]["weight"], results[1]["weight"])
    assert torch.isfinite(results[0]["weight"]).all()
    kept = [torch.load(tmp_path / "bad" / f"step-4.rank-{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert [bool(torch.isfinite(torch.tensor(state["losses"])).all()) for state in kept] == [True, False]


def guarded_on_rank(folder: str) -> dict[str, Any]:
    """Five updates of a line over two ranks; rank 1's fourth batch is no number."""
    import lightning
    from torch.utils.data import DataLoader

    from kalle.training.update_guard import GuardConfig, UpdateGuard
    from training.test_update_guard import Line, batches

    rank = torch.distributed.get_rank()
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    guard, line = UpdateGuard(folder, GuardConfig()), Line()
    trainer = lightning.Trainer(
        max_steps=5, max_epochs=-1, accelerator="cpu", devices=2, strategy="ddp_find_unused_parameters_true", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, callbacks=[guard],
    )  # fmt: skip
    made = batches(5, {3: float("nan")} if rank == 1 else {})
    trainer.fit(line, DataLoader(made, batch_size=None, collate_fn=lambda batch: batch))
    return {"skipped": guard.skipped, "weight": line.layer.weight.detach()}
