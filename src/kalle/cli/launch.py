"""Training in several processes: as torchrun or SLURM started them, or started here for `trainer.devices=N` on one machine."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

logger = logging.getLogger(__name__)

FIRST_RANK_SPEAKS_SECONDS = 2.0
"""How long another rank holds back its message: a mistake that all ranks find is then said by the first, whose end ends the others."""
PEER_SECONDS = 10.0
"""How long a rank whose peer is gone waits to be ended, so that only the peer's message is seen; also the grace after a signal."""
_POLL_SECONDS = 0.2
_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL")
_SIGNALLED = 128

_children: list[subprocess.Popen[bytes]] = []


def started_ranks(environment: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """(processes of this machine, machines) of a run that torchrun, SLURM or ourselves have started; None for a lone process."""
    found = os.environ if environment is None else environment
    if "WORLD_SIZE" in found and "LOCAL_WORLD_SIZE" in found:
        world, local = int(found["WORLD_SIZE"]), int(found["LOCAL_WORLD_SIZE"])
        return (local, world // local) if world > 1 else None
    tasks = int(found.get("SLURM_STEP_NUM_TASKS", "1"))
    if tasks == 1:
        return None
    nodes = int(found.get("SLURM_STEP_NUM_NODES", found.get("SLURM_NNODES", "1")))
    if tasks % nodes:
        raise UserError(f"SLURM: got {tasks} tasks on {nodes} machines, expected equally many on each; set --ntasks-per-node")
    return tasks // nodes, nodes


def wanted_ranks(devices: Any, gpus: int) -> int:
    """Processes that ``trainer.devices`` asks for on a machine whose run may use ``gpus`` GPUs (0: it runs on the CPU).

    UserError for something that is neither a number, auto nor a list of numbers.
    """
    if devices in ("auto", "-1", -1):
        return max(1, gpus)
    if not isinstance(devices, str | int):
        return len(devices)
    try:
        count = int(devices)
    except ValueError:
        count = 0
    if count < 1:
        raise UserError(f"trainer.devices: got {devices}, expected auto, a number of devices or a list; correct it")
    if gpus and count > gpus:
        raise UserError(f"trainer.devices: got {devices}, but torch sees {gpus} GPUs; lower it")
    return count


def start_ranks(config: DictConfig) -> None:
    """Start the other ranks of a run on several devices of this machine; this process becomes rank 0. Nothing for a lone process.

    UserError inside a sweep: its jobs share this process. The other ranks are ended when this one ends, and the other way round.
    """
    import torch
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from kalle.checkpoint import resolve_device

    if started_ranks() is not None:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            logging.getLogger().setLevel(logging.WARNING)  # rank 0 says it
        return
    device = resolve_device(config.device)
    gpus = torch.cuda.device_count() if device.type == "cuda" else 0
    count = 1 if device.index is not None else wanted_ranks(config.trainer.devices, gpus)
    if count == 1 or not HydraConfig.initialized():
        return
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(
            f"a sweep over runs on {count} devices: got trainer.devices={config.trainer.devices}, expected 1 in a sweep; "
            "set trainer.devices=1, or give each job its tasks with hydra/launcher=submitit_slurm (docs/how-to/distributed.md)"
        )
    _start(count, rank_command(HydraConfig.get()))


def rank_command(hydra: Any) -> list[str]:
    """The command of another rank of the training that ``hydra`` (Hydra's own configuration) describes."""
    stage = str(hydra.job.config_name).removeprefix("train_")
    return [sys.executable, "-m", "kalle", "train", stage, *hydra.overrides.hydra, *hydra.overrides.task]


def _start(count: int, command: list[str]) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for rank in map(str, range(1, count)):
        _children.append(subprocess.Popen(command, env={**os.environ, "RANK": rank, "LOCAL_RANK": rank}))
    atexit.register(_end_with_us)
    threading.Thread(target=_watch, name="ranks", daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _watch() -> None:
    """End everything when one of the other ranks fails: this process may hang in a collective operation that waits for it."""
    while any(child.poll() is None for child in _children) and not any(child.returncode for child in _children):
        time.sleep(_POLL_SECONDS)
    codes = [child.returncode for child in _children if child.returncode]
    if not codes:
        return
    code = codes[0] if codes[0] > 0 else _SIGNALLED - codes[0]
    if code > _SIGNALLED:
        time.sleep(PEER_SECONDS)  # asked to stop, as we probably were: time to end in order
    _kill_children()
    os._exit(code)


def _kill_children() -> None:
    for child in _children:
        with contextlib.suppress(OSError):
            child.kill()


def _end_with_us() -> None:
    failed = hasattr(sys, "last_value")
    deadline = time.monotonic() + (0 if failed else PEER_SECONDS)
    for child in _children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    _kill_children()


def error_prefix() -> str:
    """What goes before an error message; called right before it is printed, so that one that all ranks have is printed once."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        _kill_children()
        return "error: "
    time.sleep(FIRST_RANK_SPEAKS_SECONDS)
    return f"error: [rank {rank}] "


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` says no more than that another rank is gone.

    Then it first waits to be ended by the launcher, since that rank's message is the one to read.
    """
    if started_ranks() is None or not any(word in str(error) for word in _PEER_WORDS):
        return False
    time.sleep(PEER_SECONDS)
    return True


def placement(config: DictConfig, index: int | None, unused: bool) -> dict[str, Any]:
    """What the trainer has to know: devices, machines and, for several processes, a strategy.

    ``index`` is the number of the one GPU that was named; ``unused`` says that a step may leave trained parameters without a gradient.
    """
    started = started_ranks()
    if started is None:
        return {"devices": [index] if index is not None else config.trainer.devices}
    found: dict[str, Any] = {"devices": started[0], "num_nodes": started[1]}
    if unused and config.trainer.strategy in ("auto", "ddp"):
        found["strategy"] = "ddp_find_unused_parameters_true"
    return found
