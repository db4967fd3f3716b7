from __future__ import annotations

import json
from pathlib import Path

import pytest

from kalle.cli.speaking import read_text
from kalle.data.corpus.items import READERS, SourceItem, safe_id, spoken_text
from kalle.data.corpus.lists import read_csv_corpus, read_embedded, read_folder, read_jsonl_corpus
from kalle.data.corpus.published import read_emilia
from kalle.errors import UserError
from kalle.evaluation.test_list import read_test_list


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


def test_folder_pairs_names_in_other_capitals_or_with_the_suffix_of_the_audio_where_one_is_meant(tmp_path: Path) -> None:
    touch(tmp_path / "B.WAV", tmp_path / "c.wav", tmp_path / "d.wav", tmp_path / "D.flac", tmp_path / "e.wav", tmp_path / "F.wav")
    named = {
        "b.txt": "bee",
        "c.wav.txt": "see",
        "D.txt": "dee",
        "d.wav.txt": "other dee",
        "E.txt": "one",
        "e.wav.txt": "two",
        "f.LAB": "eff",
    }
    for name, text in named.items():
        (tmp_path / name).write_text(text)
    source = read_folder(tmp_path)
    assert {item.audio.name: item.text for item in source.items} == {
        **{"B.WAV": "bee", "c.wav": "see", "d.wav": "other dee", "D.flac": "dee", "F.wav": "eff"}
    }
    assert [(rejection.id, rejection.reason) for rejection in source.rejected if rejection.reason == "no text"] == [("e", "no text")]
    assert list(source.notes.values()) == [4]


@pytest.mark.parametrize(
    ("beginning", "kind"), [(b"RIFF\x10\0\0\0WAVEfmt ", "audio"), (b"\xff\xfb\x90\0", "audio"), (b"\x1f\x8b\x08", "unpack")]
)
def test_a_list_that_is_no_text_is_named_as_what_it_is(tmp_path: Path, beginning: bytes, kind: str) -> None:
    (tmp_path / "list.csv").write_bytes(beginning + bytes(range(256)))
    (tmp_path / "list.lst").write_bytes((tmp_path / "list.csv").read_bytes())
    for read in (
        lambda: read_csv_corpus(tmp_path / "list.csv"),
        lambda: read_test_list(tmp_path / "list.lst"),
        lambda: read_text(None, tmp_path / "list.csv"),
    ):
        with pytest.raises(UserError, match=kind):
            read()


def test_a_text_that_begins_like_another_format_is_text(tmp_path: Path) -> None:
    touch(tmp_path / "a.wav")
    (tmp_path / "list.csv").write_text(
        "audio|text\na.wav|hello\n".replace("audio", "PAR1,audio").replace("a.wav", "1,a.wav").replace("|", ",")
    )
    assert [item.text for item in read_csv_corpus(tmp_path / "list.csv").items] == ["hello"]


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


NEMO_AND_OTHERS = [
    {"audio_filepath": "a.wav", "text": "one"},
    {"wav": "a.wav", "transcript": "one"},
    {"key": "a", "wav": "a.wav", "txt": "one"},
    {"path": "a.wav", "sentence": "one"},
    {"audio": {"path": "a.wav"}, "transcription": "one"},
    {"file_name": "a.wav", "raw_text": "not this", "text": "one"},
]


@pytest.mark.parametrize("row", NEMO_AND_OTHERS)
def test_the_usual_keys_of_other_tools_are_known(tmp_path: Path, row: dict) -> None:
    touch(tmp_path / "a.wav")
    (tmp_path / "list.jsonl").write_text(json.dumps({**row, "speaker_id": 7, "lang": "fr", "subset": "dev"}) + "\n")
    [item] = read_jsonl_corpus(tmp_path / "list.jsonl").items
    assert (item.id, item.audio, item.text, item.speaker, item.language, item.split) == (
        *("a", tmp_path / "a.wav", "one"),
        *("7", "fr", "valid"),
    )


