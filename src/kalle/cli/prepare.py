"""``kalle prepare``: recordings and texts in, a corpus folder of lhotse cuts and a report out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kalle.cli import prepare_corpora
from kalle.cli.prepare_run import (
    HeadersOnly,
    Jobs,
    Language,
    MaxSeconds,
    MinSeconds,
    Out,
    Seed,
    Speaker,
    TestShare,
    ValidShare,
    run_prepare,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

# The longest prompt of the five languages; more than a user's corpus should hold in one item.
PROMPT_MAX_SECONDS = 120.0
prepare_corpora.register(app)


@app.command()
def embedded(
    out: Out,
    corpus: Annotated[Path | None, typer.Option(help="folder with transcripts.jsonl, if not the checkout's own")] = None,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = PROMPT_MAX_SECONDS,
) -> None:
    """The English prompts inside the repository, with their fixed split."""
    from kalle.data.corpus.lists import embedded_folder, read_embedded

    run_prepare(read_embedded(corpus if corpus is not None else embedded_folder()), out, min_seconds, max_seconds)


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
    jobs: Jobs = 1,
    headers_only: HeadersOnly = False,
) -> None:
    """A folder of audio files, each with a text file beside it."""
    from kalle.data.corpus.lists import read_folder

    run_prepare(read_folder(source, speaker, language), out, min_seconds, max_seconds, valid_share, test_share, seed, jobs, headers_only)


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
    jobs: Jobs = 1,
    headers_only: HeadersOnly = False,
) -> None:
    """A JSONL list; audio paths are relative to it. A line's own split wins over the shares."""
    from kalle.data.corpus.lists import read_jsonl_corpus

    run_prepare(
        read_jsonl_corpus(source, speaker, language), out, min_seconds, max_seconds, valid_share, test_share, seed, jobs, headers_only
    )


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
    jobs: Jobs = 1,
    headers_only: HeadersOnly = False,
) -> None:
    """An `audio|text` list; audio paths are relative to it."""
    from kalle.data.corpus.lists import read_csv_corpus

    run_prepare(
        read_csv_corpus(source, delimiter, speaker, language),
        out,
        min_seconds,
        max_seconds,
        valid_share,
        test_share,
        seed,
        jobs,
        headers_only,
    )
