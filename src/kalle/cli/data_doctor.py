"""``kalle data doctor``: what is wrong with a prepared corpus, with figures, and a filtered copy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kalle.data.corpus.quality import CheckResult

VERDICT_STYLES = {"good": "green", "look": "yellow", "bad": "bold red"}
BAD_CORPUS = 1
"""Exit code for a corpus with a bad verdict."""


def doctor(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="folder that `kalle prepare` wrote")],
    out: Annotated[Path | None, typer.Option(help="where the report goes; CORPUS/doctor by default")] = None,
    filter_to: Annotated[Path | None, typer.Option("--filter", metavar="OUT", help="write a corpus without the flagged items")] = None,
    remove: Annotated[str, typer.Option(metavar="CHECK,…", help="checks whose items --filter leaves out; `default` or names")] = "default",
    limit: Annotated[list[str] | None, typer.Option(metavar="NAME=NUMBER", help="another threshold; may be given again")] = None,
    pictures: Annotated[bool, typer.Option(help="draw the figures")] = True,
    jobs: Annotated[int, typer.Option(help="processes that measure")] = 1,
) -> None:
    """Measure every item, check the corpus (good, look, bad), and write a report with figures.

    Exit code 0, or 1 when a check says bad; with --filter the verdict is that on the filtered copy. An interrupted run goes on.
    """
    from kalle.data.corpus.cuts import check_target
    from kalle.data.corpus.doctor import FILTERED_BY, diagnose, write_filtered
    from kalle.data.corpus.quality import REMOVED_BY_DEFAULT, limits_from, removal_list

    limits = limits_from(limit or [])
    removed = REMOVED_BY_DEFAULT if remove == "default" else removal_list(remove)
    folder = out if out is not None else corpus / "doctor"
    if filter_to is not None:  # before the long part, too
        check_target(filter_to, corpus, FILTERED_BY)
    with measuring(folder, "measure") as progress:
        diagnosis = diagnose(corpus, folder, limits, jobs, progress, pictures)
        verdict = diagnosis.report["verdict"]
        _show(diagnosis.findings, diagnosis.report, folder, diagnosis.reused)
        if filter_to is not None:
            report = write_filtered(diagnosis, corpus, filter_to, removed, limits)
            verdict = report["verdict"]
            counts = ", ".join(f"{count} {check}" for check, count in report["removed_by_check"].items() if count) or "none"
            typer.echo(f"{report['items']} of {report['items_before']} items in {filter_to} ({verdict}); left out: {counts}")
    raise typer.Exit(BAD_CORPUS if verdict == "bad" else 0)


@contextmanager
def measuring(out: Path, label: str) -> Iterator[Callable[[Iterable[Any], int], Iterable[Any]]]:
    """Yields what puts a progress bar around an iterable of known length; Ctrl-C is one line that says how to go on."""
    from kalle.cli.interrupts import interruptible
    from kalle.progress import progress_bar

    again = f"interrupted: '{out}' is not finished yet; run the same command again to continue where it stopped"
    with interruptible(again), progress_bar() as bar:
        yield lambda items, total: bar.track(items, total=total, description=label)


def _show(findings: list[CheckResult], report: dict[str, Any], out: Path, reused: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    if reused:
        console.print(f"{reused} items were measured by an earlier run", markup=False)
    table = Table("check", "verdict", "found", "threshold")
    for finding in findings:
        verdict = Text(finding.verdict, style=VERDICT_STYLES[finding.verdict])
        table.add_row(finding.check, verdict, Text(finding.summary), Text(finding.threshold))
    console.print(table)
    for finding in findings:
        if finding.remedy:
            console.print(f"{finding.check}: {finding.remedy}", markup=False, soft_wrap=True)
    console.print(
        f"{report['verdict']}: {report['items']} items, {report['hours'] * 60:.1f} minutes, {report['flagged_items']} items flagged by "
        f"some check; figures and every item in {out}",
        markup=False,
        soft_wrap=True,
    )
