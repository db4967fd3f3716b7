"""``kalle prepare``: recordings and texts in, a corpus folder of lhotse cuts and a report out."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import renamed
from kalle.data.corpus.items import READERS, Option, PrepareOptions, Reader, SplitPolicy

if TYPE_CHECKING:
    from kalle.data.corpus.items import Source

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

# The longest prompt of the five languages; more than a user's corpus should hold in one item.
PROMPT_MAX_SECONDS = 120.0
Out = Annotated[Path, typer.Option("--out", help="the corpus folder to write")]
MinSeconds = Annotated[float, typer.Option(help="shorter recordings are rejected")]
MaxSeconds = Annotated[float, typer.Option(help="longer recordings are rejected")]
ValidShare = Annotated[float, typer.Option(help="share of distinct texts held out for validation, at least one; 0 for none")]
TestShare = Annotated[float, typer.Option(help="share of distinct texts held out for tests, at least one; 0 for none")]
Seed = Annotated[int, typer.Option(help="another seed holds out other texts")]
Jobs = Annotated[int, typer.Option(help="processes that check the recordings", min=1)]
HeadersOnly = Annotated[bool, typer.Option("--headers-only", help="read headers only: quick, but blind to damage, silence and clipping")]

_NAMED = {
    "min_seconds": "--min-seconds",
    "max_seconds": "--max-seconds",
    "fewer jobs": "fewer --jobs",
    "(corpus)": "with --corpus",
    "set columns": "give --columns",
    "set delimiter": "give --delimiter",
}
"""Parameters that the library's messages name, and the flags they have here."""


@app.command()
def embedded(
    out: Out,
    corpus: Annotated[Path | None, typer.Option(help="folder with transcripts.jsonl, if not the checkout's own")] = None,
    min_seconds: MinSeconds = PrepareOptions.min_seconds,
    max_seconds: MaxSeconds = PROMPT_MAX_SECONDS,
) -> None:
    """The English prompts inside the repository, with their fixed split."""
    from kalle.data.corpus.lists import embedded_folder, read_embedded

    with renamed(_NAMED):
        source = read_embedded(corpus if corpus is not None else embedded_folder())
    run_prepare(source, out, min_seconds, max_seconds, valid_share=0.0, test_share=0.0)


def _command(reader: Reader) -> Callable[..., None]:
    """The command of a reader: its source and its own options, then those of all."""

    def command(
        source: Any,
        out: Out,
        valid_share: ValidShare = SplitPolicy.valid_share,
        test_share: TestShare = SplitPolicy.test_share,
        seed: Seed = 0,
        min_seconds: MinSeconds = PrepareOptions.min_seconds,
        max_seconds: MaxSeconds = PrepareOptions.max_seconds,
        jobs: Jobs = 1,
        headers_only: HeadersOnly = False,
        **own: Any,
    ) -> None:
        if "columns" in own:
            own["columns"] = tuple(own["columns"].split(",")) if own["columns"] else ()
        with renamed(_NAMED):
            found = reader.read(source, **own)
        run_prepare(found, out, min_seconds, max_seconds, valid_share, test_share, seed, jobs, headers_only)

    # Evaluated here: typer takes a signature that it is given as it is.
    shared = dict(inspect.signature(command, eval_str=True).parameters)
    shared.pop("own")
    kind: Any = str if reader.source == "DATASET" else Path
    source = Annotated[kind, typer.Argument(metavar=reader.source, help=reader.source_help)]
    shared["source"] = shared["source"].replace(annotation=source)
    if not reader.headers:
        shared.pop("headers_only")
    first, second, *others = shared.values()
    command.__signature__ = inspect.Signature([first, second, *map(_parameter, reader.options), *others])  # type: ignore[attr-defined]
    command.__annotations__ = {}
    return command


def _parameter(option: Option) -> inspect.Parameter:
    kind: Any = str if option.default is not None else str | None
    annotation = Annotated[kind, typer.Option(help=option.help)]
    return inspect.Parameter(option.name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=option.default, annotation=annotation)


for _name, _reader in READERS.items():
    app.command(_name, help=_reader.help)(_command(_reader))


def run_prepare(
    source: Source,
    out: Path,
    min_seconds: float,
    max_seconds: float,
    valid_share: float,
    test_share: float,
    seed: int = 0,
    jobs: int = 1,
    headers_only: bool = False,
) -> None:
    """Check ``source`` into the corpus folder ``out`` and print its report. A part that a corpus holds out itself gets no share."""
    from kalle.data.corpus.prepare import prepare_corpus
    from kalle.progress import progress_bar

    own = {item.split for item in source.items}
    policy = SplitPolicy(0.0 if "valid" in own else valid_share, 0.0 if "test" in own else test_share, seed)
    with renamed(_NAMED):
        options = PrepareOptions(min_seconds=min_seconds, max_seconds=max_seconds, headers_only=headers_only, split=policy)
    again = f"interrupted: '{out}' is not finished yet; run the same command again to continue where it stopped"
    with interruptible(again), renamed(_NAMED), progress_bar() as bar:
        prepared = prepare_corpus(source, out, options, lambda items: bar.track(items, description="check"), jobs)
    _show(prepared.report, out, prepared.unchanged, prepared.resumed_items)


def _show(report: dict[str, Any], out: Path, unchanged: bool, resumed_items: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from kalle.data.corpus.prepare import tables

    console = Console(highlight=False, markup=False)  # names of speakers may hold brackets
    if unchanged:
        console.print(f"unchanged: '{out}' was made from the same audio, texts and options; nothing to do", soft_wrap=True)
    if resumed_items:
        console.print(f"continued: {resumed_items} items were checked by an earlier, interrupted run")
    for title, headers, rows in tables(report):
        table = Table(*headers, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print(
        f"{report['kept']} of {report['items']} items kept, {report['hours'] * 60:.1f} minutes; "
        f"every rejected item is listed in {out / 'report.json'}",
        soft_wrap=True,
    )
    empty = [split for split, row in report["splits"].items() if not row["items"] and split in ("valid", "test")]
    if empty and report["splits"]["train"]["items"]:  # else the corpus is for tests alone, as was asked for
        remedy = " and ".join(f"--{split}-share" for split in empty)
        console.print(f"note: no items in {' and '.join(empty)}; raise {remedy}, or give a split in the list", soft_wrap=True)
