from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kalle.data import shared_work
from kalle.data.corpus import prepare
from kalle.data.corpus.cuts import load_cuts
from kalle.data.corpus.items import REASONS, PrepareOptions, Rejection, Source, SourceItem, SplitPolicy
from kalle.data.corpus.lists import read_csv_corpus, read_folder, read_jsonl_corpus
from kalle.data.corpus.prepare import Prepared, prepare_corpus
from kalle.errors import UserError

OPTIONS = PrepareOptions(min_seconds=0.3, max_seconds=2.0)


def speech(seconds: float = 1.0, rate_hz: int = 16000, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(round(seconds * rate_hz))).clip(-0.9, 0.9).astype(np.float32)


def corpus(folder: Path, count: int = 4) -> Source:
    folder.mkdir(parents=True, exist_ok=True)
    items = []
    for i in range(count):
        soundfile.write(folder / f"{i}.wav", speech(0.5 + 0.1 * i, seed=i), 16000)
        split = ("train", "train", "valid", "test")[i % 4]
        items.append(SourceItem(f"item{i}", folder / f"{i}.wav", f"text  number {i}", "ann" if i % 2 else "bob", "en", split))
    return Source("toy", items)


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def forbidden(items: list[SourceItem]) -> Iterable[SourceItem]:
    assert not items, f"{len(items)} items were checked again"
    return items


def test_cuts_carry_text_speaker_language_and_exact_audio(tmp_path: Path) -> None:
    prepared = prepare_corpus(corpus(tmp_path / "in"), tmp_path / "out", OPTIONS)
    cuts = {cut.id: cut for split in ("train", "valid", "test") for cut in load_cuts(tmp_path / "out", split)}
    assert sorted(cuts) == ["item0", "item1", "item2", "item3"]
    assert [cut.id for cut in load_cuts(tmp_path / "out", "valid")] == ["item2"]
    cut = cuts["item1"]
    [supervision] = cut.supervisions
    assert (supervision.text, supervision.speaker, supervision.language) == ("text number 1", "ann", "en")
    expected, _ = soundfile.read(tmp_path / "in" / "1.wav", dtype="float32")
    np.testing.assert_array_equal(cut.load_audio()[0], expected)
    assert prepared.report["kept"] == prepared.report["items"] == 4
    assert prepared.report["splits"]["train"] == {"items": 2, "minutes": 0.018, "speakers": 2, "words": 6, "items_of_four_words": 0}
    assert prepared.report["speakers"]["bob"]["items"] == 2
    assert sum(prepared.report["duration_histogram"].values()) == 4
    assert prepared.report["duration_histogram"]["0.5-1 s"] == 4


@pytest.mark.parametrize("rate_hz", [8000, 22050, 24000, 44100, 48000])
def test_other_rates_are_resampled_with_the_promised_number_of_samples(tmp_path: Path, rate_hz: int) -> None:
    audio = speech(0.777, rate_hz)
    soundfile.write(tmp_path / "a.wav", audio, rate_hz)
    prepared = prepare_corpus(Source("rates", [SourceItem("a", tmp_path / "a.wav", "text", split="train")]), tmp_path / "out", OPTIONS)
    [cut] = load_cuts(tmp_path / "out", "train")
    assert cut.sampling_rate == 16000
    assert cut.load_audio().shape == (1, cut.num_samples)
    assert cut.num_samples == pytest.approx(0.777 * 16000, abs=1)
    assert prepared.report["resampled"] == 1
    assert prepared.report["sample_rates_hz"] == {str(rate_hz): 1}


def test_stereo_is_converted_to_mono_flac_and_survives_a_move(tmp_path: Path) -> None:
    left, right = speech(seed=1), speech(seed=2)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16000, subtype="FLOAT")
    prepared = prepare_corpus(Source("stereo", [SourceItem("a", tmp_path / "a.wav", "text", split="train")]), tmp_path / "out", OPTIONS)
    assert prepared.report["channels"] == {"2": 1}
    assert prepared.report["converted_to_flac"] == 1
    (tmp_path / "out").rename(tmp_path / "moved")
    [cut] = load_cuts(tmp_path / "moved", "train")
    np.testing.assert_allclose(cut.load_audio()[0], (left + right) / 2, atol=2 / 32768)
    assert cut.custom["source"] == str(tmp_path / "a.wav")


