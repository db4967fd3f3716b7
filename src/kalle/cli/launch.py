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
from typing import Any

from kalle.errors import UserError

logger = logging.getLogger(__name__)

FIRST_RANK_SPEAKS_SECONDS = 2.0
"""How long another rank holds back its message: rank 0 reports a mistake that all ranks find, and its exit stops the others."""
PEER_SECONDS = 10.0
"""How long a rank whose peer is gone waits to be ended, so that only the peer's message is seen; also the grace after a signal."""
_POLL_SECONDS = 0.2
_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL")
_SIGNALLED = 128

_children: list[subprocess.Popen[bytes]] = []


def start_ranks(device: str, devices: Any) -> None:
    """Start the other ranks of a run with ``trainer.devices=devices`` on this machine; this process becomes rank 0.

    Nothing for a lone process.

    UserError inside a sweep: its jobs share this process. The other ranks are ended when this one ends, and the other way round.
    """
    import torch
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from kalle.checkpoint import resolve_device
    from kalle.training.distributed import started_ranks, wanted_ranks

    if started_ranks() is not None:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            logging.getLogger().setLevel(logging.WARNING)  # rank 0 reports it
        return
    resolved = resolve_device(device)
    gpus = torch.cuda.device_count() if resolved.type == "cuda" else 0
    count = 1 if resolved.index is not None else wanted_ranks(devices, gpus)
    if count == 1 or not HydraConfig.initialized():
        return
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(
            f"a sweep over runs on {count} devices: got trainer.devices={devices}, expected 1 in a sweep; "
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
        time.sleep(PEER_SECONDS)  # stopped by a signal, as this process probably was: time to end in order
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
    """The prefix of an error message; called right before it is printed, so that an error of all ranks is printed once."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        _kill_children()
        return "error: "
    time.sleep(FIRST_RANK_SPEAKS_SECONDS)
    return f"error: [rank {rank}] "


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` only reports that another rank has ended.

    Then it first waits to be ended by the launcher, since that rank's message is the one to read.
    """
    from kalle.training.distributed import started_ranks

    if started_ranks() is None or not any(word in str(error) for word in _PEER_WORDS):
        return False
    time.sleep(PEER_SECONDS)
    return True
