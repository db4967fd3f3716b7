"""Which file of anybody's folder belongs to which line of a list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kalle.audio import write_audio
from kalle.errors import UserError
from kalle.evaluation import Settings, evaluate_wavs
from kalle.evaluation.metrics import DurationRatio
from kalle.evaluation.protocols import WavFolder, read_wav
from kalle.evaluation.test_list import TestItem


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


@pytest.mark.parametrize(
    ("identifier", "files", "found"),
    [
        ("a", ["a.wav"], "a.wav"),
        ("a", ["a.mp3"], "a.mp3"),
        ("a", ["a.FLAC"], "a.FLAC"),
        ("a", ["a.mp3", "a.wav"], "a.wav"),
        ("a.wav", ["a.flac"], "a.flac"),
        ("a.b", ["a.b.wav", "a.wav"], "a.b.wav"),
        ("s/1", ["s/1.wav", "1.wav"], "s/1.wav"),
        ("s/1", ["s_1.wav"], "s_1.wav"),
        ("s/1.flac", ["deep/er/1.wav"], "deep/er/1.wav"),
        ("wavs/1.wav", ["1.ogg"], "1.ogg"),
        ("1", ["deep/1.wav"], "deep/1.wav"),
        ("1", ["2.wav", "1.txt"], None),
    ],
)
def test_the_file_of_an_id(identifier: str, files: list[str], found: str | None, tmp_path: Path) -> None:
    touch(tmp_path, *files)
    item = TestItem(identifier, "text")
    path = WavFolder(tmp_path, [item]).found(item)
    assert (None if path is None else path.relative_to(tmp_path).as_posix()) == found


def test_two_files_of_one_name_are_not_guessed_between(tmp_path: Path) -> None:
    touch(tmp_path, "one/a.wav", "two/a.wav")
    items = [TestItem("a", "text"), TestItem("two/a", "text")]
    with pytest.raises(UserError, match=r"one/a\.wav.*two/a\.wav"):
        WavFolder(tmp_path, items[:1]).found(items[0])
    with pytest.raises(UserError, match=r"one/a\.wav.*two/a\.wav"):
        WavFolder(tmp_path, items[:1]).check()
    (tmp_path / "b.wav").touch()
    WavFolder(tmp_path, [items[0], TestItem("b", "text")]).check()
    files = WavFolder(tmp_path, items)
    assert files.found(items[1]) == tmp_path / "two" / "a.wav"
    assert files.found(items[0]) is None, "another item has this name, too"


def test_missing_files_are_counted_and_others_noted(tmp_path: Path) -> None:
    folder = tmp_path / "wavs"
    for name in ("a", "nobody"):
        write_audio(folder / f"{name}.wav", np.full(8000, 0.1, np.float32), 16000)
    recording = tmp_path / "r.wav"
    write_audio(recording, np.full(8000, 0.1, np.float32), 16000)
    items = [TestItem(name, "text", recording) for name in ("a", "b")]
    result = evaluate_wavs(folder, items, [DurationRatio()], tmp_path / "out", settings=Settings(resamples=10, figure_items=0))
    assert result.counts["wavs"]["errors"] == 1
    assert "b.wav" in next(row["error"] for row in result.rows if "error" in row)
    assert any(note.startswith("1 audio files") for note in result.notes)


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_every_format_is_read_with_its_rate(suffix: str, tmp_path: Path) -> None:
    t = np.arange(24000) / 24000
    write_audio(tmp_path / f"a.{suffix}", (0.5 * np.sin(2 * np.pi * 440 * t)).astype(np.float32), 24000)
    for fft in (False, True):
        audio, rate_hz = read_wav(tmp_path / f"a.{suffix}", fft)
        assert rate_hz == 24000
        assert abs(len(audio) - 16000) < 1600
        assert np.abs(np.fft.rfft(audio[:16000])).argmax() == pytest.approx(440, abs=2)
