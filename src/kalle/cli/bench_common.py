"""For every `kalle bench`: configurations of random weights, the machine in words, and its file of results."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

import typer


class Size(StrEnum):
    """Configurations that can be filled with random weights."""

    full = "full"
    small = "small"
    nano = "nano"


def configuration(part: str, size: Size | None) -> Any:
    """The configuration object of ``part``, "lm" or "flowvae"."""
    from hydra.utils import instantiate

    from kalle.cli.hydra_entry import compose

    assert size is not None
    return instantiate(compose(f"train_{part}", [f"{part}={size.value}"])[part], _convert_="all")


def machine(device: Any) -> dict[str, Any]:
    """The facts that a timing depends on."""
    import torch

    from kalle import __version__
    from kalle.checkpoint import device_name
    from kalle.evaluation.limits import load_average

    return {
        "kalle": __version__,
        "torch": torch.__version__,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "load": load_average(),
    }


def warn_of_load(load: float | None) -> None:
    """A line where other programs are at work."""
    from kalle.evaluation.limits import why_not_quiet

    if (reason := why_not_quiet(load)) is not None:
        typer.echo(f"warning: {reason}", err=True)


def write(path: Path, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The rows and the machine as JSON."""
    from kalle.files import write_atomic

    write_atomic(path, (json.dumps({"machine": facts, "rows": rows}, indent=2) + "\n").encode())
