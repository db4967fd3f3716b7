"""``kalle data``: look at a prepared corpus, and make better ones of it."""

from __future__ import annotations

import typer

from kalle.cli import data_doctor, data_retranscribe, data_shard

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)
app.command("doctor")(data_doctor.doctor)
app.command("retranscribe")(data_retranscribe.retranscribe)
app.command("shard")(data_shard.shard)
