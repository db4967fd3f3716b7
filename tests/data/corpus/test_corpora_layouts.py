"""Every published layout, with its quirks: what is kept with which text, speaker, language and split, and what is rejected and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import corpus_layouts as layouts
import numpy as np
import pytest
import soundfile

from kalle.data.corpus.cuts import load_cuts
from kalle.data.corpus.items import PrepareOptions, Source, SplitPolicy
from kalle.data.corpus.library_readers import read_aishell3, read_librispeech, read_libritts
from kalle.data.corpus.prepare import prepare_corpus
from kalle.data.corpus.published import read_common_voice, read_emilia, read_esd, read_kaldi, read_ljspeech, read_vctk
from kalle.errors import UserError

OPTIONS = PrepareOptions(split=SplitPolicy(0.0, 0.0))


def texts(source: Source) -> dict[str, str]:
    return {item.id: item.text for item in source.items}


def reasons(source: Source) -> dict[str, str]:
    return {rejection.id: rejection.reason for rejection in source.rejected}


def splits(source: Source) -> dict[str | None, int]:
    return dict(Counter(item.split for item in source.items))


def test_ljspeech_gives_normalised_text_and_survives_a_torn_file(tmp_path: Path) -> None:
    root = layouts.ljspeech(tmp_path)
    source = read_ljspeech(tmp_path)
    assert texts(source) == {
        "LJ001-0001": 'He said, "in fourteen fifty-five',
        "LJ001-0002": "Printing, in the only sense",
        "LJ001-0005": "is torn",
    }
    assert {(item.speaker, item.language, item.split) for item in source.items} == {("linda-johnson", "en", None)}
    assert reasons(source) == {"LJ001-0003": "missing", "LJ001-0004": "no text"}
    report = prepare_corpus(read_ljspeech(root), tmp_path / "out", OPTIONS).report
    assert (report["items"], report["kept"]) == (5, 2)
    assert report["rejected_by_reason"] == {"missing": 1, "unreadable": 1, "no text": 1}
    cuts = load_cuts(tmp_path / "out", "train")
    assert [(cut.sampling_rate, cut.load_audio().shape) for cut in cuts] == [(16000, (1, 8000))] * 2


def test_librispeech_keeps_its_own_split(tmp_path: Path) -> None:
    source = read_librispeech(layouts.librispeech(tmp_path))
    assert splits(source) == {None: 3, "valid": 2, "test": 2}
    assert texts(source)["84-1240-0001"] == "CHAPTER TWO"
    assert {item.speaker for item in source.items} == {"103", "84", "1089"}
    assert {item.language for item in source.items} == {"en"}
    assert reasons(source) == {"84-1240-0002": "missing", "1089-1240-0002": "missing"}
    part = read_librispeech(tmp_path / "LibriSpeech" / "test-clean")
    assert (splits(part), part.notes) == ({"test": 2}, {"parts": "test-clean"})


@pytest.mark.parametrize("tables", [True, False])
def test_libritts_is_read_by_its_tables_or_its_text_files(tmp_path: Path, tables: bool) -> None:
    layouts.libritts(tmp_path, tables)
    source = read_libritts(tmp_path)
    assert splits(source) == {None: 2, "valid": 2, "test": 2}
    assert texts(source)["14_121123_000001_000000"] == "Doctor No, number 1."
    assert {(item.speaker, item.language) for item in source.items} == {("14", "en"), ("84", "en"), ("367", "en")}
    assert reasons(source) == {"14_121123_000009_000000": "no text"}
    if tables:
        first = next(item for item in source.items if item.speaker == "84")
        assert first.custom == {"gender": "F", "orig_text": "Dr. No, 0.", "snr": 25.5}


def test_aishell3_leaves_the_pinyin_out(tmp_path: Path) -> None:
    source = read_aishell3(layouts.aishell3(tmp_path))
    assert texts(source) == {"SSB00050001": "广州", "SSB00050002": "大学", "SSB00090001": "你好"}
    assert {(item.speaker, item.language, item.split) for item in source.items} == {("SSB0005", "zh", None), ("SSB0009", "zh", "test")}
    assert source.items[0].custom == {"gender": "female", "tones_pinyin": "guang3 zhou1 %", "tones_text": "广州%$"}
    assert reasons(source) == {"SSB00050003": "missing"}


def test_vctk_has_two_microphones_and_a_speaker_without_texts(tmp_path: Path) -> None:
    layouts.write(layouts.vctk(tmp_path) / "txt" / "p225" / "p225_003.txt", "There is no recording of this.")
    first = read_vctk(tmp_path)
    assert sorted(texts(first)) == ["p225_001_mic1", "p225_002_mic1", "p280_001_mic1", "p280_002_mic1"]
    assert {item.text for item in first.items} == {"Please call Stella 001.", "Please call Stella 002."}
    assert reasons(first) == {"p315_001_mic1": "no text", "p315_002_mic1": "no text", "p225_003_mic1": "missing"}
    assert first.items[0].custom == {"age": "23", "gender": "F", "accent": "English"}
    second = read_vctk(tmp_path / "VCTK-Corpus-0.92", "mic2")
    assert sorted(texts(second)) == ["p225_001_mic2", "p225_002_mic2"]
    assert reasons(second) == {
        "p225_003_mic2": "missing",
        **{f"p280_00{i}_mic2": "missing" for i in (1, 2)},
        **{f"p315_00{i}_mic2": "no text" for i in (1, 2)},
    }
    with pytest.raises(UserError, match="got 'mic3', expected mic1 or mic2"):
        read_vctk(tmp_path, "mic3")


def test_a_recipe_that_gives_up_is_one_line(tmp_path: Path) -> None:
    root = layouts.librispeech(tmp_path)
    layouts.write(root / "test-clean" / "1089" / "1240" / "1089-1240.trans.txt", "1089-1240-0000\n")
    with pytest.raises(UserError, match=r"cannot read LibriSpeech in .*Error.*expected train-clean-100.*trans.txt") as caught:
        read_librispeech(root)
    assert "\n" not in str(caught.value)


def test_rows_of_other_widths_cost_no_ljspeech(tmp_path: Path) -> None:
    root = layouts.ljspeech(tmp_path)
    layouts.write(root / "metadata.csv", "LJ001-0001|two cells\n\nLJ001-0002|a|b|c\nLJ001-0004|4|four\nLJ001-0005\n\n")
    source = read_ljspeech(root)
    assert texts(source) == {"LJ001-0001": "two cells", "LJ001-0004": "four"}
    assert reasons(source) == {"LJ001-0002": "bad entry", "LJ001-0005": "bad entry"}
    assert "line 3" in source.rejected[0].detail
    assert 1 in source.notes.values()


def test_a_corpus_in_the_layout_of_ljspeech_is_not_linda(tmp_path: Path) -> None:
    for name in ("mine_1.wav", "mine_2.flac", "mine_2.wav", "LJ001-0001.WAV"):
        layouts.record(tmp_path / "wavs" / name)
    layouts.write(tmp_path / "metadata.csv", "mine_1|Guten Tag.\nwavs/mine_2.wav|Nummer 5|\nLJ001-0001|Hello\n")
    source = read_ljspeech(tmp_path, "anna", "German")
    assert [(item.id, item.text, item.speaker, item.language, item.custom) for item in source.items] == [
        ("mine_1", "Guten Tag.", "anna", "de", None),
        ("mine_2", "Nummer 5", "anna", "de", None),
        ("LJ001-0001", "Hello", "linda-johnson", "en", {"gender": "female"}),
    ]
    assert {item.speaker for item in read_ljspeech(tmp_path).items} == {"unknown", "linda-johnson"}
    assert reasons(source) == {"mine_2": "duplicate id"}
    assert 2 in source.notes.values()


def test_speakers_in_the_second_cell_are_no_texts(tmp_path: Path) -> None:
    for name in "ab":
        layouts.record(tmp_path / "wavs" / f"{name}.wav")
    layouts.write(tmp_path / "metadata.csv", "a|anna|Good morning to you.\nb|bert|See you later.\n")
    with pytest.raises(UserError, match=r"prepare csv --columns audio,speaker,text"):
        read_ljspeech(tmp_path)


def test_common_voice_takes_old_and_new_tables(tmp_path: Path) -> None:
    source = read_common_voice(layouts.common_voice(tmp_path))
    assert splits(source) == {None: 4, "valid": 2, "test": 2}
    assert Counter(item.language for item in source.items) == {"zh": 4, "fr": 4}
    assert texts(source)["common_voice_fr_train1"] == '"Phrase train 1'
    assert {item.speaker for item in source.items} == {"c0", "c1"}
    assert reasons(source) == {"common_voice_fr_gone": "missing", "common_voice_zh-CN_gone": "missing"}
    assert {tuple(item.custom.items()) for item in source.items if item.language == "fr"} == {(("age", "twenties"), ("accent", "x"))}
    assert len(read_common_voice(tmp_path / "cv-corpus-13.0" / "fr").items) == 4


def test_an_esd_list_with_an_id_twice_keeps_the_first_line_and_says_so(tmp_path: Path) -> None:
    table = layouts.esd(tmp_path) / "0011" / "0011.txt"
    line = "0011_000001\tThe nine the eggs, I keep. 1\tSurprise\n"
    table.write_text(table.read_text(encoding="utf-8") + line + "0011_000001\tAnother text.\tSad\n", encoding="utf-8")
    source = read_esd(tmp_path)
    assert texts(source)["0011_000001"] == "The nine the eggs, I keep. 1"
    assert reasons(source)["0011_000001"] == "duplicate id"
    assert Counter(rejection.reason for rejection in source.rejected)["duplicate id"] == 1


def test_esd_keeps_emotions_in_any_encoding(tmp_path: Path) -> None:
    layouts.esd(tmp_path)
    source = read_esd(tmp_path)
    found = {item.id: (item.language, item.speaker, item.split, item.custom["emotion"]) for item in source.items}
    assert found == {
        "0001_000351": ("zh", "0001", None, "angry"),
        "0001_000001": ("zh", "0001", None, "neutral"),
        "0011_000001": ("en", "0011", "train", "surprise"),
        "0011_000002": ("en", "0011", "valid", "surprise"),
        "0011_000003": ("en", "0011", "test", "surprise"),
    }
    assert texts(source)["0001_000001"] == "这是一个测试"
    assert reasons(source) == {"0011_000004": "missing", "0011_000009": "no text"}
    prepare_corpus(source, tmp_path / "out", OPTIONS)
    assert [cut.custom["emotion"] for cut in load_cuts(tmp_path / "out", "test")] == ["surprise"]


def test_emilia_folders(tmp_path: Path) -> None:
    source = read_emilia(layouts.emilia_folder(tmp_path))
    assert sorted(texts(source)) == [row["id"] for row in layouts.emilia_rows()]
    assert {(item.speaker, item.language, item.custom["dnsmos"]) for item in source.items} == {("EN_B00000_S00000", "en", 3.3)}
    ending = {identity[-1]: reason for identity, reason in reasons(source).items()}
    assert ending == {"7": "no text", "8": "no text", "9": "missing"}


def test_emilia_tars_are_read_in_place(tmp_path: Path) -> None:
    tar = layouts.emilia_tar(tmp_path / "in")
    source = read_emilia(tmp_path / "in")
    assert (len(source.items), source.notes) == (4, {"tars": 1})
    report = prepare_corpus(source, tmp_path / "out", OPTIONS).report
    assert report["rejected_by_reason"] == {"unreadable": 1, "no text": 1}
    cuts = load_cuts(tmp_path / "out", "train")
    assert [cut.supervisions[0].text for cut in cuts] == [f"Hello there, number {i}." for i in range(3)]
    assert cuts[0].custom == {"dnsmos": 3.3, "source": f"{tar}:EN_B00000_S00000_W000000.mp3"}
    assert all(cut.load_audio().shape == (1, 8000) for cut in cuts)
    assert sorted(path.suffix for path in (tmp_path / "out" / "audio").iterdir()) == [".flac"] * 3
    assert prepare_corpus(read_emilia(tar), tmp_path / "out", OPTIONS).unchanged


def test_a_compressed_or_torn_tar_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError):
        read_emilia(layouts.emilia_tar(tmp_path, "w:gz"))
    tar = layouts.emilia_tar(tmp_path / "torn")
    tar.write_bytes(tar.read_bytes()[:3000])
    with pytest.raises(UserError):
        read_emilia(tar)


def test_emilia_lists_of_the_first_release(tmp_path: Path) -> None:
    source = read_emilia(layouts.emilia_lists(tmp_path))
    assert [(item.id[-1], item.language, item.custom["dnsmos"]) for item in source.items] == [("0", "en", 3.3), ("1", "en", 3.3)]
    assert reasons(source) == {"EN_B00000_S00000_W000002": "missing"}


def test_kaldi_segments_are_cuts_of_the_recording(tmp_path: Path) -> None:
    source = read_kaldi(layouts.kaldi(tmp_path / "in"), language="en")
    assert {item.id: (item.start_s, item.duration_s, item.speaker, item.language, item.split) for item in source.items} == {
        "call-1": (0.5, 0.75, "ann", "en", None),
        "call-2": (2.5, None, "bob", "en", None),
        "call-3": (2.5, 1.0, "bob", "en", None),
        "whole": (0.0, None, "unknown", "fr", "test"),
    }
    assert reasons(source) == {"call-4": "no text", "piped-1": "unreadable", "lost-1": "missing", "nowhere-1": "missing"}
    report = prepare_corpus(source, tmp_path / "out", OPTIONS).report
    assert {row["id"]: row["reason"] for row in report["rejected_items"]}["call-3"] == "outside the recording"
    assert report["converted_to_flac"] == 0
    recording, _ = soundfile.read(tmp_path / "in" / "train" / "call.wav", dtype="float32")
    first, last = load_cuts(tmp_path / "out", "train")
    assert [(cut.start, cut.duration, cut.num_samples) for cut in (first, last)] == [(0.5, 0.75, 12000), (2.5, 0.5, 8000)]
    for cut, part in ((first, recording[4000:10000]), (last, recording[20000:])):
        audio = cut.load_audio()[0]
        assert audio.shape == (cut.num_samples,)
        assert np.corrcoef(audio[::2], part)[0, 1] > 0.9


@pytest.mark.parametrize(
    ("read", "expected"),
    [
        (read_ljspeech, "LJSpeech.*metadata.csv"),
        (read_librispeech, "LibriSpeech.*trans.txt"),
        (read_libritts, "LibriTTS.*normalized.txt"),
        (read_aishell3, "AISHELL-3.*content.txt"),
        (read_vctk, "VCTK.*wav48"),
        (read_common_voice, "Common Voice.*train.tsv|train.tsv.*Common Voice"),
        (read_esd, "ESD.*0001.txt"),
        (read_emilia, "Emilia.*x.json|x.json.*Emilia"),
        (read_kaldi, "wav.scp"),
    ],
)
def test_a_wrong_folder_tells_the_layout(tmp_path: Path, read, expected: str) -> None:
    (tmp_path / "other" / "things").mkdir(parents=True)
    for folder in (tmp_path / "other", tmp_path / "gone"):
        with pytest.raises(UserError, match=expected) as caught:
            read(folder)
        assert folder.name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_second_line_of_a_kaldi_table_is_counted(tmp_path: Path) -> None:
    for name in "ab":
        layouts.record(tmp_path / f"{name}.wav")
    layouts.write(tmp_path / "wav.scp", "a a.wav\nb b.wav\na b.wav\nb b.wav\n")
    layouts.write(tmp_path / "text", "a one\nb two\nb three\n")
    source = read_kaldi(tmp_path)
    assert [(item.id, item.audio.name, item.text) for item in source.items] == [("a", "a.wav", "one"), ("b", "b.wav", "two")]
    assert [(one.id, one.audio, one.reason) for one in source.rejected] == [("a", "b.wav", "duplicate id"), ("b", "", "duplicate id")]
