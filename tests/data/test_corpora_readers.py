from __future__ import annotations

import json
from pathlib import Path

import pytest

from kalle.data.corpus.items import SourceItem, safe_id, spoken_text
from kalle.data.corpus.lists import read_csv_corpus, read_embedded, read_folder, read_jsonl_corpus
from kalle.errors import UserError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def reasons(source) -> dict[str, str]:
    return {rejection.id: rejection.reason for rejection in source.rejected}


def test_folder_pairs_audio_with_txt_or_lab(tmp_path: Path) -> None:
    touch(tmp_path / "a.wav", tmp_path / "ann" / "b.FLAC", tmp_path / "ann" / "c.mp3", tmp_path / "d.wav", tmp_path / "d.mp3")
    touch(tmp_path / "image.png", tmp_path / "e.opus")
    (tmp_path / "a.txt").write_text("\ufeffHello,\n  world. \n", encoding="utf-8")
    (tmp_path / "ann" / "b.lab").write_text("From a lab file")
    (tmp_path / "d.txt").write_text("one text, two sounds")
    (tmp_path / "e.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (tmp_path / "alone.txt").write_text("no sound")
    source = read_folder(tmp_path, speaker="folders", language="en")
    assert source.items == [
        SourceItem("a", tmp_path / "a.wav", "Hello, world.", tmp_path.name, "en"),
        SourceItem("ann_b", tmp_path / "ann" / "b.FLAC", "From a lab file", "ann", "en"),
        SourceItem("d", tmp_path / "d.mp3", "one text, two sounds", tmp_path.name, "en"),
    ]
    assert reasons(source) == {"ann_c": "no text", "e": "no text", "alone": "missing", "d": "duplicate id"}
    assert "not UTF-8" in next(rejection.detail for rejection in source.rejected if rejection.id == "e")
    assert {item.speaker for item in read_folder(tmp_path, speaker="bob").items} == {"bob"}


def test_jsonl_takes_every_documented_key(tmp_path: Path) -> None:
    touch(tmp_path / "clips" / "a.wav")
    rows = [
        {"audio": "clips/a.wav", "text": "one", "speaker": "ann", "duration": 1.5, "language": "fr", "split": "test", "mood": "glad"},
        {"audio": str(tmp_path / "clips" / "a.wav"), "text": "two", "id": "own id"},
        {"audio": "clips/gone.wav", "text": "three"},
        {"audio": "clips/a.wav", "id": "own id", "text": "again"},
        {"text": "no audio"},
        {"audio": "clips/b.wav", "text": None},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows) + "\n\n")
    source = read_jsonl_corpus(tmp_path / "list.jsonl", speaker="bob", language="en")
    assert source.items[0] == SourceItem("clips_a", tmp_path / "clips" / "a.wav", "one", "ann", "fr", "test")
    assert source.items[1] == SourceItem("own_id", tmp_path / "clips" / "a.wav", "two", "bob", "en", None)
    assert [item.id for item in source.items] == ["clips_a", "own_id", "clips_gone", "clips_b"]
    assert source.items[3].text == ""
    assert reasons(source) == {"own_id": "duplicate id", "line-5": "missing"}
    assert source.notes == {"keys not used (mood)": 1}


