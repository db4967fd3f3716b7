"""``kalle data``: look at a prepared corpus, and make better ones of it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.main import interruptible
from kalle.cli.speaking import renamed

if TYPE_CHECKING:
    from kalle.data.corpus.quality import CheckResult
    from kalle.data.corpus.retranscribe import Recogniser

logger = logging.getLogger(__name__)

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, rich_markup_mode=None)

VERDICT_STYLES = {"good": "green", "look": "yellow", "bad": "bold red"}
BAD_CORPUS = 1
"""Exit code for a corpus with a bad verdict."""
_NAMED = {
    "jobs: got": "--jobs: got",
    "text: got": "--text: got",
    "max_error_rate": "--max-wer",
    "set language": "give --language",
    "correct remove": "correct --remove",
}
"""Parameters that the library's messages name, and the flags they have here."""


@app.command()
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

    Exit code 0, or 1 when a check says bad; with --filter the verdict is that on the filtered copy. An interrupted run continues.
    """
    from kalle.data.corpus.cuts import check_target
    from kalle.data.corpus.diagnosis import FILTERED_BY, diagnose, write_filtered
    from kalle.data.corpus.quality import REMOVED_BY_DEFAULT, limits_from, removal_list

    with renamed(_NAMED):
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
    """Yields what puts a progress bar around an iterable of known length; Ctrl-C is one line that says how to continue."""
    from kalle.progress import progress_bar

    again = f"interrupted: '{out}' is not finished yet; run the same command again to continue where it stopped"
    with interruptible(again), renamed(_NAMED), progress_bar() as bar:
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


@app.command()
def retranscribe(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="folder that `kalle prepare` wrote")],
    out: Annotated[Path, typer.Option(help="the corpus folder to write")],
    max_wer: Annotated[float, typer.Option(help="most errors per word (per character in Chinese, Japanese, Thai …)")] = 0.1,
    text: Annotated[str, typer.Option(help="text of the kept items: keep (their own), asr, or fill (asr where there is none)")] = "keep",
    language: Annotated[str, typer.Option(help="of items that name none, such as en")] = "",
    asr: Annotated[str, typer.Option(help="folder of a CTranslate2 Whisper, a packaged model's name, or auto")] = "auto",
    decoding: Annotated[str, typer.Option(help="protocol (greedy) or beam5")] = "beam5",
    normaliser: Annotated[
        str, typer.Option(help="what is compared: whisper (numbers, contractions unified), seed_tts, kalle_authors")
    ] = "whisper",
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    compute_type: Annotated[str, typer.Option(help="CTranslate2's, such as int8, float16, float32")] = "int8",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 for all")] = 0,
) -> None:
    """Transcribe every item with a speech recogniser and write a corpus of the items whose text agrees with the transcript.

    An interrupted run continues, and another --max-wer or --text uses the transcripts that are there.
    """
    from kalle.data.corpus.retranscribe import RetranscribeOptions, retranscribe_corpus

    with measuring(out, "transcribe") as progress:
        options = RetranscribeOptions(max_error_rate=max_wer, text=text, language=language)
        languages = _languages(corpus, language)
        settings = {"model": asr, "decoding": decoding, "device": device, "compute_type": compute_type, "threads": threads}
        report = retranscribe_corpus(corpus, out, recogniser(normaliser, languages, **settings), options, progress)
    reasons = ", ".join(f"{count} {reason}" for reason, count in report["left_out_by_reason"].items()) or "none"
    typer.echo(f"{report['kept']} of {report['items']} items, {report['hours'] * 60:.1f} minutes, in {out}; left out: {reasons}")


def recogniser(normaliser: str, languages: list[str], **asr: Any) -> Recogniser:
    """faster-whisper and a named normaliser as the layer of the data wants them; ``asr`` goes to `FasterWhisper`."""
    from kalle.audio import Audio, resample
    from kalle.data.corpus.retranscribe import Recogniser
    from kalle.evaluation.asr import WINDOW_SAMPLES, FasterWhisper, keep_freed_memory
    from kalle.evaluation.metrics import RATE_HZ
    from kalle.evaluation.word_errors import normaliser as named
    from kalle.evaluation.word_errors import one_script, word_errors

    tokens = named(normaliser)
    whisper = FasterWhisper(languages=languages, **asr)
    keep_freed_memory()

    def transcribe(audio: Audio, rate_hz: int, language: str) -> str:
        return one_script(whisper(resample(audio, rate_hz, RATE_HZ), language), language)

    return Recogniser(
        transcribe=transcribe,
        tokens=tokens,
        errors=lambda reference, hypothesis: word_errors(reference, hypothesis).errors,
        one_script=one_script,
        description={**whisper.describe(), "normaliser": normaliser},
        max_seconds=WINDOW_SAMPLES / RATE_HZ,
    )


def _languages(corpus: Path, default: str) -> list[str]:
    """The languages that the items name, for the choice of a model."""
    from kalle.data.corpus.cuts import corpus_cuts
    from kalle.text.languages import language_of_name

    named = {(cut.supervisions[0].language if cut.supervisions else None) or default for cut in corpus_cuts(corpus).values()}
    return sorted({language_of_name(language) for language in named if language}) or ["en"]


@app.command()
def shard(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="folder that `kalle prepare` wrote")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder for the shards; an interrupted run continues in it")],
    split: Annotated[list[str] | None, typer.Option(help="split to write, once for each; all by default")] = None,
    items: Annotated[int, typer.Option(help="cuts in a shard at most")] = 1000,
    megabytes: Annotated[float, typer.Option(help="size of a shard at most, counted as 16-bit samples; FLAC takes about half")] = 250.0,
    rate: Annotated[int, typer.Option(help="sample rate of the shards in Hz; other cuts are resampled")] = 16000,
) -> None:
    """Write the waveforms of a corpus as lhotse Shar shards, for fast, nearly sequential reading from disks and object stores."""
    from kalle.data.corpus.cuts import load_cuts, splits_of
    from kalle.data.latents.waves import WaveShardConfig, write_wave_shards
    from kalle.progress import progress_bar

    config = WaveShardConfig(items, megabytes, rate)
    splits = {name: load_cuts(corpus, name) for name in split or splits_of(corpus) or ["train"]}
    with progress_bar() as bar:
        task = bar.add_task("shard", total=None)
        info = write_wave_shards(splits, out, config, lambda done, total: bar.update(task, completed=done, total=total))
    for name, facts in info["splits"].items():
        logger.info(
            "%s: %d cuts, %.1f minutes in %d shards, %.1f MB", name, facts["utterances"], facts["seconds"] / 60, facts["shards"],
            facts["bytes"] / 1e6,
        )  # fmt: skip
