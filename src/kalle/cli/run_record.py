"""What made a run: versions, command line, seed, git state and machine, written before its first step."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import lightning
    from omegaconf import DictConfig

RECORD_NAME, DIFF_NAME = "run.json", "git.diff"
PACKAGES = ("torch", "lightning", "transformers", "lhotse", "numpy", "hydra-core")
MAX_DIFF_BYTES = 5_000_000


def write_record(out: Path, config: DictConfig, trainer: lightning.Trainer, checkpoint: Path | None) -> None:
    """Append this start to ``out``/run.json; changes to tracked files that git has not seen go to ``out``/git.diff.

    The file is ``{"starts": [...]}``, one entry a start or resume, newest last. A run.json that is no such file is moved to run.json.old.
    """
    from omegaconf import OmegaConf

    from kalle.checkpoint import write_json

    path = out / RECORD_NAME
    starts = _earlier(path)
    git, difference = git_state(Path(__file__).parent)
    name = DIFF_NAME if not starts else f"git-{len(starts)}.diff"
    if git is not None and difference:
        from kalle.files import write_atomic

        git["diff"] = name
        write_atomic(out / name, difference[:MAX_DIFF_BYTES])
        git["diff_cut"] = len(difference) > MAX_DIFF_BYTES
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "seed": config.seed,
        "versions": versions(),
        "git": git,
        "machine": machine(trainer),
        "config": OmegaConf.to_container(config, resolve=True),
    }
    write_json(path, {"starts": [*starts, start]})


def _earlier(path: Path) -> list[Any]:
    from kalle.checkpoint import read_json
    from kalle.errors import UserError

    if not path.is_file():
        return []
    try:
        starts = read_json(path)["starts"]
        assert isinstance(starts, list)
    except (UserError, KeyError, TypeError, AssertionError):
        os.replace(path, path.with_suffix(".json.old"))
        return []
    return starts


def versions() -> dict[str, str]:
    """Versions of Python, kalle and what it trains with; packages that are not installed are left out."""
    import kalle

    found = {"python": platform.python_version(), "kalle": kalle.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(trainer: lightning.Trainer) -> dict[str, Any]:
    """Host, processors, accelerators and the number of processes."""
    import torch

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "gpus": gpus,
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
    }


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> tuple[dict[str, Any] | None, bytes]:
    """Commit and uncommitted changes of the checkout that ``folder`` lies in; (None, b"") outside one or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, b""
    # An installed package may lie inside an unrelated checkout, such as an environment in a project's folder.
    if _git(folder, "ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return None, b""
    status = _git(folder, "status", "--porcelain") or b""
    untracked = [line[3:] for line in status.decode(errors="replace").splitlines() if line.startswith("??")]
    difference = _git(folder, "diff", "HEAD", "--no-color") or b""
    return {"commit": commit.decode().strip(), "dirty": bool(status.strip()), "untracked": untracked}, difference


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
