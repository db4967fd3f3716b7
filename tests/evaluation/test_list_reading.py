from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from lhotse import CutSet, Recording, SupervisionSegment
from lhotse.cut import MonoCut

from kalle.audio import read_audio, write_audio
from kalle.errors import UserError
from kalle.evaluation.test_list import count_words, language_code, read_test_list


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


def test_seed_tts_in_zh_is_chinese_and_a_sixth_field_an_error(tmp_path: Path) -> None:
    assert read_test_list(write_lines(tmp_path / "zh" / "meta.lst", "a|你好世界"), min_words=4).items[0].language == "zh"
    with pytest.raises(UserError, match=r"line 2 .* got 6 fields"):
        read_test_list(write_lines(tmp_path / "bad.lst", "a|b", "a|b|c|d|e|f"))


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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.jsonl", None, "test list not found"),
        ("list.txt", "a b c d", "unknown test list"),
        ("list.jsonl", "{not json}", "line 1 .* not JSON"),
        ("list.jsonl", '{"audio": "x.wav"}', "expected an object with a text"),
        ("list.jsonl", '{"text": "one"}', "empty test list"),
        ("list.jsonl", '{"id": "a/b", "text": "a b c d"}\n{"id": "a_b", "text": "a b c d"}', "repeated ids"),
        ("cuts.jsonl.gz", "not gzip", "not a readable file of lhotse cuts"),
    ],
)
def test_bad_lists_are_one_line_errors(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        write_lines(tmp_path / name, content)
    with pytest.raises(UserError, match=words) as raised:
        read_test_list(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_words_and_languages() -> None:
    assert count_words("Don't stop -- it's 5 o’clock!") == 5
    assert count_words("你好 OK 世界。") == 5
    assert count_words("...") == 0
    assert [language_code(name) for name in (None, "English", "en-US", "zh", "Chinese", "pt_BR")] == ["en", "en", "en", "zh", "zh", "pt"]
