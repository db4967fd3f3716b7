"""``kalle prepare``: recordings and texts in, a corpus folder of lhotse cuts and a report out."""

from __future__ import annotations

from collections.abc import Callable
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
    resumable,
    run_prepare,
)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

# The longest prompt of the five languages; more than a user's corpus should hold in one item.
PROMPT_MAX_SECONDS = 120.0
prepare_corpora.register(app)


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
    with resumable(out, "decode") as track:
        packages = find_packages(debs, names) if debs is not None else _fetched(out / "packages", names, find_packages, download_packages)
        build_prompts(packages, language, out, kbps, policy, track)
    run_prepare(read_embedded(out), out, min_seconds, max_seconds)


@app.command()
def embedded(
    out: Out,
    corpus: Annotated[Path | None, typer.Option(help="folder with transcripts.jsonl, if not the checkout's own")] = None,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = PROMPT_MAX_SECONDS,
) -> None:
    """The English prompts inside the repository, with their fixed split."""
    from kalle.data.corpora.folder import embedded_folder, read_embedded

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
    from kalle.data.corpora.folder import read_folder

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
    from kalle.data.corpora.tables import read_jsonl_corpus

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
    from kalle.data.corpora.tables import read_csv_corpus

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


def _fetched(folder: Path, names: list[str], find: Callable[..., list[Path]], download: Callable[..., list[Path]]) -> list[Path]:
    """The packages of an earlier run, else fresh ones."""
    if all(any(folder.glob(f"{name}_*.deb")) for name in names):
        return find(folder, names)
    return download(folder, names)
