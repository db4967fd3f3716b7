"""Several processes, and headers instead of decoding."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from pathlib import Path

import corpus_layouts as layouts
import numpy as np
import pytest
import soundfile

from kalle.data.corpus.check import Kept, check_item
from kalle.data.corpus.cuts import load_cuts
from kalle.data.corpus.items import PrepareOptions, Source, SourceItem, SplitPolicy
from kalle.data.corpus.prepare import CHUNK_ITEMS, NAMES_SHOWN, WorkerLost, check_parallel, prepare_corpus, tables
from kalle.data.corpus.published import read_emilia

SPLIT = SplitPolicy(0.0, 0.0)


def mixed(folder: Path, count: int = 30) -> Source:
    """Mono, stereo and broken files in turn."""
    items = []
    for i in range(count):
        path = layouts.record(folder / f"{i}.wav", seconds=0.4 + 0.01 * i)
        if i % 3 == 1:
            soundfile.write(path, np.stack([layouts.noise(i), layouts.noise(i + 1)], 1), 16000)
        if i % 10 == 2:
            path.write_bytes(b"broken")
        items.append(SourceItem(f"item{i}", path, f"text {i}", f"speaker {i}"))
    return Source("mixed", items)


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


@pytest.mark.slow
def test_processes_change_nothing_and_an_interrupt_resumes(tmp_path: Path) -> None:
    source, options = mixed(tmp_path / "in"), PrepareOptions(split=SPLIT)
    asked = []

    def interrupted(items: list[SourceItem]) -> Iterable[SourceItem]:
        for item in items:
            if len(asked) == 11:
                raise KeyboardInterrupt
            asked.append(item.id)
            yield item

    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(source, tmp_path / "two", options, interrupted, jobs=2)
    assert asked == [f"item{i}" for i in range(11)]
    prepared = prepare_corpus(source, tmp_path / "two", options, jobs=2)
    assert (prepared.resumed_items, prepared.report["rejected_by_reason"]) == (11, {"unreadable": 3})
    prepare_corpus(source, tmp_path / "one", options)
    assert content(tmp_path / "two") == content(tmp_path / "one")


@pytest.mark.slow
def test_members_of_a_tar_are_read_in_other_processes(tmp_path: Path) -> None:
    source = read_emilia(layouts.emilia_tar(tmp_path / "in"))
    assert prepare_corpus(source, tmp_path / "out", PrepareOptions(split=SPLIT), jobs=2).report["kept"] == 3


@pytest.mark.slow
def test_a_killed_worker_loses_nothing(tmp_path: Path) -> None:
    source, options = mixed(tmp_path / "in", 90), PrepareOptions(split=SPLIT)

    def killing(items: list[SourceItem]) -> Iterable[SourceItem]:
        import multiprocessing

        for number, item in enumerate(items):
            if number == CHUNK_ITEMS:
                for child in multiprocessing.active_children():
                    os.kill(child.pid or 0, signal.SIGKILL)
            yield item

    with pytest.raises(WorkerLost, match="fewer jobs"):
        prepare_corpus(source, tmp_path / "out", options, killing, jobs=2)
    assert not (tmp_path / "out" / ".completed").exists()
    prepared = prepare_corpus(source, tmp_path / "out", options)
    assert prepared.resumed_items >= CHUNK_ITEMS
    assert prepared.report["items"] == 90


@pytest.mark.slow
def test_closing_early_ends_the_processes(tmp_path: Path) -> None:
    results = check_parallel(mixed(tmp_path).items, PrepareOptions(split=SPLIT), tmp_path / "out", 2)
    first = next(results)
    assert isinstance(first, Kept)
    assert first.id == "item0"
    results.close()


def test_headers_only_believes_the_header_and_decodes_what_it_converts(tmp_path: Path) -> None:
    source = mixed(tmp_path / "in", 12)
    silent = tmp_path / "in" / "silent.wav"
    soundfile.write(silent, np.zeros(8000, np.float32), 16000)
    items = [*source.items, SourceItem("silent", silent, "words"), SourceItem("part", source.items[0].audio, "words", start_s=0.1)]
    prepared = prepare_corpus(Source("mixed", items), tmp_path / "quick", PrepareOptions(headers_only=True, split=SPLIT))
    full = prepare_corpus(Source("mixed", items), tmp_path / "full", PrepareOptions(split=SPLIT))
    assert full.report["rejected_by_reason"] == {"unreadable": 1, "silent": 1}
    assert prepared.report["rejected_by_reason"] == {"unreadable": 1}
    assert (prepared.report["checked_by_header_only"], full.report["checked_by_header_only"]) == (9, 0)
    assert (prepared.report["converted_to_flac"], full.report["converted_to_flac"]) == (4, 4)
    quick = {cut.id: cut for cut in load_cuts(tmp_path / "quick", "train")}
    for cut in load_cuts(tmp_path / "full", "train"):
        np.testing.assert_array_equal(cut.load_audio(), quick[cut.id].load_audio())
    assert ["checked", "by header only", "9"] in next(rows for title, _, rows in tables(prepared.report) if title == "Audio")


def test_headers_tell_what_is_too_short_and_what_lies_outside(tmp_path: Path) -> None:
    path = layouts.record(tmp_path / "a.wav", seconds=0.5)
    options = PrepareOptions(headers_only=True, split=SPLIT)
    for start, duration, reason in ((0.4, None, "too short"), (0.3, 0.5, "outside the recording"), (0.7, None, "outside the recording")):
        result = check_item(SourceItem("a", path, "words", start_s=start, duration_s=duration), options, tmp_path)
        assert getattr(result, "reason", "kept") == reason


def test_a_segment_of_what_cannot_be_entered_becomes_flac(tmp_path: Path) -> None:
    path = layouts.record(tmp_path / "a.mp3", 16000, 2.0)
    item = SourceItem("a", path, "words", start_s=0.5, duration_s=0.75)
    for headers_only in (True, False):
        kept = check_item(item, PrepareOptions(headers_only=headers_only, split=SPLIT), tmp_path / "out")
        assert isinstance(kept, Kept)
        assert (kept.audio, kept.stored_samples, kept.start_samples, kept.seconds) == ("audio/a.flac", 12000, 0, 0.75)


def test_many_speakers_are_summed_up_in_the_tables(tmp_path: Path) -> None:
    report = prepare_corpus(mixed(tmp_path / "in", 30), tmp_path / "out", PrepareOptions(split=SPLIT)).report
    rows = [row for row in next(rows for title, _, rows in tables(report) if title.startswith("Speakers")) if row[0] == "speakers"]
    assert len(report["speakers"]) == 27
    assert len(rows) == NAMES_SHOWN + 1
    assert rows[-1][1] == "(7 others)"
    assert sum(int(row[2]) for row in rows) == 27