def test_jsonl_keeps_what_peers_write_and_takes_parts(tmp_path: Path) -> None:
    rows = [
        {"audio": "a.wav", "text": "one", "ref_audio": "b.wav", "duration": 3.5, "dataset_id": 2},
        {"audio": "a.wav", "id": "part", "text": "two", "start": 1.5, "duration": 2.0, "fid": "x"},
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    source = read_jsonl_corpus(tmp_path / "list.jsonl")
    found = [(item.start_s, item.duration_s, item.custom) for item in source.items]
    assert found == [(0.0, None, {"ref_audio": "b.wav", "dataset_id": 2}), (1.5, 2.0, None)]
    assert source.notes == {"keys not used (fid)": 1}
    (tmp_path / "list.jsonl").write_text(json.dumps({"audio": "a.wav", "text": "x", "start": "soon"}))
    with pytest.raises(UserError, match="entry 1: got 'soon'"):
        read_jsonl_corpus(tmp_path / "list.jsonl")


def test_jsonl_may_hold_line_separators_and_windows_line_ends(tmp_path: Path) -> None:
    text = "one\u2028two"
    row = json.dumps({"audio": "a.wav", "text": text}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_bytes(f"\ufeff{row}\r\n{row.replace('a.wav', 'b.wav')}\r\n".encode())
    assert [item.text for item in read_jsonl_corpus(tmp_path / "list.jsonl").items] == [text, text]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"audio": "a.wav"}\n{"audio": ', r"line 2"),
        ('["audio"]', r"line 1 holds a list"),
        ('{"audio": "a.wav", "text": "x", "split": "dev"}', r"got 'dev', expected one of train, valid, test"),
    ],
)
def test_a_broken_list_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        read_jsonl_corpus(tmp_path / "list.jsonl")
    assert "list.jsonl" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_csv_without_header(tmp_path: Path) -> None:
    touch(tmp_path / "a.wav", tmp_path / "wavs" / "LJ001-0001.wav")
    (tmp_path / "metadata.csv").write_text("a.wav|Hello, you.\nLJ001-0001|Chapter 1|Chapter one\n\ngone|x\n|lost\na.wav\n")
    source = read_csv_corpus(tmp_path / "metadata.csv", speaker="linda", language="en")
    assert source.items == [
        SourceItem("a", tmp_path / "a.wav", "Hello, you.", "linda", "en"),
        SourceItem("LJ001-0001", tmp_path / "wavs" / "LJ001-0001.wav", "Chapter 1", "linda", "en"),
        SourceItem("gone", tmp_path / "gone", "x", "linda", "en"),
    ]
    assert reasons(source) == {"line-5": "missing", "a": "duplicate id"}
    assert source.notes == {"lines with further columns, not used": 1}


def test_csv_with_header_finds_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("Path;Speaker;Text;Language\nx.wav;ann;Hello;fr\ny.wav;;Bye\n")
    items = read_csv_corpus(tmp_path / "list.csv", delimiter=";", speaker="bob", language="en").items
    assert [(item.id, item.text, item.speaker, item.language) for item in items] == [("x", "Hello", "ann", "fr"), ("y", "Bye", "bob", "en")]


def test_the_header_of_f5_is_known(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(f"audio_file|text\n{tmp_path}/a.wav|Hello\n")
    [item] = read_csv_corpus(tmp_path / "metadata.csv").items
    assert (item.audio, item.text) == (tmp_path / "a.wav", "Hello")


@pytest.mark.parametrize(("content", "message"), [("\n \n", "no lines"), ("audio|words\na.wav|x\n", "no text column")])
def test_a_useless_csv_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        read_csv_corpus(tmp_path / "list.csv")


def test_missing_inputs_name_the_path(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    for call, message in [
        (lambda: read_folder(tmp_path / "gone"), "folder not found: got .*gone"),
        (lambda: read_folder(tmp_path / "bare"), "no audio in .*bare"),
        (lambda: read_jsonl_corpus(tmp_path / "gone.jsonl"), "file not found: got .*gone.jsonl"),
        (lambda: read_csv_corpus(tmp_path / "gone.csv"), "file not found: got .*gone.csv"),
        (lambda: read_embedded(tmp_path / "bare"), "no corpus in .*bare.*--corpus"),
    ]:
        with pytest.raises(UserError, match=message):
            call()


@pytest.mark.parametrize(
    ("text", "spoken"),
    [
        ("at [@]", "at"),
        ('IAX (note: does not say "2")', "IAX"),
        ("(quietly) Hello,  there. [beep] (tone)", "Hello, there."),
        ("[ascending tones]", ""),
        ("<beep ascending>", ""),
        ("(1 second of silence)", ""),
        ("a menu (never again), press 4", None),
        ("3 < 4 and 5 > 2", None),
        ("plain", "plain"),
    ],
)
def test_remarks_outside_are_taken_off_and_remarks_inside_are_doubted(text: str, spoken: str | None) -> None:
    assert spoken_text(text) == spoken


def test_safe_id_keeps_letters_of_any_script() -> None:
    assert safe_id("digits/h 1.a") == "digits_h_1_a"
    assert safe_id("\u5b57/\u00e9-x") == "\u5b57_\u00e9-x"
    assert safe_id("///") == "_"
