"""What all of ``kalle prepare`` shares: its options, the run with its bar, and what is printed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kalle.data.corpus.items import Source

Out = Annotated[Path, typer.Option("--out", help="the corpus folder to write")]
MinSeconds = Annotated[float, typer.Option(help="shorter recordings are rejected")]
MaxSeconds = Annotated[float, typer.Option(help="longer recordings are rejected")]
ValidShare = Annotated[float, typer.Option(help="share of distinct texts held out for validation")]
TestShare = Annotated[float, typer.Option(help="share of distinct texts held out for tests")]
Seed = Annotated[int, typer.Option(help="another seed holds out other texts")]
Speaker = Annotated[str, typer.Option(help="speaker of items that name none")]
Language = Annotated[str, typer.Option(help="language of items that name none, such as en")]
Jobs = Annotated[int, typer.Option(help="processes that check the recordings", min=1)]
HeadersOnly = Annotated[bool, typer.Option("--headers-only", help="believe the headers: quick, but damage, silence and clipping pass")]


def run_prepare(
    source: Source,
    out: Path,
    min_seconds: float,
    max_seconds: float,
    valid_share: float = 0.0,
    test_share: float = 0.0,
    seed: int = 0,
    jobs: int = 1,
    headers_only: bool = False,
) -> None:
    """Check ``source`` into the corpus folder ``out`` and print its report."""
    from kalle.data.corpus.check import PrepareOptions
    from kalle.data.corpus.prepare import prepare_corpus
    from kalle.data.corpus.splits import SplitPolicy

    policy = SplitPolicy(valid_share, test_share, seed)
    options = PrepareOptions(min_seconds=min_seconds, max_seconds=max_seconds, headers_only=headers_only, split=policy)
    with resumable(out, "check") as track:
        prepared = prepare_corpus(source, out, options, track, jobs)
    _show(prepared.report, out, prepared.unchanged, prepared.resumed_items)


@contextmanager
def resumable(out: Path, label: str) -> Iterator[Callable[[list[Any]], Iterable[Any]]]:
    """Yields what puts a progress bar around a list; Ctrl-C is one line that says how to go on."""
    from kalle.cli.interrupts import interruptible
    from kalle.progress import progress_bar

    again = f"interrupted: '{out}' is not finished yet; run the same command again to continue where it stopped"
    with interruptible(again), progress_bar() as bar:
        yield lambda items: bar.track(items, description=label)


def _show(report: dict[str, Any], out: Path, unchanged: bool, resumed_items: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from kalle.data.corpus.report import tables

    console = Console(highlight=False)
    if unchanged:
        console.print(f"unchanged: '{out}' was made from the same audio, texts and options; nothing to do", markup=False, soft_wrap=True)
    if resumed_items:
        console.print(f"continued: {resumed_items} items were checked by an earlier, interrupted run", markup=False)
    for title, headers, rows in tables(report):
        table = Table(*headers, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(
        f"{report['kept']} of {report['items']} items kept, {report['hours'] * 60:.1f} minutes; "
        f"every rejected item is listed in {out / 'report.json'}",
        markup=False,
        soft_wrap=True,
    )
    empty = [split for split, row in report["splits"].items() if not row["items"]]
    if empty:
        console.print(f"note: no items in {' and '.join(empty)}; raise the share, or give a split in the list", markup=False)
