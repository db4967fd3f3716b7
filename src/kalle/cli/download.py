"""``kalle download``: the released files from the Hugging Face Hub."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import renamed
from kalle.convert import CONVERTED
from kalle.hub import DEFAULT_REPOSITORY

DEFAULT_OUT = Path("ckpt")
_log = logging.getLogger(__name__)


def download(
    hub_id: Annotated[str, typer.Argument(metavar="[HUB_ID]", help="OWNER/NAME on the hub.", show_default=True)] = DEFAULT_REPOSITORY,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder to put the files into.")] = DEFAULT_OUT,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit; the main branch when left out.")] = None,
) -> None:
    """Fetch released weights and check every file against the hub's own metadata.

    Run it again to continue after an interruption, or to check the files that are there; those that differ are fetched again.
    """
    from kalle import hub

    again = "interrupted; run the same command again to continue where it stopped"
    with interruptible(again), renamed({"check revision": "check --revision"}):
        snapshot, fetched = hub.download(hub_id, out, revision)
    if fetched and (out / CONVERTED).is_dir():
        _log.warning("'%s' was converted from the files that were here before; remove it to convert the new ones", out / CONVERTED)
    typer.echo(f"{out}: {len(snapshot.files)} files of {hub_id} at {snapshot.commit[:12]}, {len(fetched)} fetched, all checked")
