"""`kalle listening make` and `kalle listening score`: a listening test as a static page, and its scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from kalle.errors import UserError

app = typer.Typer(add_completion=False, rich_markup_mode=None, no_args_is_help=True, help="Listening tests for naturalness or likeness.")


@app.command()
def make(
    systems: Annotated[
        list[str], typer.Argument(metavar="NAME=FOLDER...", help="Each a folder of ID.wav, or one that `kalle evaluate` wrote.")
    ],
    out: Annotated[Path, typer.Option(help="Gets page/, for the listeners, and key.json, which is not for them.")],
    kind: Annotated[str, typer.Option(help="mos: naturalness; smos: likeness of the speaker to a reference.")] = "mos",
    references: Annotated[Path | None, typer.Option(help="For smos: folder with the recording ID.wav of each item's speaker.")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="Items of each system, drawn among those that all have.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draw, the hidden names and the listeners' orders.")] = 0,
    title: Annotated[str, typer.Option(help="On top of the page.")] = "Listening test",
    keep_level: Annotated[bool, typer.Option("--keep-level", help="Leave each stimulus as loud as it is.")] = False,
) -> None:
    """Write a blinded page that opens from the disk; listeners rate from 1 to 5 in half points and send a CSV file back."""
    from kalle.evaluation.listening import ListeningConfig
    from kalle.evaluation.listening import make as make_test

    named = dict(_named(system) for system in systems)
    if len(named) < len(systems):
        raise UserError("systems: got a name twice, expected each once; give every folder a name of its own")
    if kind not in ("mos", "smos"):
        raise UserError(f"--kind: got '{kind}', expected mos or smos")
    config = ListeningConfig(named, out, kind, items, seed, references, title, not keep_level)  # type: ignore[arg-type]
    key = make_test(config)
    typer.echo(f"{len(key['stimuli'])} stimuli: {len(key['systems'])} systems, {len(key['items'])} items")
    typer.echo(f"for listeners: {out / 'page'} (open index.html); not for them: {out / 'key.json'}")


def _named(system: str) -> tuple[str, str]:
    name, equals, folder = system.partition("=")
    if not (name and equals and folder):
        raise UserError(f"bad system: got '{system}', expected NAME=FOLDER")
    return name, folder


@app.command()
def score(
    key: Annotated[Path, typer.Argument(help="The key.json of the test.")],
    ratings: Annotated[list[Path], typer.Argument(metavar="CSV...", help="The files that listeners sent.")],
    out: Annotated[Path | None, typer.Option(help="Folder for listening.json and listening.md.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the resamples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the score of every system with 95% intervals, as rated and with every listener's ratings normalised."""
    from kalle.evaluation import listening
    from kalle.files import write_atomic

    found = listening.score(key, ratings, seed)
    if out is not None:
        write_atomic(out / "listening.json", json.dumps(listening.as_json(found), indent=2, ensure_ascii=False) + "\n")
        write_atomic(out / "listening.md", listening.markdown(found))
    typer.echo(json.dumps(listening.as_json(found), ensure_ascii=False) if as_json else listening.markdown(found).rstrip())