def test_parts_of_one_recording_are_different_items(tmp_path: Path) -> None:
    rows = [{"audio_filepath": "a.wav", "text": f"{n}", "offset": n * 0.5, "duration": 0.5} for n in range(3)]
    rows.append({"audio": "a.wav", "text": "to an end", "start": 2, "end": 2.75})
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = read_jsonl_corpus(tmp_path / "list.jsonl").items
    assert [(item.start_s, item.duration_s) for item in found] == [(0.0, 0.5), (0.5, 0.5), (1.0, 0.5), (2.0, 0.75)]
    assert len({item.id for item in found}) == 4


def test_an_unknown_key_of_the_path_is_named(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"tape": "a.wav", "text": "x"}\n')
    with pytest.raises(UserError, match=r"the keys are tape.*rename the key of the path to audio"):
        read_jsonl_corpus(tmp_path / "list.jsonl")


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


HOSTILE_LINES = [
    '{"audio": "a.wav", "text": "x", "start": "soon"}',
    '{"audio": "a.wav", "text": "x", "start": Infinity, "duration": 1}',
    '{"audio": "a.wav", "text": "x", "start": 0, "duration": NaN}',
    '{"audio": "a.wav", "text": "x", "start": 0, "duration": -1}',
    '{"audio": "a.wav", "text": "x", "start": 1' + "0" * 400 + "}",
    '{"audio": "a.wav", "text": "x", "start": 1' + "0" * 5000 + "}",
    '{"audio": "a.wav", "text": "x", "deep": ' + "[" * 100_000 + "]" * 100_000 + "}",
    '{"audio": "a.wav", "text": ["x"]}',
    '{"audio": "a.wav", "text": "\\ud83d"}',
    '{"audio": "\\udce9.wav", "text": "x"}',
    '{"audio": ',
    '["audio"]',
]


@pytest.mark.parametrize("line", HOSTILE_LINES, ids=range(len(HOSTILE_LINES)))
def test_a_bad_line_is_one_rejected_item(tmp_path: Path, line: str) -> None:
    (tmp_path / "list.jsonl").write_text(f'{line}\n{{"audio": "b.wav", "text": "good"}}\n')
    source = read_jsonl_corpus(tmp_path / "list.jsonl")
    assert [item.id for item in source.items] == ["b"]
    [rejection] = source.rejected
    assert rejection.reason in ("bad entry", "unreadable")
    assert len(rejection.detail) < 300
    assert "\n" not in rejection.detail
    json.dumps([rejection.id, rejection.audio, rejection.detail], ensure_ascii=False).encode()


def test_jsonl_may_hold_line_separators_and_windows_line_ends(tmp_path: Path) -> None:
    text = "one\u2028two"
    row = json.dumps({"audio": "a.wav", "text": text}, ensure_ascii=False)
    (tmp_path / "list.jsonl").write_bytes(f"\ufeff{row}\r\n{row.replace('a.wav', 'b.wav')}\r\n".encode())
    assert [item.text for item in read_jsonl_corpus(tmp_path / "list.jsonl").items] == [text, text]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"audio": ', r"line 1: not JSON"),
        ('["audio"]', r"line 1: it holds a list"),
        ('{"audio": "a.wav", "text": "x", "split": "mine"}', r"got 'mine', expected one of train, valid, test"),
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
    (tmp_path / "metadata.csv").write_text("a.wav|Hello, you.\nLJ001-0001|Chapter 1\n\ngone|x\n|lost\na.wav\n")
    source = read_csv_corpus(tmp_path / "metadata.csv", speaker="linda", language="en")
    assert source.items == [
        SourceItem("a", tmp_path / "a.wav", "Hello, you.", "linda", "en"),
        SourceItem("LJ001-0001", tmp_path / "wavs" / "LJ001-0001.wav", "Chapter 1", "linda", "en"),
        SourceItem("gone", tmp_path / "gone", "x", "linda", "en"),
    ]
    assert reasons(source) == {"line-5": "missing", "a": "duplicate id"}
    assert source.notes == {"columns": "audio, text"}


