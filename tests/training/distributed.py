"""Several processes in a test: functions over gloo, or whole `kalle` commands. Tests that use it are slow ones.

from training.distributed import kalle_on_ranks, on_ranks  # in any test: pytest puts tests/ on the path
"""

from __future__ import annotations

import datetime
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.multiprocessing

ROOT = Path(__file__).parents[2]


def on_ranks(function: Callable[..., Any], *arguments: Any, world_size: int = 2) -> list[Any]:
    """``function(*arguments)`` in ``world_size`` fresh processes joined by gloo; what each returns, by rank.

    The function must be importable (at the top of a module) and return what ``torch.save`` takes. An exception in one rank is raised here.
    """
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_rank, (world_size, folder, function, arguments), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _rank(rank: int, world_size: int, folder: str, function: Callable[..., Any], arguments: Sequence[Any]) -> None:
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    wait = datetime.timedelta(seconds=120)
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size, timeout=wait)
    try:
        torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def free_port() -> int:
    """A port of this machine that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torchrun tells the process of ``rank`` on one machine."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "NODE_RANK": 0, "GROUP_RANK": 0}
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    paths = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return {**os.environ, **{name: str(value) for name, value in ours.items()}, **meeting, **paths}


def kalle_on_ranks(
    words: Sequence[str], world_size: int = 2, cwd: Path | None = None, timeout_seconds: float = 240
) -> list[subprocess.CompletedProcess[str]]:
    """`kalle WORDS` once a rank, as torchrun would start it; what each printed, by rank. All are ended after ``timeout_seconds``.

    For training give ``trainer.devices=WORLD_SIZE`` and ``device=cpu`` among the words.
    """
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(world_size):
            with (Path(folder) / f"{rank}.out").open("w") as out, (Path(folder) / f"{rank}.err").open("w") as err:
                environment = rank_environment(rank, world_size, port)
                command = [sys.executable, "-m", "kalle", *words]
                processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment, cwd=cwd, start_new_session=True))
        try:
            codes = [process.wait(timeout_seconds) for process in processes]
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        texts = [[(Path(folder) / f"{rank}.{end}").read_text() for end in ("out", "err")] for rank in range(world_size)]
    return [subprocess.CompletedProcess(list(words), code, out, err) for code, (out, err) in zip(codes, texts, strict=True)]
