"""lhotse manifests and Hugging Face datasets as sources."""

from __future__ import annotations

from pathlib import Path

import corpus_layouts as layouts
import numpy as np
import pytest
import soundfile
from lhotse import CutSet, MonoCut, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.audio import AudioSource

from kalle.data.corpus.cuts import load_cuts
from kalle.data.corpus.items import PrepareOptions, SplitPolicy, split_of_part
from kalle.data.corpus.library_readers import read_hugging_face, read_lhotse
from kalle.data.corpus.prepare import prepare_corpus
from kalle.errors import UserError
from kalle.text.languages import language_of_name

OPTIONS = PrepareOptions(split=SplitPolicy(0.0, 0.0))


@pytest.fixture
def manifests(tmp_path: Path) -> Path:
    """A recording in two channels with two speakers, and one that comes out of a command."""
    folder = tmp_path / "in"
    folder.mkdir()
    soundfile.write(folder / "call.wav", np.stack([layouts.noise(1, 8000, 2.0), layouts.noise(2, 8000, 2.0)], 1), 8000)
    piped = Recording("piped", [AudioSource("command", [0], "sph2pipe x.sph")], 8000, 8000, 1.0)
    recordings = [Recording.from_file(folder / "call.wav"), piped]
    supervisions = [
        SupervisionSegment("a", "call", 0.25, 1.0, channel=0, text="left", language="English", speaker="ann", custom={"dnsmos": 3.0}),
        SupervisionSegment("b", "call", 0.0, 2.0, channel=1, text="right", language="zh-CN", gender="F"),
        SupervisionSegment("c", "piped", 0.0, 1.0, text="piped"),
        SupervisionSegment("d", "gone", 0.0, 1.0, text="gone"),
    ]
    RecordingSet.from_recordings(recordings).to_file(folder / "toy_recordings_dev.jsonl.gz")
    SupervisionSet.from_segments(supervisions).to_file(folder / "toy_supervisions_dev.jsonl.gz")
    return folder


def test_lhotse_manifests_keep_segments_channels_and_part(manifests: Path, tmp_path: Path) -> None:
    source = read_lhotse(manifests, speaker="someone")
    assert [(i.id, i.start_s, i.duration_s, i.channel, i.speaker, i.language, i.split, i.custom) for i in source.items] == [
        ("a", 0.25, 1.0, 0, "ann", "en", "valid", {"dnsmos": 3.0}),
        ("b", 0.0, None, 1, "someone", "zh", "valid", {"gender": "F"}),
    ]
    assert {rejection.id: rejection.reason for rejection in source.rejected} == {"c": "unreadable", "d": "missing"}
    layouts.record(manifests / "more.wav")
    more = Recording.from_file(manifests / "more.wav")
    cut = MonoCut("m", 0.1, 0.4, 0, recording=more, supervisions=[SupervisionSegment("m", "more", 0.0, 0.4, text="more")])
    bare = MonoCut("bare", 0.0, 0.4, 0, recording=more)
    CutSet.from_cuts([cut, bare]).to_file(tmp_path / "cuts.jsonl.gz")
    from_cuts = read_lhotse(tmp_path / "cuts.jsonl.gz")
    assert [(item.start_s, item.duration_s, item.split) for item in from_cuts.items] == [(0.1, 0.4, None)]
    assert [rejection.reason for rejection in from_cuts.rejected] == ["no text"]
    both = [*source.items, *from_cuts.items]
    prepare_corpus(type(source)("both", both, source.rejected), tmp_path / "out", OPTIONS)
    left, right = load_cuts(tmp_path / "out", "valid")
    for cut, channel, part in ((left, 0, slice(4000, 20000)), (right, 1, slice(0, 32000))):
        expected = np.repeat(soundfile.read(manifests / "call.wav", dtype="float32")[0][:, channel], 2)[part]
        assert np.corrcoef(cut.load_audio()[0], expected)[0, 1] > 0.6
    [segment] = load_cuts(tmp_path / "out", "train")
    np.testing.assert_array_equal(segment.load_audio()[0], soundfile.read(manifests / "more.wav", dtype="float32")[0][1600:])


def test_manifests_are_not_replaced_by_those_of_the_corpus(tmp_path: Path) -> None:
    layouts.record(tmp_path / "more.wav")
    more = Recording.from_file(tmp_path / "more.wav")
    cut = MonoCut("m", 0.1, 0.4, 0, recording=more, supervisions=[SupervisionSegment("m", "more", 0.0, 0.4, text="more")])
    CutSet.from_cuts([cut]).to_file(tmp_path / "cuts_train.jsonl.gz")
    before = (tmp_path / "cuts_train.jsonl.gz").read_bytes()
    for source in (tmp_path, tmp_path / "cuts_train.jsonl.gz"):
        with pytest.raises(UserError, match=r"would replace its source.*choose another"):
            prepare_corpus(read_lhotse(source), tmp_path, OPTIONS)
    assert (tmp_path / "cuts_train.jsonl.gz").read_bytes() == before


@pytest.mark.parametrize("kind", ["gone", "empty", "half"])
def test_a_place_without_manifests_tells_what_is_expected(tmp_path: Path, kind: str) -> None:
    if kind != "gone":
        (tmp_path / kind).mkdir()
    if kind == "half":
        (tmp_path / kind / "x_recordings_all.jsonl.gz").touch()
    with pytest.raises(UserError):
        read_lhotse(tmp_path / kind)


