"""Only \\n and \\r\\n end a line of a list: other line breaks stand inside of a text, and are read as a space."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import corpus_layouts
import pytest

from kalle.data.corpus.check import Kept, check_item
from kalle.data.corpus.items import PrepareOptions, Source
from kalle.data.corpus.library_readers import read_librispeech, read_libritts
from kalle.data.corpus.lists import read_csv_corpus, read_folder, read_jsonl_corpus
from kalle.data.corpus.published import read_common_voice, read_emilia, read_esd, read_kaldi, read_ljspeech, read_vctk
from kalle.files import lines_of

BREAKS = "\x0b\x0c\r\x1c\x1d\x1e\x1f\x85\u2028\u2029"
FIRST, SECOND = "one{0}two three", "four{0}five"
Layout = Callable[[Path, str, str], Source]


def jsonl(root: Path, first: str, second: str) -> Source:
    for name in "ab":
        corpus_layouts.record(root / f"{name}.wav")
    rows = [json.dumps({"audio": f"{name}.wav", "text": "TEXT"}).replace("TEXT", text) for name, text in (("a", first), ("b", second))]
    return read_jsonl_corpus(corpus_layouts.write(root / "list.jsonl", "\r\n".join(rows) + "\r\n"))


def table(root: Path, first: str, second: str) -> Source:
    for name in "ab":
        corpus_layouts.record(root / f"{name}.wav")
    return read_csv_corpus(corpus_layouts.write(root / "list.csv", f"audio|text\r\na.wav|{first}\r\nb.wav|{second}\r\n"))


def folder(root: Path, first: str, second: str) -> Source:
    for name, text in (("a", first), ("b", second)):
        corpus_layouts.record(root / f"{name}.wav")
        corpus_layouts.write(root / f"{name}.txt", text)
    return read_folder(root)


def ljspeech(root: Path, first: str, second: str) -> Source:
    for name in "ab":
        corpus_layouts.record(root / "wavs" / f"{name}.wav")
    corpus_layouts.write(root / "metadata.csv", f"a|{first}|{first}\nb|{second}\n")
    return read_ljspeech(root)


def kaldi(root: Path, first: str, second: str) -> Source:
    for name in "ab":
        corpus_layouts.record(root / f"{name}.wav")
    corpus_layouts.write(root / "wav.scp", "a a.wav\nb b.wav\n")
    corpus_layouts.write(root / "text", f"a {first}\nb {second}\n")
    return read_kaldi(root)


def common_voice(root: Path, first: str, second: str) -> Source:
    for name in "ab":
        corpus_layouts.record(root / "en" / "clips" / f"{name}.wav")
    rows = f"client_id\tpath\tsentence\nx\ta.wav\t{first}\nx\tb.wav\t{second}\n"
    corpus_layouts.write(root / "en" / "train.tsv", rows)
    return read_common_voice(root)


def esd(root: Path, first: str, second: str) -> Source:
    for name in "ab":
        corpus_layouts.record(root / "0001" / "Happy" / f"{name}.wav")
    corpus_layouts.write(root / "0001" / "0001.txt", f"a\t{first}\tHappy\nb\t{second}\tHappy\n")
    return read_esd(root)


def vctk(root: Path, first: str, second: str) -> Source:
    for name, text in (("p1_001", first), ("p1_002", second)):
        corpus_layouts.record(root / "wav48" / "p1" / f"{name}.wav")
        corpus_layouts.write(root / "txt" / "p1" / f"{name}.txt", text)
    return read_vctk(root)


def emilia(root: Path, first: str, second: str) -> Source:
    for name, text in (("a", first), ("b", second)):
        corpus_layouts.record(root / f"{name}.wav")
        corpus_layouts.write(root / f"{name}.json", '{"language": "en", "text": "TEXT"}'.replace("TEXT", text))
    return read_emilia(root)


def librispeech(root: Path, first: str, second: str) -> Source:
    chapter = root / "dev-clean" / "84" / "1"
    for name in ("84-1-0000", "84-1-0001"):
        corpus_layouts.record(chapter / f"{name}.flac")
    corpus_layouts.write(chapter / "84-1.trans.txt", f"84-1-0000 {first}\n84-1-0001 {second}\n")
    return read_librispeech(root)


def libritts(root: Path, first: str, second: str) -> Source:
    for name, text in (("84_1_000000_000000", first), ("84_1_000000_000001", second)):
        corpus_layouts.record(root / "dev-clean" / "84" / "1" / f"{name}.wav")
        corpus_layouts.write(root / "dev-clean" / "84" / "1" / f"{name}.normalized.txt", text)
    return read_libritts(root)


LAYOUTS = [jsonl, table, folder, ljspeech, kaldi, common_voice, esd, vctk, emilia, librispeech, libritts]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_line_break_inside_a_text_costs_no_item(tmp_path: Path, layout: Layout) -> None:
    # lhotse's recipe takes \r for a line's end, and says that the next line is none.
    for number, character in enumerate(BREAKS.replace("\r", "") if layout is librispeech else BREAKS):
        source = layout(tmp_path / str(number), FIRST.format(character), SECOND.format(character))
        assert not source.rejected, repr(character)
        found = [check_item(item, PrepareOptions(), tmp_path) for item in source.items]
        texts = sorted(item.text for item in found if isinstance(item, Kept))
        assert texts == ["four five", "one two three"], repr(character)


def test_a_carriage_return_ends_lines_where_nothing_else_does() -> None:
    assert lines_of("a\rb\r") == ["a", "b", ""]
    assert lines_of("a\rb\n\r\nc\x85d\r") == ["a b", "", "c\x85d "]
    assert lines_of("") == [""]
