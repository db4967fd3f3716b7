from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings, strategies
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut

from kalle.audio import read_audio, write_audio
from kalle.errors import UserError
from kalle.evaluation.test_list import TestListConfig, count_words, read_test_list


def noise(seconds: float, seed: int = 0) -> np.ndarray:
    return (0.1 * np.random.default_rng(seed).standard_normal(int(16000 * seconds))).astype(np.float32)


def write_lines(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_seed_tts_lines_of_two_to_five_fields(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "en" / "meta.lst",
        "u2|say this now please",
        "u3.wav|say this|prompts/a.wav",
        "u4|prompt words|prompts/a.wav|infer words",
        "u5|prompt words|prompts/a.wav|infer words|wavs/u5.wav",
    )
    two, three, four, five = read_test_list(path, min_words=0).items
    assert (two.text, two.prompt_path, two.audio_path) == ("say this now please", None, None)
    assert (three.text, three.prompt_path, three.file_stem) == ("say this", tmp_path / "en/prompts/a.wav", "u3")
    assert (four.text, four.prompt_text, four.audio_path) == ("infer words", "prompt words", None)
    assert (five.text, five.prompt_text, five.audio_path) == ("infer words", "prompt words", tmp_path / "en/wavs/u5.wav")
    assert {item.language for item in (two, three, four, five)} == {"en"}


def test_a_sixth_field_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 2 .* got 6 fields"):
        read_test_list(write_lines(tmp_path / "bad.lst", "a|b", "a|b|c|d|e|f"))


@pytest.mark.parametrize("folder", ["zh", "chinese", "en"])
def test_the_language_is_stated_and_never_guessed_from_a_folder(tmp_path: Path, folder: str) -> None:
    path = write_lines(tmp_path / folder / "meta.lst", "a|今天天气很好我们去公园吧")
    with pytest.raises(UserError, match=r"language not stated: 1 texts .* set testset.language=zh"):
        read_test_list(path)
    (item,) = read_test_list(TestListConfig(path, language="Chinese")).items
    assert item.language == "zh"
    stated = write_lines(tmp_path / folder / "list.jsonl", json.dumps({"text": "今天天气很好", "language": "zh"}))
    assert read_test_list(TestListConfig(stated, language="en")).items[0].language == "zh"
    latin = write_lines(tmp_path / folder / "latin.lst", "a|Café au lait, s'il vous plaît")
    assert [read_test_list(TestListConfig(latin, language=given)).items[0].language for given in (None, "fr")] == ["en", "fr"]


def test_only_line_feeds_end_a_line(tmp_path: Path) -> None:
    text = "Please check\u2028the number\x85and dial\x0bagain."
    path = tmp_path / "list.jsonl"
    path.write_bytes(json.dumps({"id": "a", "text": text}, ensure_ascii=False).encode() + b"\r\n\n")
    assert [item.text for item in read_test_list(path).items] == [text]
    path = tmp_path / "list.lst"
    path.write_bytes(f"a|{text}\r\nb|one two three four\n".encode())
    assert [(item.id, item.text) for item in read_test_list(path).items] == [("a", text), ("b", "one two three four")]
    path.write_bytes(b"a|one\rtwo three four\nb|five six seven eight\r\n")
    assert [item.text for item in read_test_list(path).items] == ["one two three four", "five six seven eight"]
    path = tmp_path / "raw.jsonl"
    path.write_bytes(b'{"id": "a", "text": "one\ttwo\x0bthree four"}\n')
    assert [item.text for item in read_test_list(path).items] == ["one\ttwo\x0bthree four"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"text": 5}', "expected an object with a text"),
        ('{"text": "a b c d", "audio": 5}', "audio: got 5, expected a string"),
        ('{"text": "a b c d", "speaker": ["x"]}', "speaker: got"),
        ('{"text": "a b c d", "prompt_text": {}}', "prompt_text: got"),
        ('{"text": "a b c d", "id": true}', "id: got True"),
        ('{"text": "a b c d", "id": "x\\u0000y"}', "with a NUL"),
        ('{"text": "a b \\ud800 c d"}', "half of a character"),
        ('{"text": "a b c d", "audio": "x\\u0000.wav"}', "audio: got .* with a NUL"),
        ('{"text": "a b c d", "duration": NaN}', "duration: got nan, expected seconds"),
        ('{"text": "a b c d", "duration": 1e999}', "duration: got inf"),
        ('{"text": "a b c d", "duration": "long"}', "duration: got 'long'"),
        ('{"text": "a b c d", "duration": ' + "9" * 5000 + "}", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ('{"text": "a b c d", "id": "' + "x" * 300 + '"}', "at most 200 for a file name"),
    ],
)
def test_a_field_of_another_kind_is_one_line_that_names_it(tmp_path: Path, row: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as raised:
        read_test_list(write_lines(tmp_path / "list.jsonl", '{"text": "one two three four"}', row))
    assert "line 2 of" in str(raised.value)
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", ["command", "url", "memory"])
def test_a_recording_that_is_no_file_is_never_opened(tmp_path: Path, kind: str) -> None:
    write_audio(tmp_path / "a.wav", noise(1.0), 16000)
    recording = Recording.from_file(tmp_path / "a.wav", recording_id="r")
    recording.sources[0].type = kind
    recording.sources[0].source = f"touch {tmp_path / 'ran'}"
    words = SupervisionSegment("a", "r", 0, 0.5, text="one two three four")
    CutSet.from_cuts([MonoCut("a", 0.2, 0.5, 0, recording=recording, supervisions=[words])]).to_file(tmp_path / "cuts_test.jsonl.gz")
    with pytest.raises(UserError, match=f"a recording of type '{kind}', expected an audio file"):
        read_test_list(tmp_path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@settings(max_examples=20_000, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    content=strategies.one_of(
        strategies.binary(max_size=200),
        strategies.recursive(
            strategies.none() | strategies.booleans() | strategies.floats() | strategies.integers() | strategies.text(max_size=20),
            lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(max_size=9), inner, max_size=3),
            max_leaves=6,
        ).map(lambda value: json.dumps(value).encode()),
        strategies.dictionaries(
            strategies.sampled_from(["id", "text", "audio", "duration", "language", "speaker", "prompt_text", "prompt_audio", "split"]),
            strategies.none() | strategies.text(max_size=30) | strategies.floats() | strategies.integers() | strategies.just({}),
        ).map(lambda value: json.dumps({"text": "one two three four", **value}).encode()),
        strategies.lists(strategies.text(max_size=12), max_size=7).map(lambda fields: "|".join(fields).encode(errors="surrogatepass")),
    ),
    suffix=strategies.sampled_from([".jsonl", ".lst"]),
)
def test_no_content_of_a_list_is_more_than_one_line(tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str) -> None:
    path = tmp_path_factory.getbasetemp() / f"fuzzed{suffix}"
    path.write_bytes(content)
    items, message = [], ""
    try:
        items = read_test_list(TestListConfig(path, min_words=0)).items
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    for item in items:
        json.dumps([item.id, item.text, item.duration_s], allow_nan=False).encode()
        assert item.audio_path is None or not item.audio_path.is_file()


def test_missing_wavs_stay_in_the_list_and_fail_when_read(tmp_path: Path) -> None:
    item = read_test_list(write_lines(tmp_path / "meta.lst", "u|p|gone.wav|one two three four|gone_too.wav")).items[0]
    with pytest.raises(UserError, match=r"gone\.wav"):
        item.prompt_audio()
    with pytest.raises(UserError, match=r"gone_too\.wav"):
        item.audio()


def test_jsonl_and_what_is_left_out_is_counted(tmp_path: Path) -> None:
    rows = [
        {"id": "a", "text": "one two three four", "audio": "a.wav", "speaker": "s", "language": "English", "split": "test", "more": 1},
        {"text": "five six seven eight", "audio": "sub/b.wav"},
        {"id": "short", "text": "too short"},
        {"id": "train", "text": "one two three four", "split": "train"},
        {"id": "last", "text": "nine ten eleven twelve", "prompt_text": "p", "prompt_audio": "p.wav"},
    ]
    path = write_lines(tmp_path / "list.jsonl", *map(json.dumps, rows))
    found = read_test_list(path, limit=2)
    assert [(item.id, item.audio_path, item.language) for item in found.items] == [
        ("a", tmp_path / "a.wav", "en"),
        ("b", tmp_path / "sub/b.wav", "en"),
    ]
    assert found.left_out == {"of another split": 1, "fewer than 4 words": 1, "beyond the limit": 1}
    last = read_test_list(path).items[-1]
    assert (last.prompt_text, last.prompt_path) == ("p", tmp_path / "p.wav")


def test_cuts_relative_absolute_and_part_of_a_file(tmp_path: Path) -> None:
    audio = noise(3.0)
    write_audio(tmp_path / "audio" / "a.wav", audio, 16000)
    whole = Recording.from_file(tmp_path / "audio" / "a.wav", recording_id="r")
    relative = Recording.from_dict(whole.to_dict())
    relative.sources[0].source = "audio/a.wav"
    cuts = []
    for name, recording, start, duration in (("abs", whole, 0, 3.0), ("rel", relative, 0, 3.0), ("part", relative, 1.0, 0.5)):
        words = SupervisionSegment(name, "r", 0, duration, text="one two three four", speaker="s", language="English")
        cuts.append(MonoCut(name, start=start, duration=duration, channel=0, recording=recording, supervisions=[words]))
    CutSet.from_cuts(cuts).to_file(tmp_path / "cuts_test.jsonl.gz")
    absolute, beside, part = read_test_list(tmp_path).items
    stored = read_audio(tmp_path / "audio" / "a.wav")
    for item in (absolute, beside):
        np.testing.assert_array_equal(item.audio(), stored)
        assert (item.duration_s, item.language, item.speaker) == (3.0, "en", "s")
    np.testing.assert_allclose(part.audio(), stored[16000:24000], atol=1e-6)
    assert part.audio(8000).shape == (4000,)
    assert [item.recording(8000)[1] for item in (absolute, part)] == [16000, 16000], "the rate of the file"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "test list not found"),
        ("list.txt", "a b c d", "unknown test list"),
        ("list.jsonl", "{not json}", "line 1 .* not JSON"),
        ("list.jsonl", '{"audio": "x.wav"}', "expected an object with a text"),
        ("list.jsonl", '{"text": "one"}', "empty test list"),
        ("list.jsonl", '{"id": "a/b", "text": "a b c d"}\n{"id": "a_b", "text": "a b c d"}', "repeated ids"),
        ("cuts.jsonl.gz", "not gzip", "Not a gzipped file"),
    ],
)
def test_bad_lists_are_one_line_errors(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        write_lines(tmp_path / name, content)
    with pytest.raises(UserError, match=words) as raised:
        read_test_list(tmp_path / name)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(("name", "code"), [("English", "en"), ("eng", "en"), ("pt_BR", "pt"), ("zh-HK", "yue"), ("Klingon", "Klingon")])
def test_languages_become_the_codes_that_a_corpus_has(tmp_path: Path, name: str, code: str) -> None:
    path = write_lines(tmp_path / "a.jsonl", json.dumps({"text": "one two three four", "language": name}))
    assert [item.language for item in read_test_list(path).items] == [code]


def test_the_names_of_other_tools_are_known(tmp_path: Path) -> None:
    """A recording under a name that was not read was a text without one."""
    row = {"audio_filepath": "a/x.wav", "sentence": "one two three four", "spk": "ann", "locale": "de-DE", "subset": "Test"}
    [item] = read_test_list(write_lines(tmp_path / "a.jsonl", json.dumps(row))).items
    assert (item.id, item.audio_path, item.text, item.speaker, item.language) == ("x", tmp_path / "a/x.wav", row["sentence"], "ann", "de")
    with pytest.raises(UserError, match=r"1 of another split.*set their split to test"):
        read_test_list(write_lines(tmp_path / "b.jsonl", json.dumps({**row, "subset": "dev"})))


def test_words_are_runs_of_letters_and_single_ideographs() -> None:
    assert count_words("Don't stop -- it's 5 o’clock!") == 5
    assert count_words("你好 OK 世界。") == 5
    assert count_words("...") == 0


def test_a_recording_of_hours_is_refused_by_its_header(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "long.flac", np.zeros(3601 * 1000, np.int16), 1000)
    (tmp_path / "list.jsonl").write_text(json.dumps({"audio": "long.flac", "text": "four words are here"}) + "\n")
    [item] = read_test_list(tmp_path / "list.jsonl").items
    with pytest.raises(UserError, match="too long"):
        item.audio()


def test_marks_of_quotation_in_a_seed_tts_list_are_text(tmp_path: Path) -> None:
    (tmp_path / "meta.lst").write_text('a|"He said|a.wav|so" and left\nb|\\ "|b.wav|"whole"\n')
    items = read_test_list(tmp_path / "meta.lst", min_words=0).items
    assert [(item.prompt_text, item.text) for item in items] == [('"He said', 'so" and left'), ('\\ "', '"whole"')]
    (tmp_path / "meta.lst").write_text("a|" + "x" * 200_000 + "\n")
    with pytest.raises(UserError, match="line 1 of"):
        read_test_list(tmp_path / "meta.lst", min_words=0)