def test_names_of_parts_and_languages() -> None:
    parts = ("dev-clean", "validation", "eval", "test.other", "train-clean-100", "all")
    assert [split_of_part(part) for part in parts] == ["valid", "valid", "valid", "test", None, None]
    assert [language_of_name(name) for name in ("English", "Chinese", "zh-CN", "pt_BR", "en", None)] == ["en", "zh", "zh", "pt", "en", ""]


def table(folder: Path) -> dict[str, list]:
    """Two encoded clips, a clip that is a file, and one whose bytes are no audio."""
    path = layouts.record(folder / "outside.wav")
    clips = [layouts.record(folder / f"clip{i}.flac", 24000) for i in range(2)]
    audio = [{"bytes": clip.read_bytes(), "path": clip.name} for clip in clips]
    audio += [{"bytes": None, "path": str(path)}, {"bytes": b"noise", "path": "broken.wav"}]
    return {"audio": audio, "sentence": [f"row {i}" for i in range(4)], "client_id": ["ann", "bob", None, "cyd"], "locale": ["zh-CN"] * 4}


@pytest.mark.parametrize("kind", ["disk", "parquet"])
def test_hugging_face_datasets_are_read_without_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = table(tmp_path / "files")
    # Encoding would need torchcodec; the hub's own files come encoded.
    train = datasets.Dataset.from_dict(rows).cast_column("audio", datasets.Audio(decode=kind == "disk"))
    test = train.select([0])
    if kind == "disk":
        datasets.DatasetDict({"train": train, "validation": test}).save_to_disk(tmp_path / "in")
    else:
        (tmp_path / "in").mkdir()
        train.to_parquet(tmp_path / "in" / "train-00000-of-00001.parquet")
        test.to_parquet(tmp_path / "in" / "validation-00000-of-00001.parquet")
    source = read_hugging_face(str(tmp_path / "in"), speaker="someone")
    held_out = source.items[4].id
    assert [item.id for item in source.items[:4]] == ["train-clip0", "train-clip1", "train-outside", "train-broken"]
    assert [(item.speaker, item.language, item.split) for item in source.items[1:3]] == [("bob", "zh", None), ("someone", "zh", None)]
    assert held_out.endswith("-clip0")
    report = prepare_corpus(source, tmp_path / "out", OPTIONS).report
    assert (report["items"], report["rejected_by_reason"]) == (5, {"unreadable": 1})
    assert [cut.supervisions[0].text for cut in load_cuts(tmp_path / "out", "train")] == ["row 0", "row 1", "row 2"]
    [cut] = load_cuts(tmp_path / "out", "valid")
    expected, _ = soundfile.read(tmp_path / "files" / "clip0.flac")
    assert np.corrcoef(np.interp(np.arange(8000) * 1.5, np.arange(12000), expected), cut.load_audio()[0])[0, 1] > 0.7
    with pytest.raises(UserError, match=r"text_column: got 'words', expected one of audio, sentence"):
        read_hugging_face(str(tmp_path / "in"), text_column="words")


def test_a_dataset_that_is_none(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    (tmp_path / "bare").mkdir()
    with pytest.raises(UserError):
        read_hugging_face(str(tmp_path / "bare"))
    datasets.Dataset.from_dict({"words": ["a"]}).save_to_disk(tmp_path / "silent")
    with pytest.raises(UserError, match="no audio column: got words"):
        read_hugging_face(str(tmp_path / "silent"))


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"id": "a"}', '{"type": "MonoCut"}', '{"id": "a", "sources": 5, "sampling_rate": 1, "num_samples": 1}']
)
def test_damaged_manifests_are_one_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "cuts.jsonl").write_text(line + "\n")
    with pytest.raises(UserError) as caught:
        read_lhotse(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_name_of_a_manifest_is_no_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("pipe:touch ran;cuts.jsonl").write_text("")
    for source in (Path(), Path("pipe:touch ran;cuts.jsonl")):
        with pytest.raises(UserError, match="expected cuts"):
            read_lhotse(source)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe:touch ran;cuts.jsonl"]


@pytest.mark.parametrize("name", ["é" * 300, "a\0b"])
def test_a_name_that_no_file_can_have_costs_its_item(tmp_path: Path, name: str) -> None:
    layouts.record(tmp_path / "good.wav")
    good = Recording.from_file(tmp_path / "good.wav")
    bad = Recording("bad", [AudioSource("file", [0], name)], good.sampling_rate, good.num_samples, good.duration)
    cuts = []
    for one in (good, bad):
        spoken = SupervisionSegment(one.id, one.id, 0.0, one.duration, text=one.id)
        cuts.append(MonoCut(one.id, 0.0, one.duration, 0, recording=one, supervisions=[spoken]))
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts.jsonl.gz")
    report = prepare_corpus(read_lhotse(tmp_path / "cuts.jsonl.gz"), tmp_path / "out", OPTIONS).report
    assert (report["kept"], report["rejected_by_reason"]) == (1, {"missing": 1})
    datasets = pytest.importorskip("datasets")
    rows = {"audio": [{"path": str(tmp_path / "good.wav"), "bytes": None}, {"path": name, "bytes": None}], "text": ["good", "bad"]}
    datasets.Dataset.from_dict(rows).save_to_disk(tmp_path / "table")
    report = prepare_corpus(read_hugging_face(str(tmp_path / "table")), tmp_path / "out2", OPTIONS).report
    assert (report["kept"], report["rejected_by_reason"]) == (1, {"missing": 1})