def bad_items(folder: Path) -> dict[str, SourceItem]:
    """One item for every reason that listening can find, by reason."""
    folder.mkdir()
    good = speech(0.5)
    clipped = good.copy()
    clipped[1000:1100] = 1.0
    stereo_clipped = np.stack([clipped, np.zeros_like(clipped)], 1)
    write: dict[str, Callable[[Path], object]] = {
        "missing": lambda path: None,
        "unreadable": lambda path: path.write_bytes(b"RIFF but no more"),
        "empty": lambda path: path.write_bytes(b""),
        "not finite": lambda path: soundfile.write(path, np.where(np.arange(8000) == 5, np.nan, good), 16000, subtype="FLOAT"),
        "too short": lambda path: soundfile.write(path, good[:4000], 16000),
        "too long": lambda path: soundfile.write(path, speech(2.1), 16000),
        "clipped": lambda path: soundfile.write(path, clipped, 16000),
        "silent": lambda path: soundfile.write(path, 1e-4 * good, 16000, subtype="FLOAT"),
        "no text": lambda path: soundfile.write(path, good, 16000),
        "not speech": lambda path: soundfile.write(path, good, 16000),
    }
    texts = {"no text": " ... ", "not speech": "[sound of monkeys]"}
    items = {}
    for reason, make in write.items():
        path = folder / f"{reason.replace(' ', '-')}.wav"
        make(path)
        items[reason] = SourceItem(reason.replace(" ", "-"), path, texts.get(reason, "words"), split="train")
    soundfile.write(folder / "stereo-clipped.wav", stereo_clipped, 16000)
    soundfile.write(folder / "outside.wav", good, 16000)
    items["outside the recording"] = SourceItem("outside", folder / "outside.wav", "words", split="train", start_s=0.2, duration_s=0.5)
    items["clipped "] = SourceItem("stereo-clipped", folder / "stereo-clipped.wav", "words", split="train")
    return items


def test_every_reason_is_found_counted_and_listed(tmp_path: Path) -> None:
    source = corpus(tmp_path / "good")
    bad = bad_items(tmp_path / "bad")
    told = [Rejection("twice", "x.wav", "duplicate id", "of another")]
    prepared = prepare_corpus(Source("mixed", [*bad.values(), *source.items], told), tmp_path / "out", OPTIONS)
    found = {row["id"]: row["reason"] for row in prepared.report["rejected_items"]}
    assert found == {item.id: reason.strip() for reason, item in bad.items()} | {"twice": "duplicate id"}
    assert set(prepared.report["rejected_by_reason"]) == set(REASONS) - {"bad entry"}
    assert prepared.report["items"] == prepared.report["kept"] + prepared.report["rejected"] == len(bad) + 4 + 1
    assert sum(prepared.report["rejected_by_reason"].values()) == prepared.report["rejected"]
    assert sum(row["items"] for row in prepared.report["splits"].values()) == prepared.report["kept"] == 4
    text = (tmp_path / "out" / "report.md").read_text()
    assert all(f"| {identity} | {reason} |" in text for identity, reason in found.items())
    assert json.loads((tmp_path / "out" / "report.json").read_text())["rejected_items"] == prepared.report["rejected_items"]


def test_nothing_fit_is_an_error_that_says_why(tmp_path: Path) -> None:
    bad = list(bad_items(tmp_path / "bad").values())
    with pytest.raises(UserError, match=r"nothing to train on.*2 clipped") as caught:
        prepare_corpus(Source("bad", bad), tmp_path / "out", OPTIONS)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / ".completed").exists()
    assert len(json.loads((tmp_path / "out" / "report.json").read_text())["rejected_items"]) == len(bad)