def test_the_three_columns_of_ljspeech_are_known(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text('a|"Chapter 1," he said.|"Chapter one," he said.\nb|Of "5 things|Of "five things\n')
    items = read_csv_corpus(tmp_path / "metadata.csv").items
    assert [(item.id, item.text) for item in items] == [("a", '"Chapter 1," he said.'), ("b", 'Of "5 things')]


RFC4180 = 'audio,text\n0.wav,"Hello, there."\n1.wav,Plain text.\n2.wav,"Two\nlines"\n3.wav,"He said ""hi""."\n'


@pytest.mark.parametrize("delimiter", ["", ","])
def test_quoted_cells_are_parsed(tmp_path: Path, delimiter: str) -> None:
    (tmp_path / "list.csv").write_text(RFC4180)
    items = read_csv_corpus(tmp_path / "list.csv", delimiter).items
    assert [item.text for item in items] == ["Hello, there.", "Plain text.", "Two\nlines", 'He said "hi".']
    (tmp_path / "list.tsv").write_text('sentence\tpath\nSay "ah\ta.wav\nsay ah" now\tb.wav\n')
    assert [(item.id, item.text) for item in read_csv_corpus(tmp_path / "list.tsv").items] == [("a", 'Say "ah'), ("b", 'say ah" now')]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("audio_file|text|speaker_name|lang", "a.wav|Hello|anna|fr"),
        ("Language,Speaker ID,Transcript,Audio-Filepath", "fr,anna,Hello,a.wav"),
        ("client_id\tpath\tsentence\tlocale\tup_votes", "anna\ta.wav\tHello\tfr\t2"),
    ],
)
def test_columns_are_found_by_name_in_any_order(tmp_path: Path, header: str, row: str) -> None:
    (tmp_path / "list.csv").write_text(f"{header}\n{row}\n")
    [item] = read_csv_corpus(tmp_path / "list.csv").items
    assert (item.id, item.text, item.speaker, item.language) == ("a", "Hello", "anna", "fr")


@pytest.mark.parametrize(
    "content",
    [
        "0.wav|anna|Speaker in the middle column.\n1.wav|bert|Another one here.\n2.wav|bert|A third one here.\n",
        "0.wav|anna|en|Text in the fourth column.\n1.wav|bert|en|Another text here.\n",
        "0.wav|Left | right.\n1.wav|Plain.\n",
    ],
)
def test_a_table_in_doubt_is_refused_and_shown(tmp_path: Path, content: str) -> None:
    touch(tmp_path / "0.wav")
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(UserError, match=r"line 1: 1='0.wav', 2='.*set columns") as caught:
        read_csv_corpus(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "text,speaker\nHello there.,anna\nAnother one.,bert\n",
        "sentence\tspk\nHello there.\tanna\n",
        "text,notes\nHello there.,none\n",
        "text,clipping\nHello there.,0.wav\n",
        "speaker|language\nanna|en\n",
    ],
)
def test_a_header_without_a_column_of_recordings_is_refused_and_shown(tmp_path: Path, content: str) -> None:
    touch(tmp_path / "0.wav")
    (tmp_path / "list.csv").write_text(content)
    with pytest.raises(
        UserError, match=r"no audio column in .*: got the columns \w+, \w+ \(line 1: 1='.*; line 2: 1='.*name one of them audio"
    ) as caught:
        read_csv_corpus(tmp_path / "list.csv")
    assert "\n" not in str(caught.value)


def test_a_text_that_is_the_name_of_a_column_is_no_header(tmp_path: Path) -> None:
    for name in "01":
        touch(tmp_path / f"{name}.wav")
    (tmp_path / "list.csv").write_text("0|sentence\n1|words\n")
    assert [item.text for item in read_csv_corpus(tmp_path / "list.csv").items] == ["sentence", "words"]
    (tmp_path / "list.csv").write_text("gone|sentence\n1|words\n")
    assert [item.text for item in read_csv_corpus(tmp_path / "list.csv").items] == ["sentence", "words"]


def test_columns_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("0.wav|anna|en|Text in the fourth.\n1.wav|bert|en|Another | text.\n")
    source = read_csv_corpus(tmp_path / "list.csv", columns=["audio", "speaker", "-", "text"])
    assert [(item.text, item.speaker, item.language) for item in source.items] == [("Text in the fourth.", "anna", "")]
    assert reasons(source) == {"line-2": "bad entry"}
    with pytest.raises(UserError, match="expected each of audio, text"):
        read_csv_corpus(tmp_path / "list.csv", columns=["audio", "audio"])


