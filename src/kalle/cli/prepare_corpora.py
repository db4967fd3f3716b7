"""``kalle prepare CORPUS DIR``: one table of published corpora, each with the layout that is expected on disk."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

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

if TYPE_CHECKING:
    from kalle.data.corpus.items import Source


@dataclass(frozen=True)
class Corpus:
    """A reader by its module in ``kalle.data.corpus`` and its name; ``takes`` are the options it is given besides the folder."""

    module: str
    reader: str
    help: str
    takes: tuple[str, ...] = ()

    def read(self, source: Path, **options: str) -> Source:
        """Imported when it runs: lhotse takes seconds."""
        reader: Callable[..., Source] = getattr(importlib.import_module(f"kalle.data.corpus.{self.module}"), self.reader)
        return reader(source, **{name: options[name] for name in self.takes})


CORPORA = {
    "ljspeech": Corpus("lhotse_readers", "read_ljspeech", "LJSpeech 1.1. Expected: metadata.csv and wavs/."),
    "libritts": Corpus("lhotse_readers", "read_libritts", "LibriTTS and LibriTTS-R. Any of their parts; dev is valid, test is test."),
    "librispeech": Corpus("lhotse_readers", "read_librispeech", "LibriSpeech. Any of its parts; dev is valid, test is test."),
    "aishell3": Corpus("lhotse_readers", "read_aishell3", "AISHELL-3. Expected: spk-info.txt, train/ and test/; test is kept as test."),
    "commonvoice": Corpus("published", "read_common_voice", "Common Voice. Expected: clips/ and train, dev, test.tsv, for each locale."),
    "esd": Corpus("published", "read_esd", "ESD, emotional speech. Expected: 0001/ to 0020/ with their lists; emotions are kept."),
    "emilia": Corpus("published", "read_emilia", "Emilia. Expected: x.json beside x.mp3, in folders or in *.tar; or a tar.", ("language",)),
    "kaldi": Corpus("published", "read_kaldi", "A Kaldi data folder. Expected: wav.scp and text, at least.", ("speaker", "language")),
    "lhotse": Corpus("lhotse_readers", "read_lhotse", "lhotse manifests, as its own recipes write them.", ("speaker", "language")),
}
OPTIONAL = frozenset(("speaker", "language"))
"""Options of those corpora only that may leave these open."""

Folder = Annotated[Path, typer.Argument(metavar="DIR", help="the folder of the corpus, unpacked")]


def register(app: typer.Typer) -> None:
    """Add a command for each corpus of the table, and those of VCTK and Hugging Face, which have options of their own."""
    for name, corpus in CORPORA.items():
        app.command(name, help=corpus.help)(_command(corpus))
    app.command()(vctk)
    app.command()(hf)


def _command(corpus: Corpus) -> Callable[..., None]:
    def command(
        source: Folder,
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
        found = corpus.read(source, speaker=speaker, language=language)
        _run(found, out, min_seconds, max_seconds, valid_share, test_share, seed, jobs, headers_only)

    # Evaluated here: typer takes a signature that it is given as it is.
    parameters = inspect.signature(command, eval_str=True).parameters
    wanted = [value for name, value in parameters.items() if name not in OPTIONAL - set(corpus.takes)]
    command.__signature__ = inspect.Signature(wanted)  # type: ignore[attr-defined]
    return command


def vctk(
    source: Folder,
    out: Out,
    mic: Annotated[str, typer.Option(help="which microphone of release 0.92: mic1 or mic2")] = "mic1",
    valid_share: ValidShare = 0.02,
    test_share: TestShare = 0.02,
    seed: Seed = 0,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = 30.0,
    jobs: Jobs = 1,
    headers_only: HeadersOnly = False,
) -> None:
    """VCTK 0.92 and 0.80. Expected: txt/ and wav48_silence_trimmed/ or wav48/."""
    from kalle.data.corpus.published import read_vctk

    _run(read_vctk(source, mic), out, min_seconds, max_seconds, valid_share, test_share, seed, jobs, headers_only)


def hf(
    source: Annotated[str, typer.Argument(metavar="DATASET", help="a save_to_disk folder, parquet files, or a name on the hub")],
    out: Out,
    config: Annotated[str | None, typer.Option(help="configuration of a dataset on the hub, such as clean")] = None,
    audio_column: Annotated[str | None, typer.Option(help="column of the audio, where it isn't found by its name")] = None,
    text_column: Annotated[str | None, typer.Option(help="column of the texts")] = None,
    speaker_column: Annotated[str | None, typer.Option(help="column of the speakers")] = None,
    language_column: Annotated[str | None, typer.Option(help="column of the languages")] = None,
    speaker: Speaker = "unknown",
    language: Language = "",
    valid_share: ValidShare = 0.02,
    test_share: TestShare = 0.02,
    seed: Seed = 0,
    min_seconds: MinSeconds = 0.3,
    max_seconds: MaxSeconds = 30.0,
    jobs: Jobs = 1,
) -> None:
    """A Hugging Face dataset. Expected: an audio and a text column; its splits are kept."""
    from kalle.data.corpus.hugging_face import read_hugging_face

    asked = {"audio": audio_column, "text": text_column, "speaker": speaker_column, "language": language_column}
    columns = {kind: name for kind, name in asked.items() if name is not None}
    found = read_hugging_face(source, config, columns, speaker, language)
    _run(found, out, min_seconds, max_seconds, valid_share, test_share, seed, jobs)


def _run(
    found: Source,
    out: Path,
    min_seconds: float,
    max_seconds: float,
    valid_share: float,
    test_share: float,
    seed: int,
    jobs: int,
    headers_only: bool = False,
) -> None:
    """A part that the corpus holds out itself is not added to by the shares."""
    own = {item.split for item in found.items}
    valid_share, test_share = (0.0 if "valid" in own else valid_share), (0.0 if "test" in own else test_share)
    run_prepare(found, out, min_seconds, max_seconds, valid_share, test_share, seed, jobs, headers_only)