def test_second_run_does_nothing(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    first = prepare_corpus(source, tmp_path / "out", OPTIONS)
    before = content(tmp_path / "out")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    second = prepare_corpus(source, tmp_path / "out", OPTIONS, forbidden)
    assert (first.unchanged, second.unchanged) == (False, True)
    assert second.report == first.report
    assert content(tmp_path / "out") == before
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == stamps
    assert not [name for name in before if "partial" in name or "journal" in name]


def change_options(source: Source, folder: Path) -> tuple[Source, PrepareOptions]:
    return source, PrepareOptions(min_seconds=0.55, max_seconds=2.0)


def change_text(source: Source, folder: Path) -> tuple[Source, PrepareOptions]:
    first = source.items[0]
    return Source(source.name, [SourceItem(first.id, first.audio, "new text", "bob", "en", "train"), *source.items[1:]]), OPTIONS


def change_audio(source: Source, folder: Path) -> tuple[Source, PrepareOptions]:
    soundfile.write(source.items[0].audio, speech(1.25), 16000)
    return source, OPTIONS


def lose_output(source: Source, folder: Path) -> tuple[Source, PrepareOptions]:
    (folder / "cuts_valid.jsonl.gz").unlink()
    return source, OPTIONS


@pytest.mark.parametrize("change", [change_options, change_text, change_audio, lose_output])
def test_any_change_rebuilds_to_what_a_fresh_run_gives(tmp_path: Path, change) -> None:
    source = corpus(tmp_path / "in")
    prepare_corpus(source, tmp_path / "out", OPTIONS)
    changed, options = change(source, tmp_path / "out")
    assert not prepare_corpus(changed, tmp_path / "out", options).unchanged
    prepare_corpus(changed, tmp_path / "fresh", options)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_lost_converted_audio_is_made_again(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([speech(), speech()], 1), 16000)
    source = Source("stereo", [SourceItem("a", tmp_path / "a.wav", "text", split="train")])
    prepare_corpus(source, tmp_path / "out", OPTIONS)
    (tmp_path / "out" / "audio" / "a.flac").unlink()
    assert not prepare_corpus(source, tmp_path / "out", OPTIONS).unchanged
    assert load_cuts(tmp_path / "out", "train")[0].load_audio().shape == (1, 16000)


class Interrupt:
    """Stops a run after some items, as Ctrl-C would, and counts what is asked for."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.asked = 0

    def __call__(self, items: list[SourceItem]) -> Iterable[SourceItem]:
        for item in items:
            if self.asked == self.after:
                raise KeyboardInterrupt
            self.asked += 1
            yield item


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupted_run_goes_on_where_it_stopped(tmp_path: Path, torn: bool) -> None:
    source = corpus(tmp_path / "in", 8)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(source, tmp_path / "out", OPTIONS, Interrupt(5))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["journal.jsonl"]
    with pytest.raises(UserError):
        load_cuts(tmp_path / "out", "train")
    if torn:
        journal = tmp_path / "out" / "journal.jsonl"
        journal.write_bytes(journal.read_bytes()[:-9])
    counter = Interrupt(100)
    prepared = prepare_corpus(source, tmp_path / "out", OPTIONS, counter)
    assert (prepared.resumed_items, counter.asked) == ((4, 4) if torn else (5, 3))
    prepare_corpus(source, tmp_path / "fresh", OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def test_a_journal_of_other_options_is_not_used(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in", 8)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(source, tmp_path / "out", OPTIONS, Interrupt(5))
    assert prepare_corpus(source, tmp_path / "out", PrepareOptions(min_seconds=0.55, max_seconds=2.0)).resumed_items == 0


def test_an_interrupted_rebuild_does_not_pass_for_the_finished_old_one(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in")
    prepare_corpus(source, tmp_path / "out", OPTIONS)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(source, tmp_path / "out", PrepareOptions(min_seconds=0.55, max_seconds=2.0), Interrupt(1))
    with pytest.raises(UserError):
        load_cuts(tmp_path / "out", "train")


def test_line_separators_inside_a_text_do_not_tear_the_journal(tmp_path: Path) -> None:
    first = shared_work.ResumeJournal(tmp_path / "journal.jsonl", "same")
    first.add({"id": "a", "text": "one\u2028two\u0085three"})
    first.add({"id": "b"})
    first.close()
    second = shared_work.ResumeJournal(tmp_path / "journal.jsonl", "same")
    second.close()
    assert [entry["id"] for entry in second.entries] == ["a", "b"]


@pytest.mark.parametrize("stage", ["cuts_valid.jsonl.gz", "report.json", ".completed"])
def test_interrupt_while_writing_leaves_no_half_file_and_no_marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    source = corpus(tmp_path / "in")
    real = os.replace

    def replace(old: Path, new: Path) -> None:
        if Path(new).name == stage:
            raise KeyboardInterrupt
        real(old, new)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(source, tmp_path / "out", OPTIONS)
    monkeypatch.undo()
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert not (tmp_path / "out" / stage).exists()
    assert not (tmp_path / "out" / ".completed").exists()
    resumed: Prepared = prepare_corpus(source, tmp_path / "out", OPTIONS, forbidden)
    assert (resumed.unchanged, resumed.resumed_items) == (False, 4)
    prepare_corpus(source, tmp_path / "fresh", OPTIONS)
    assert content(tmp_path / "out") == content(tmp_path / "fresh")


def full_disk(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def no_room_for_converted_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(soundfile, "write", full_disk)


def no_room_for_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    real = prepare.write_atomic
    monkeypatch.setattr(prepare, "write_atomic", lambda path, text: full_disk() if path.suffix == ".md" else real(path, text))


def no_room_for_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gzip.GzipFile, "write", full_disk)


def no_room_for_the_journal(monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: shared_work.ResumeJournal, entry: object) -> None:
        self._file = FullFile()
        full_disk()

    monkeypatch.setattr(shared_work.ResumeJournal, "add", add)


class FullFile:
    """Fails on closing too, as a buffered file on a full disk does."""

    close = full_disk


@pytest.mark.parametrize("fault", [no_room_for_converted_audio, no_room_for_the_report, no_room_for_cuts, no_room_for_the_journal])
def test_full_disk_is_one_line_and_leaves_no_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault) -> None:
    soundfile.write(tmp_path / "a.wav", np.stack([speech(), speech()], 1), 16000)
    source = Source("stereo", [SourceItem("a", tmp_path / "a.wav", "text", split="train")])
    fault(monkeypatch)
    with pytest.raises(UserError, match=r"No space left on device.*make room on the disk") as caught:
        prepare_corpus(source, tmp_path / "out", OPTIONS)
    monkeypatch.undo()
    assert "\n" not in str(caught.value)
    names = {path.name for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert not {name for name in names if name.endswith(".partial")} | (names & {".completed", "journal.jsonl"})
    assert not prepare_corpus(source, tmp_path / "out", OPTIONS).unchanged
    assert len(load_cuts(tmp_path / "out", "train")) == 1


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write .*out.*choose another path"):
        prepare_corpus(corpus(tmp_path / "in"), tmp_path / "out", OPTIONS)
    assert (tmp_path / "out").read_text() == "mine"


def stereo(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.stack([speech()] * 2, 1), 16000)
    return path


@pytest.mark.parametrize("link", [None, "a.flac", "other.flac"])
def test_a_recording_is_never_replaced_by_its_conversion(tmp_path: Path, link: str | None) -> None:
    place = stereo(tmp_path / "in" / "audio" / "a.flac")
    if link is not None:
        (tmp_path / link).symlink_to(place)
        place = tmp_path / link
    before = content(tmp_path / "in")
    with pytest.raises(UserError, match=r"would replace its source.*choose another"):
        prepare_corpus(Source("toy", [SourceItem("a", place, "a text")]), tmp_path / "in", OPTIONS)
    assert content(tmp_path / "in") == before
    prepare_corpus(Source("toy", [SourceItem("b", place, "a text")]), tmp_path / "in", OPTIONS)
    assert before.items() < content(tmp_path / "in").items()


@pytest.mark.parametrize("prepared_before", [False, True])
def test_a_recording_is_never_replaced_by_another_ones_conversion(tmp_path: Path, prepared_before: bool) -> None:
    if prepared_before:
        prepare_corpus(Source("toy", [SourceItem("c", stereo(tmp_path / "c.wav"), "a text")]), tmp_path / "in", OPTIONS)
    taken, other, circle = stereo(tmp_path / "in" / "audio" / "a.flac"), stereo(tmp_path / "a.wav"), tmp_path / "circle.flac"
    circle.symlink_to(circle)
    for name in "defghij":  # wherever the system lists the recording, some of these are likely to come first
        (taken.parent / f"{name}.flac").symlink_to(circle)
    before = content(tmp_path / "in")
    items = [*(SourceItem(name, circle, "a text") for name in "defghij"), SourceItem("a", other, "a text"), SourceItem("b", taken, "more")]
    with pytest.raises(UserError, match=r"would replace its source.*a\.flac.*choose another"):
        prepare_corpus(Source("toy", items), tmp_path / "in", OPTIONS)
    assert content(tmp_path / "in") == before


def test_a_corpus_beside_its_own_recordings_is_prepared_again_and_again(tmp_path: Path) -> None:
    folder = tmp_path / "audio"
    folder.mkdir()
    soundfile.write(folder / "mono.flac", speech(), 16000)
    stereo(folder / "two.wav")
    for name in ("mono", "two"):
        (folder / f"{name}.txt").write_text(f"the text of {name}")
    kept = [prepare_corpus(read_folder(folder), tmp_path, OPTIONS).report["kept"] for _ in range(3)]
    assert kept[0] == 2
    assert min(kept) >= 2


@pytest.mark.parametrize(("low", "high"), [(2.0, 1.0), (-1.0, 1.0), (1.0, 1.0)])
def test_impossible_limits_are_refused(low: float, high: float) -> None:
    with pytest.raises(UserError, match="min_seconds < max_seconds"):
        PrepareOptions(min_seconds=low, max_seconds=high)


def test_split_by_text_when_the_source_names_none(tmp_path: Path) -> None:
    source = corpus(tmp_path / "in", 12)
    items = [SourceItem(item.id, item.audio, f"Text {i // 2}{'!' * (i % 2)}") for i, item in enumerate(source.items)]
    policy = SplitPolicy(valid_share=0.3, test_share=0.3, seed=3)
    options = PrepareOptions(max_seconds=2.0, split=policy)
    prepare_corpus(Source("pairs", items), tmp_path / "out", options)
    where = {cut.id: split for split in ("train", "valid", "test") for cut in load_cuts(tmp_path / "out", split)}
    assert len(set(where.values())) > 1
    assert all(where[f"item{i}"] == where[f"item{i + 1}"] for i in range(0, 12, 2))


def test_a_file_that_may_be_read_at_last_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size and times are as before, only its permissions are not."""
    soundfile.write(tmp_path / "a.wav", speech(), 16000)
    source = Source("one", [SourceItem("a", tmp_path / "a.wav", "text", split="train")])
    with monkeypatch.context() as forbidden:
        forbidden.setattr(os, "access", lambda *_: False)
        prepare_corpus(source, tmp_path / "out", OPTIONS)
    assert not prepare_corpus(source, tmp_path / "out", OPTIONS).unchanged
    assert prepare_corpus(source, tmp_path / "out", OPTIONS).unchanged


@pytest.mark.parametrize("written", ["clips\\\\A.wav", "CLIPS/a.WAV"])
def test_all_missing_names_the_file_that_may_be_meant(tmp_path: Path, written: str) -> None:
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "A.wav", np.zeros(10), 16000)
    (tmp_path / "list.jsonl").write_text(f'{{"audio": "{written}", "text": "x"}}\n')
    with pytest.raises(UserError, match=r"there is '.*/clips/A\.wav'.*correct the paths"):
        prepare_corpus(read_jsonl_corpus(tmp_path / "list.jsonl"), tmp_path / "out", PrepareOptions())


def test_tables_of_common_voice_find_their_clips(tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    soundfile.write(tmp_path / "clips" / "a.wav", np.zeros(10), 16000)
    (tmp_path / "validated.tsv").write_text("client_id\tpath\tsentence\nc\ta.wav\tHello\n")
    assert [item.audio for item in read_csv_corpus(tmp_path / "validated.tsv").items] == [tmp_path / "clips" / "a.wav"]
