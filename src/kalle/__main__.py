"""`python -m kalle` is the `kalle` command."""

from kalle.cli.main import run

run()
