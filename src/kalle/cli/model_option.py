"""Which model a command speaks with: --model, or what is found without it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kalle.convert import CONVERTED

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle

DEFAULT = "the released weights in ckpt/, else kalle-nano, which ships"
ModelOption = Annotated[str | None, typer.Option(help="Weight folder, kalle-nano, or a hub id OWNER/NAME.", show_default=DEFAULT)]
FolderOption = Annotated[Path | None, typer.Option("--model", metavar="DIR", help="Weight folder, or kalle-nano.", show_default=DEFAULT)]


def model_folder(model: str | Path | None) -> Path:
    """The weight folder of --model; for None the default, and a line on standard error where that is the small model that ships.

    A path that is no folder is returned as it is, for its reader to refuse. UserError where there is no default.
    """
    from kalle.synthesis.weights import CKPT, SHIPPED, default_weights, resolve_weights, shipped_folder

    if model is None:
        folder = default_weights()
        if folder == shipped_folder():
            better = "`kalle download` fetches the full-size released weights, --model takes your own"
            typer.echo(f"model: {SHIPPED}, the small one that ships with kalle; {better}", err=True)
        return folder
    # Where there is no ckpt/ that folder looks like a hub id.
    return resolve_weights(Path(model) if Path(model) == CKPT / CONVERTED else model)


def load_model(model: str | Path | None, device: str, dtype: str = "auto") -> Kalle:
    """The whole model of --model."""
    folder = model_folder(model)
    from kalle.synthesis.kalle import Kalle

    return Kalle.from_pretrained(folder, device, dtype)
