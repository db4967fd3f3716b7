"""``kalle prepare``: recordings and texts in, a corpus folder of lhotse cuts and a report out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from kalle.data.corpora.items import Source

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

Out = Annotated[Path, typer.Option("--out", help="the corpus folder to write")]
MinSeconds = Annotated[float, typer.Option(help="shorter recordings are rejected")]
MaxSeconds = Annotated[float, typer.Option(help="longer recordings are rejected")]
ValidShare = Annotated[float, typer.Option(help="share of distinct texts held out for validation")]
TestShare = Annotated[float, typer.Option(help="share of distinct texts held out for tests")]
Seed = Annotated[int, typer.Option(help="another seed holds out other texts")]
Speaker = Annotated[str, typer.Option(help="speaker of items that name none")]
Language = Annotated[str, typer.Option(help="language of items that name none, such as en")]
# The longest prompt of the five languages; more than a user's corpus should hold in one item.
PROMPT_MAX_SECONDS = 120.0


@app.command()
def asterisk(
    out: Out,
    language: Annotated[str, typer.Option(help="en, fr, it, es or ru")] = "en",
    debs: Annotated[Path | None, typer.Option(help="folder of the two .deb files; without it apt-get fetches them")] = None,
    kbps: Annotated[float, typer.Option(help="Opus bit rate of the stored audio in kbit/s")] = 32.0,
    valid_share: Annotated[float | None, typer.Option(help="instead of the built-in share for validation")] = None,
    test_share: Annotated[float | None, typer.Option(help="instead of the built-in share for tests")] = None,
    seed: Seed = 0,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = PROMPT_MAX_SECONDS,
) -> None:
    """Telephone prompts of one studio voice (five languages) from Debian's packages."""
    import dataclasses

    from kalle.data.corpora.asterisk import PROMPT_SPLIT, build_prompts, package_names
    from kalle.data.corpora.debian import download_packages, find_packages
    from kalle.data.corpora.folder import read_embedded

    names = package_names(language)
    policy = dataclasses.replace(
        PROMPT_SPLIT,
        seed=seed,
        valid_share=PROMPT_SPLIT.valid_share if valid_share is None else valid_share,
        test_share=PROMPT_SPLIT.test_share if test_share is None else test_share,
    )
    with _resumable(out, "decode") as track:
        packages = find_packages(debs, names) if debs is not None else _fetched(out / "packages", names, find_packages, download_packages)
        build_prompts(packages, language, out, kbps, policy, track)
    _prepare(read_embedded(out), out, min_seconds, max_seconds)


@app.command()
def embedded(
    out: Out,
    corpus: Annotated[Path | None, typer.Option(help="folder with transcripts.jsonl, if not the checkout's own")] = None,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = PROMPT_MAX_SECONDS,
) -> None:
    """The English prompts inside the repository, with their fixed split."""
    from kalle.data.corpora.folder import embedded_folder, read_embedded

    _prepare(read_embedded(corpus if corpus is not None else embedded_folder()), out, min_seconds, max_seconds)


@app.command()
def folder(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="x.wav (or flac, mp3, opus, m4a …) beside x.txt or x.lab, at any depth")],
    out: Out,
    speaker: Annotated[str, typer.Option(help="speaker of every item; `folders` takes the name of its folder")] = "unknown",
    language: Language = "",
    valid_share: ValidShare = 0.02,
    test_share: TestShare = 0.02,
    seed: Seed = 0,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = 30.0,
) -> None:
    """A folder of audio files, each with a text file beside it."""
    from kalle.data.corpora.folder import read_folder

    _prepare(read_folder(source, speaker, language), out, min_seconds, max_seconds, valid_share, test_share, seed)


@app.command()
def jsonl(
    source: Annotated[Path, typer.Argument(metavar="FILE", help='{"audio", "text", "id"?, "speaker"?, "language"?, "split"?} a line')],
    out: Out,
    speaker: Speaker = "unknown",
    language: Language = "",
    valid_share: ValidShare = 0.02,
    test_share: TestShare = 0.02,
    seed: Seed = 0,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = 30.0,
) -> None:
    """A JSONL list; audio paths are relative to it. A line's own split wins over the shares."""
    from kalle.data.corpora.tables import read_jsonl_corpus

    _prepare(read_jsonl_corpus(source, speaker, language), out, min_seconds, max_seconds, valid_share, test_share, seed)


@app.command()
def csv(
    source: Annotated[Path, typer.Argument(metavar="FILE", help="audio|text a line, with or without a header line")],
    out: Out,
    delimiter: Annotated[str, typer.Option(help="what separates the columns")] = "|",
    speaker: Speaker = "unknown",
    language: Language = "",
    valid_share: ValidShare = 0.02,
    test_share: TestShare = 0.02,
    seed: Seed = 0,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = 30.0,
) -> None:
    """An `audio|text` list; audio paths are relative to it."""
    from kalle.data.corpora.tables import read_csv_corpus

    _prepare(read_csv_corpus(source, delimiter, speaker, language), out, min_seconds, max_seconds, valid_share, test_share, seed)


def _prepare(
    source: Source, out: Path, min_seconds: float, max_seconds: float, valid_share: float = 0.0, test_share: float = 0.0, seed: int = 0
) -> None:
    from kalle.data.prepare import prepare_corpus
    from kalle.data.prepare_check import PrepareOptions
    from kalle.data.prepare_split import SplitPolicy

    options = PrepareOptions(min_seconds=min_seconds, max_seconds=max_seconds, split=SplitPolicy(valid_share, test_share, seed))
    with _resumable(out, "check") as track:
        prepared = prepare_corpus(source, out, options, track)
    _show(prepared.report, out, prepared.unchanged, prepared.resumed_items)


@contextmanager
def _resumable(out: Path, label: str) -> Iterator[Callable[[list[Any]], Iterable[Any]]]:
    """Yields what puts a progress bar around a list; Ctrl-C is one line that says how to go on."""
    from kalle.bars import progress_bar
    from kalle.cli.interrupts import interruptible

    again = f"interrupted: '{out}' is not finished yet; run the same command again to continue where it stopped"
    with interruptible(again), progress_bar() as bar:
        yield lambda items: bar.track(items, description=label)


def _show(report: dict[str, Any], out: Path, unchanged: bool, resumed_items: int) -> None:
    from rich.console import Console
    from rich.table import Table

    from kalle.data.report import tables

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


def _fetched(folder: Path, names: list[str], find: Callable[..., list[Path]], download: Callable[..., list[Path]]) -> list[Path]:
    """The packages of an earlier run, else fresh ones."""
    if all(any(folder.glob(f"{name}_*.deb")) for name in names):
        return find(folder, names)
    return download(folder, names)