def test_csv_with_header_finds_columns_by_name(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("Path;Speaker;Text;Language\nx.wav;ann;Hello;fr\ny.wav;;Bye\n")
    items = read_csv_corpus(tmp_path / "list.csv", delimiter=";", speaker="bob", language="en").items
    assert [(item.id, item.text, item.speaker, item.language) for item in items] == [("x", "Hello", "ann", "fr"), ("y", "Bye", "bob", "en")]


def test_a_column_without_a_name_says_nothing(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(",audio,text\n7,x.wav,Hello\n8,y.wav,Bye\n")  # as pandas writes its index
    (tmp_path / "list.jsonl").write_text('{"": 7, "audio": "x.wav", "text": "Hello"}\n{"": 8, "audio": "y.wav", "text": "Bye"}\n')
    for source in (read_csv_corpus(tmp_path / "list.csv"), read_jsonl_corpus(tmp_path / "list.jsonl")):
        found = [(item.id, item.speaker, item.language, item.split, item.start_s, item.duration_s) for item in source.items]
        assert found == [("x", "unknown", "", None, 0.0, None), ("y", "unknown", "", None, 0.0, None)]


def test_the_header_of_f5_is_known(tmp_path: Path) -> None:
    (tmp_path / "metadata.csv").write_text(f"audio_file|text\n{tmp_path}/a.wav|Hello\n")
    [item] = read_csv_corpus(tmp_path / "metadata.csv").items
    assert (item.audio, item.text) == (tmp_path / "a.wav", "Hello")


@pytest.mark.parametrize(("content", "message"), [("\n \n", "no lines"), ("audio|mood\na.wav|x\n", "no text column")])
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
        (lambda: read_embedded(tmp_path / "bare"), "no corpus in .*bare.*corpus"),
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


@pytest.mark.parametrize(
    "names",
    [
        ["\u0915\u093e", "\u0915\u093f", "\u0915\u0940", "\u0915\u0941"],
        ["pe\u0300che", "pe\u0301che\u0301", "pe\u0302che", "p\u00eache", "peche"],
        ["a b", "a_b", "a.b", "a/b", "a!", "a?", "a", "A"],
        ["1.5", "15", "1-5", "\u2467", "\U0001f600", "\U0001f601", "..."],
        ["x" * 200 + "1", "x" * 200 + "2"],
    ],
)
def test_different_names_are_different_items(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        touch(tmp_path / f"{name}.wav")
        (tmp_path / f"{name}.txt").write_text(f"text of {name}")
    source = read_folder(tmp_path)
    assert not source.rejected
    assert sorted(item.text for item in source.items) == sorted(f"text of {name}" for name in names)
    ids = [item.id for item in source.items]
    assert len({name.casefold() for name in ids}) == len(names)
    assert all(len(f"{name}.flac".encode()) < 255 and "/" not in name for name in ids)
    assert [item.id for item in read_folder(tmp_path).items] == ids


def test_a_name_that_is_not_utf8_is_a_rejected_item(tmp_path: Path) -> None:
    touch(tmp_path / "good.wav", tmp_path / "caf\udce9.wav")
    for name in ("good", "caf\udce9"):
        (tmp_path / f"{name}.txt").write_text("a text")
    source = read_folder(tmp_path)
    assert [item.id for item in source.items] == ["good"]
    assert [(one.reason, "caf\\udce9.wav" in one.detail) for one in source.rejected] == [("unreadable", True)]


def test_safe_id_keeps_letters_of_any_script() -> None:
    assert safe_id("digits/h 1.a") == "digits_h_1_a"
    assert safe_id("\u5b57/\u00e9-x") == "\u5b57_\u00e9-x"
    assert safe_id("///") == "_"


SWALLOWING = 'a.wav|"He opened the door and said,\nb.wav|I will come tomorrow.\nc.wav|And then he left."\nd.wav|Plain text here.\n'


@pytest.mark.parametrize(
    ("header", "delimiter", "order"),
    [("", "|", 1), ("audio|text\n", "|", 1), ("path\tsentence\n", "\t", 1), ("text\tpath\n", "\t", -1), ("audio;text\n", ";", 1)],
)
def test_a_quoted_cell_does_not_swallow_the_rows_after_it(tmp_path: Path, header: str, delimiter: str, order: int) -> None:
    rows = [delimiter.join(row.split("|")[::order]) for row in SWALLOWING.splitlines()]
    (tmp_path / "list.csv").write_text(header + "\n".join(rows) + "\n")
    source = read_csv_corpus(tmp_path / "list.csv")
    assert [item.id for item in source.items] == ["a", "b", "c", "d"]
    assert [item.text for item in source.items][:2] == ['"He opened the door and said,', "I will come tomorrow."]
    assert any(note.startswith("quotes") for note in source.notes)


def test_a_cell_that_may_hold_rows_is_refused_with_them(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text(SWALLOWING.replace("|", ","))
    with pytest.raises(UserError, match=r"line 1 to 3 .*b\.wav") as caught:
        read_csv_corpus(tmp_path / "list.csv")
    assert "double" in str(caught.value)


def test_a_text_of_several_lines_with_commas_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text('audio,text\na.wav,"One, two,\nand three, four."\nb.wav,Five\n')
    assert [item.text for item in read_csv_corpus(tmp_path / "list.csv").items] == ["One, two,\nand three, four.", "Five"]


def test_a_speaker_or_a_text_of_zero_is_one(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"audio": "a.wav", "text": 0, "speaker": 0}\n{"audio": "b.wav", "text": "x", "speaker": null}\n')
    items = read_jsonl_corpus(tmp_path / "list.jsonl", speaker="bob").items
    assert [(item.text, item.speaker) for item in items] == [("0", "0"), ("x", "bob")]
    touch(tmp_path / "emilia" / "a.mp3")
    (tmp_path / "emilia" / "a.json").write_text('{"text": "x", "speaker": 0}')
    assert [item.speaker for item in read_emilia(tmp_path / "emilia").items] == ["0"]


@pytest.mark.parametrize(
    ("name", "code"),
    [("English", "en"), ("eng", "en"), ("en-US", "en"), ("cmn_hans_cn", "zh"), ("German (Swiss)", "de"), ("deu", "de"), ("Korean", "ko")],
)
def test_languages_become_codes(tmp_path: Path, name: str, code: str) -> None:
    (tmp_path / "list.jsonl").write_text(f'{{"audio": "a.wav", "text": "x", "language": "{name}"}}\n{{"audio": "b.wav", "text": "y"}}\n')
    assert [item.language for item in read_jsonl_corpus(tmp_path / "list.jsonl", language=name).items] == [code, code]


def test_unknown_languages_are_noted_and_refused(tmp_path: Path) -> None:
    (tmp_path / "list.jsonl").write_text('{"audio": "a.wav", "text": "x", "language": "Klingon"}\n')
    source = read_jsonl_corpus(tmp_path / "list.jsonl")
    assert any("Klingon" in note for note in source.notes)
    with pytest.raises(UserError, match="Klingon"):
        READERS["jsonl"].read(tmp_path / "list.jsonl", language="Klingon")


def test_texts_with_suffixes_in_capitals_are_found(tmp_path: Path) -> None:
    touch(tmp_path / "a.wav", tmp_path / "B.WAV", tmp_path / "c.wav")
    for name, text in (("a.TXT", "one"), ("B.Lab", "two"), ("c.TXT", "not this"), ("c.txt", "three")):
        (tmp_path / name).write_text(text)
    assert [item.text for item in read_folder(tmp_path).items] == ["two", "one", "three"]


def test_a_text_beside_another_kind_of_file_names_it(tmp_path: Path) -> None:
    touch(tmp_path / "a.wav", tmp_path / "b.dss")
    (tmp_path / "b.txt").write_text("one")
    assert "'b.dss'" in read_folder(tmp_path).rejected[-1].detail


@pytest.mark.parametrize(("header", "there"), [("Clip name,Words", True), ("path,sentence", False)])
def test_a_header_beside_given_columns_is_skipped(tmp_path: Path, header: str, there: bool) -> None:
    (tmp_path / "list.csv").write_text(f"{header}\na.wav,One\nb.wav,Two\n")
    touch(*[tmp_path / name for name in ("a.wav", "b.wav") if there])
    source = read_csv_corpus(tmp_path / "list.csv", columns=("audio", "text"))
    assert [item.text for item in source.items] == ["One", "Two"]
    assert any("header" in note for note in source.notes)


def test_a_first_row_that_is_missing_is_no_header(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_text("gone.wav,One\nb.wav,Two\n")
    touch(tmp_path / "b.wav")
    assert len(read_csv_corpus(tmp_path / "list.csv", columns=("audio", "text")).items) == 2


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=; "])
def test_the_delimiter_that_excel_is_told_is_taken(tmp_path: Path, first: str) -> None:
    (tmp_path / "list.csv").write_text(f"{first}\naudio;text\na.wav;One, two\n;lost\n")
    source = read_csv_corpus(tmp_path / "list.csv")
    assert [item.text for item in source.items] == ["One, two"]
    assert [rejection.id for rejection in source.rejected] == ["line-4"]
    (tmp_path / "list.csv").write_text(f"{first}\n")
    with pytest.raises(UserError):
        read_csv_corpus(tmp_path / "list.csv")


def test_parts_are_told_apart_by_their_times(tmp_path: Path) -> None:
    own = [{"id": "rec"}] * 3 + [{}] * 2 + [{"id": "alone"}]
    starts = (0.5, 1.5, 1.5, 0.2, 0.2001, 3.0)
    rows = [
        {**given, "audio": "a.wav", "text": f"t{at}", "start": start, "duration": 1.0}
        for at, (given, start) in enumerate(zip(own, starts, strict=True))
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = read_jsonl_corpus(tmp_path / "list.jsonl")
    assert [item.text for item in source.items] == ["t0", "t1", "t3", "t4", "t5"]
    assert len({item.id for item in source.items}) == 5
    assert source.items[-1].id == "alone"
    assert reasons(source) == {"rec": "duplicate id"}


def test_one_array_of_objects_is_a_list(tmp_path: Path) -> None:
    rows = [{"audio": "a.wav", "text": "one"}, {"audio": "b.wav", "text": "two"}]
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1))
    assert [(item.id, item.text) for item in read_jsonl_corpus(tmp_path / "list.json").items] == [("a", "one"), ("b", "two")]
    (tmp_path / "one.json").write_text(json.dumps(rows[0], indent=1))
    with pytest.raises(UserError, match=r"write an object a line, or an array of objects"):
        read_jsonl_corpus(tmp_path / "one.json")


def test_what_is_no_text_is_not_read_out(tmp_path: Path) -> None:
    """NaN is how pandas writes that there is nothing; it was the word "nan"."""
    lines = [
        '{"audio": "a.wav", "text": NaN, "speaker": NaN, "id": "a"}',
        '{"audio": "a.wav", "text": true, "id": "b"}',
        '{"audio": "a.wav", "text": "words", "speaker": ["ann"], "id": "c"}',
        '{"audio": "a.wav", "text": "words", "id": {}}',
        '{"audio": "a.wav", "text": "words", "speaker": 7, "id": 5}',
    ]
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    source = read_jsonl_corpus(tmp_path / "list.jsonl", speaker="bob")
    assert [(item.id, item.text, item.speaker) for item in source.items] == [("a", "", "bob"), ("5", "words", "7")]
    assert set(reasons(source).values()) == {"bad entry"}
    assert len(source.rejected) == 3
    assert source.notes == {}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
def test_a_byte_order_mark_tells_the_encoding(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "list.csv").write_bytes("audio,text\r\na.wav,Grüße an 世界\r\n".encode(encoding))
    assert [item.text for item in read_csv_corpus(tmp_path / "list.csv").items] == ["Grüße an 世界"]


def test_a_workbook_is_named_as_one(tmp_path: Path) -> None:
    (tmp_path / "list.csv").write_bytes(b"PK\x03\x04" + bytes(range(256)))
    with pytest.raises(UserError, match=r"save it as CSV"):
        read_csv_corpus(tmp_path / "list.csv")
