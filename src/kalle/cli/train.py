"""`kalle train flowvae|lm`: which stage, and its overrides."""

from __future__ import annotations

import sys

from kalle.errors import UserError

STAGES = ("flowvae", "lm")
USAGE = """usage: kalle train flowvae data.corpus=DIR out=DIR [KEY=VALUE ...] [--dry-run]
       kalle train lm data.latents=DIR out=DIR [flowvae=DIR] [KEY=VALUE ...] [--dry-run]

--dry-run checks configuration, data and shapes, estimates memory, steps and disk, and writes nothing.

`kalle train flowvae --help` and `kalle train lm --help` list every key; --cfg job prints the configuration of a run.
"""


def run(overrides: list[str]) -> int:
    """The first word names the stage; the rest are Hydra overrides. Returns the exit status."""
    from kalle.cli.hydra_entry import folder_override, run_hydra
    from kalle.cli.train_dry_run import FLAG, dry_run_flowvae, dry_run_lm

    if overrides and overrides[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if not overrides or overrides[0] not in STAGES:
        got = repr(overrides[0]) if overrides else "nothing"
        raise UserError(
            f"kalle train: got {got}, expected one of {', '.join(STAGES)} and then Hydra overrides such as trainer.max_steps=1000"
        )
    stage, dry = overrides[0], FLAG in overrides
    words = [word for word in overrides[1:] if word != FLAG]
    if stage == "lm":
        words = folder_override(words, "flowvae")
    if dry:
        return run_hydra(dry_run_flowvae if stage == "flowvae" else dry_run_lm, f"train_{stage}", words)
    if stage == "flowvae":
        from kalle.cli.train_flowvae import train_flowvae

        return run_hydra(train_flowvae, "train_flowvae", words)
    from kalle.cli.train_lm import train_lm

    return run_hydra(train_lm, "train_lm", words)
