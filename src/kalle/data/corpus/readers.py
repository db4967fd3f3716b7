"""The corpora that ``kalle prepare`` reads, as one table: the reader, what is expected on disk, and the reader's options."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kalle.data.corpus.items import UNKNOWN_SPEAKER, Source


@dataclass(frozen=True)
class Option:
    """An option of a reader: its parameter, the command's flag."""

    name: str
    help: str
    default: str | None = ""


@dataclass(frozen=True)
class Reader:
    """A reader by its module in ``kalle.data.corpus`` and its name."""

    module: str
    function: str
    help: str
    options: tuple[Option, ...] = ()
    source: str = "DIR"
    source_help: str = "the folder of the corpus, unpacked"
    headers: bool = True
    """Whether some of its recordings can be checked by their headers alone."""

    def read(self, source: Any, **options: Any) -> Source:
        """The items that the reader finds in ``source``. Imported when it runs, because lhotse takes seconds."""
        reader: Callable[..., Source] = getattr(importlib.import_module(f"kalle.data.corpus.{self.module}"), self.function)
        return reader(source, **options)


SPEAKER = Option("speaker", "speaker of items that name none", UNKNOWN_SPEAKER)
LANGUAGE = Option("language", "language of items that name none, such as en")
FOLDER_SPEAKER = Option("speaker", "speaker of every item; `folders` takes the name of its folder", UNKNOWN_SPEAKER)
READERS: Mapping[str, Reader] = {
    "folder": Reader(
        *("lists", "read_folder", "A folder of audio files, each with a text file beside it.", (FOLDER_SPEAKER, LANGUAGE)),
        source_help="x.wav (or flac, mp3, opus, m4a …) beside x.txt or x.lab, at any depth",
    ),
    "jsonl": Reader(
        *("lists", "read_jsonl_corpus", "A JSONL list; audio paths are relative to it. A line's own split wins over the shares."),
        (SPEAKER, LANGUAGE),
        source="FILE",
        source_help='{"audio", "text", "id"?, "speaker"?, "language"?, "split"?} a line, or the usual other names',
    ),
    "csv": Reader(
        *("lists", "read_csv_corpus", "A table with a header line, or `audio|text` rows; audio paths are relative to it."),
        (
            Option("delimiter", "what separates the columns, such as , or tab; found by itself"),
            Option("columns", "the columns of a table without a header, such as audio,speaker,text; - for one that is not used"),
            SPEAKER,
            LANGUAGE,
        ),
        source="FILE",
        source_help="a CSV or TSV file",
    ),
    "ljspeech": Reader("lhotse_readers", "read_ljspeech", "LJSpeech 1.1. Expected: metadata.csv and wavs/."),
    "libritts": Reader("lhotse_readers", "read_libritts", "LibriTTS and LibriTTS-R. Any of their parts; dev is valid, test is test."),
    "librispeech": Reader("lhotse_readers", "read_librispeech", "LibriSpeech. Any of its parts; dev is valid, test is test."),
    "aishell3": Reader("lhotse_readers", "read_aishell3", "AISHELL-3. Expected: spk-info.txt, train/ and test/; test is kept as test."),
    "commonvoice": Reader("published", "read_common_voice", "Common Voice. Expected: clips/ and train, dev, test.tsv, for each locale."),
    "esd": Reader("published", "read_esd", "ESD, emotional speech. Expected: 0001/ to 0020/ with their lists; emotions are kept."),
    "emilia": Reader("published", "read_emilia", "Emilia. Expected: x.json beside x.mp3, in folders or in *.tar; or a tar.", (LANGUAGE,)),
    "kaldi": Reader("published", "read_kaldi", "A Kaldi data folder. Expected: wav.scp and text, at least.", (SPEAKER, LANGUAGE)),
    "lhotse": Reader("lhotse_readers", "read_lhotse", "lhotse manifests, as its own recipes write them.", (SPEAKER, LANGUAGE)),
    "vctk": Reader(
        *("published", "read_vctk", "VCTK 0.92 and 0.80. Expected: txt/ and wav48_silence_trimmed/ or wav48/."),
        (Option("mic", "which microphone of release 0.92: mic1 or mic2", "mic1"),),
    ),
    "hf": Reader(
        *("hugging_face", "read_hugging_face", "A Hugging Face dataset. Expected: an audio and a text column; its splits are kept."),
        (
            Option("config", "configuration of a dataset on the hub, such as clean", None),
            Option("audio_column", "column of the audio, where it isn't found by its name", None),
            Option("text_column", "column of the texts", None),
            Option("speaker_column", "column of the speakers", None),
            Option("language_column", "column of the languages", None),
            SPEAKER,
            LANGUAGE,
        ),
        source="DATASET",
        source_help="a save_to_disk folder, parquet files, or a name on the hub",
        headers=False,
    ),
}
