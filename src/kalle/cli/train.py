"""`kalle train flowvae|lm`: which stage, and its overrides."""

from __future__ import annotations

import sys

from kalle.errors import UserError

STAGES = ("flowvae", "lm")
USAGE = """usage: kalle train flowvae data.corpus=DIR out=DIR [KEY=VALUE ...]
       kalle train lm data.latents=DIR out=DIR [flowvae=DIR] [KEY=VALUE ...]

`kalle train flowvae --help` and `kalle train lm --help` list every key; --cfg job prints the configuration of a run.
"""


def run(overrides: list[str]) -> int:
    """The first word names the stage; the rest are Hydra overrides. Returns the exit status."""
    from kalle.cli.hydra_entry import folder_override, run_hydra

    if overrides and overrides[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if not overrides or overrides[0] not in STAGES:
        got = repr(overrides[0]) if overrides else "nothing"
        raise UserError(
            f"kalle train: got {got}, expected one of {', '.join(STAGES)} and then Hydra overrides such as trainer.max_steps=1000"
        )
    if overrides[0] == "flowvae":
        from kalle.cli.train_flowvae import train_flowvae

        return run_hydra(train_flowvae, "train_flowvae", overrides[1:])
    from kalle.cli.train_lm import train_lm

    return run_hydra(train_lm, "train_lm", folder_override(overrides[1:], "flowvae"))
