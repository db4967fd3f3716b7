"""``kalle data``: look at a prepared corpus, and make better ones of it."""

from __future__ import annotations

import typer

from kalle.cli import data_shard

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)


@app.callback()
def _data() -> None:
    # With a callback a single command keeps its name.
    pass


app.command("shard")(data_shard.shard)
