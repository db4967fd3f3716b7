from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kalle import decoding
from kalle.audio import (
    WRITABLE,
    AudioError,
    audio_writer,
    clipped_share,
    from_pcm16,
    load_channels,
    load_mono,
    mix_down,
    read_audio,
    resample,
    rms_dbfs,
    to_pcm16,
    write_audio,
)
from kalle.errors import UserError


def tone(seconds: float = 0.5, rate_hz: int = 16000, frequency_hz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * frequency_hz * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def test_round_trip_is_exact_to_half_a_step(tmp_path: Path) -> None:
    audio = tone()
    write_audio(tmp_path / "deep" / "a.wav", audio, 16000)
    back = read_audio(tmp_path / "deep" / "a.wav")
    assert back.dtype == np.float32
    assert back.shape == audio.shape
    assert np.abs(back - audio).max() <= 1.1 / 32767
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["a.wav"]


def test_pcm16_rounds_to_nearest_and_clips() -> None:
    steps = to_pcm16(np.array([0.0, 0.6 / 32767, -0.6 / 32767, 0.4 / 32767, 1.0, -1.0, 1.5, -1.5]))
    assert steps.tolist() == [0, 1, -1, 0, 32767, -32767, 32767, -32768]


def test_stereo_is_averaged(tmp_path: Path) -> None:
    left, right = tone(), tone(frequency_hz=900.0)
    soundfile.write(tmp_path / "s.wav", np.stack([left, right], axis=1), 16000, subtype="FLOAT")
    np.testing.assert_allclose(read_audio(tmp_path / "s.wav"), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("rate_hz", [8000, 22050, 44100, 48000])
def test_other_rates_are_resampled_to_the_same_tone(tmp_path: Path, rate_hz: int) -> None:
    soundfile.write(tmp_path / "r.wav", tone(0.5, rate_hz), rate_hz, subtype="FLOAT")
    got = read_audio(tmp_path / "r.wav")
    expected = tone(0.5)
    assert abs(got.size - expected.size) <= 1
    inner = slice(800, 7200)
    np.testing.assert_allclose(got[inner], expected[inner], atol=5e-3)


def test_resampling_removes_what_would_alias() -> None:
    assert rms_dbfs(resample(tone(0.5, 48000, 12000.0), 48000, 16000)[800:7200]) < -60


@pytest.mark.parametrize(
    ("name", "make", "reason"),
    [
        ("gone.wav", lambda path: None, "missing"),
        ("folder.wav", lambda path: path.mkdir(), "missing"),
        ("zero-bytes.wav", lambda path: path.write_bytes(b""), "empty"),
        ("no-samples.wav", lambda path: soundfile.write(path, np.zeros(0, np.float32), 16000), "empty"),
        ("text.wav", lambda path: path.write_text("this is no audio\nat all"), "unreadable"),
        ("bytes.raw", lambda path: path.write_bytes(bytes(range(100))), "unreadable"),
        ("text.g722x", lambda path: path.write_text("this is no audio"), "unreadable"),
        ("nan.wav", lambda path: soundfile.write(path, np.array([0, np.nan, 0.1], np.float32), 16000, subtype="FLOAT"), "not finite"),
        ("inf.wav", lambda path: soundfile.write(path, np.array([0, np.inf, 0.1], np.float32), 16000, subtype="FLOAT"), "not finite"),
        ("one.wav", lambda path: soundfile.write(path, np.zeros(1, np.float32), 192000), "empty"),
    ],
)
def test_bad_input_is_one_line_that_names_the_file(tmp_path: Path, name: str, make, reason: str) -> None:
    make(tmp_path / name)
    with pytest.raises(AudioError) as caught:
        read_audio(tmp_path / name)
    assert caught.value.reason == reason
    assert isinstance(caught.value, UserError)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def sounds(path: Path, seconds: float, rate_hz: int = 8000, channels: int = 1) -> Path:
    soundfile.write(path, np.zeros((round(seconds * rate_hz), channels), np.float32), rate_hz)
    return path


def flac_of_unknown_length(path: Path, seconds: float) -> Path:
    """As an encoder writes it into a pipe: the count of the samples, 36 bits of the first block, is zero."""
    content = bytearray(sounds(path, seconds).read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg"])
def test_a_header_that_claims_too_much_is_refused_before_decoding(tmp_path: Path, suffix: str, monkeypatch) -> None:
    path = sounds(tmp_path / f"a{suffix}", 3.0)
    whole = load_channels(path)[0]
    assert np.array_equal(load_channels(path, whole.shape[1] / 8000)[0], whole)
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    monkeypatch.setattr(decoding._Decoder, "blocks", lambda *_: pytest.fail("it was decoded"))
    with pytest.raises(AudioError, match=rf"^too long: got 3\.\d\d s of audio in '.*a{suffix}', expected at most 2 s; record") as caught:
        load_channels(path, 2)
    assert caught.value.reason == "too long"


def test_a_length_that_the_header_does_not_know(tmp_path: Path, monkeypatch) -> None:
    assert soundfile.info(flac_of_unknown_length(tmp_path / "a.flac", 30.0)).frames > 2**60
    monkeypatch.setattr(decoding, "_BLOCK_VALUES", 8000)
    seen: list[int] = []
    real = decoding._sndfile_blocks
    monkeypatch.setattr(decoding, "_sndfile_blocks", lambda *given: (seen.append(len(block)) or block for block in real(*given)))
    with pytest.raises(AudioError, match=r"^too long: got more than 2 s of audio"):
        load_channels(tmp_path / "a.flac", 2)
    assert sum(seen) == 24000, "no more than a block beyond what is allowed"
    assert load_channels(tmp_path / "a.flac", 40)[0].shape == (1, 240000)


def test_a_headerless_file_that_is_too_long(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.g722").write_bytes(bytes(range(256)) * 250)
    assert load_channels(tmp_path / "a.g722", 8)[0].shape == (1, 128000)
    with pytest.raises(AudioError, match=r"^too long: got .* in '.*a\.g722', expected at most 2 s"):
        load_channels(tmp_path / "a.g722", 2)


def test_a_header_cannot_make_a_bounded_second_large(tmp_path: Path) -> None:
    path = sounds(tmp_path / "a.wav", 0.001, 192000, 8)
    assert load_channels(path)[0].shape == (8, 192)
    with pytest.raises(AudioError, match=r"^too many samples a second in '.*': got 8 channels at 192000 Hz, expected at most 384000"):
        load_channels(path, 60)
    with pytest.raises(AudioError, match=r"^too many channels in '.*': got 65, expected at most 64"):
        load_channels(sounds(tmp_path / "b.wav", 0.001, 8000, 65))


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3", ".ogg"])
def test_blocks_give_what_the_whole_gives(tmp_path: Path, suffix: str, monkeypatch) -> None:
    soundfile.write(tmp_path / f"a{suffix}", np.stack([tone(2.0, 44100), tone(2.0, 44100, 300.0)], axis=1), 44100)
    channels, rate_hz = load_channels(tmp_path / f"a{suffix}")
    monkeypatch.setattr(decoding, "_BLOCK_VALUES", 5000)
    assert np.array_equal(load_channels(tmp_path / f"a{suffix}")[0], channels)
    mono = load_mono(tmp_path / f"a{suffix}")[0]
    np.testing.assert_allclose(mono, mix_down(channels), atol=1e-6)
    np.testing.assert_allclose(read_audio(tmp_path / f"a{suffix}"), resample(mono, rate_hz, 16000), atol=1e-6)


def test_memory_is_that_of_the_result(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.zeros((48000 * 120, 2), np.int16), 48000)
    code = (
        "import resource, sys; from kalle.audio import read_audio\n"
        "read_audio(sys.argv[2], longest_seconds=200)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "size = read_audio(sys.argv[1]).nbytes\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / size)"
    )
    soundfile.write(tmp_path / "warm.flac", np.zeros((48000, 2), np.int16), 48000)
    command = [sys.executable, "-c", code, str(tmp_path / "a.flac"), str(tmp_path / "warm.flac")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4, "the whole of it, decoded, is six times as large for each channel"


@pytest.mark.parametrize("channel", [0, 2, 5])
def test_silent_channels_do_not_make_speech_quieter(tmp_path: Path, channel: int) -> None:
    six = np.random.default_rng(0).normal(0, 1e-4, (16000, 6)).astype(np.float32)
    six[:, channel] = tone(1.0)
    soundfile.write(tmp_path / "six.wav", six, 16000, subtype="FLOAT")
    assert rms_dbfs(read_audio(tmp_path / "six.wav")) == pytest.approx(rms_dbfs(tone(1.0)), abs=0.1)
    assert rms_dbfs(mix_down(six.T)) == pytest.approx(rms_dbfs(tone(1.0)), abs=0.1)
    assert not mix_down(np.zeros((3, 100), np.float32)).any()


def test_headerless_g722_is_read(tmp_path: Path) -> None:
    pytest.importorskip("av")
    (tmp_path / "a.g722").write_bytes(bytes(range(256)) * 10)
    # Two samples a byte is what G.722 at 64 kbit/s and 16 kHz means.
    assert read_audio(tmp_path / "a.g722").shape == (5120,)


@pytest.mark.parametrize("audio", [np.zeros(0), np.array([0.0, np.nan]), np.array([0.0, np.inf])])
def test_writing_nothing_or_nan_is_refused(tmp_path: Path, audio: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"out\.wav"):
        write_audio(tmp_path / "out.wav", audio, 16000)
    assert list(tmp_path.iterdir()) == []


def test_unknown_suffix_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'\.xyz'.*\.wav"):
        write_audio(tmp_path / "out.xyz", tone(), 16000)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (soundfile.LibsndfileError(2), "the disk did not take the whole file"),
        (AssertionError(), "the disk did not take the whole file"),
    ],
)
def test_full_disk_leaves_the_old_file_and_no_partial_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    write_audio(tmp_path / "out.wav", tone(), 16000)
    before = (tmp_path / "out.wav").read_bytes()

    def full(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"RIFF")
        raise error

    monkeypatch.setattr(soundfile, "write", full)
    with pytest.raises(UserError, match=rf"out\.wav.*{reason}"):
        write_audio(tmp_path / "out.wav", tone(0.2), 16000)
    assert [path.name for path in tmp_path.iterdir()] == ["out.wav"]
    assert (tmp_path / "out.wav").read_bytes() == before


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_silently_shortened_file_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    real = soundfile.write
    monkeypatch.setattr(soundfile, "write", lambda path, samples, *rest, **named: real(path, samples[:-100], *rest, **named))
    with pytest.raises(UserError, match="whole file"):
        write_audio(tmp_path / f"out{suffix}", tone(), 16000)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"RIFF")
        raise KeyboardInterrupt

    monkeypatch.setattr(soundfile, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_audio(tmp_path / "out.wav", tone(), 16000)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("x")
    with pytest.raises(UserError, match=r"cannot write '.*out\.wav'"):
        write_audio(tmp_path / "taken" / "out.wav", tone(), 16000)


def test_clipped_share_counts_runs_not_peaks() -> None:
    audio = np.zeros(1000, np.float32)
    audio[[3, 50, 51, 700]] = 1.0
    assert clipped_share(audio) == 0.0
    audio[100:110] = -1.0
    audio[990:] = 1.0
    assert clipped_share(audio) == pytest.approx(0.02)


def test_rms_dbfs() -> None:
    assert rms_dbfs(tone()) == pytest.approx(20 * np.log10(0.5 / np.sqrt(2)), abs=0.01)
    assert rms_dbfs(np.zeros(10, np.float32)) == float("-inf")


@pytest.mark.parametrize("suffix", [".wav", ".flac", ".mp3"])
def test_a_name_of_other_bytes_than_utf_8_is_a_name(tmp_path: Path, suffix: str) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    path = Path(os.fsdecode(os.fsencode(folder) + b"/\xff" + suffix.encode()))
    write_audio(path, 0.1 * np.sin(np.arange(4000) / 9), 16000)
    assert read_audio(path, 16000).size >= 4000
    with audio_writer(path, 16000) as append:
        append(np.zeros(8000, np.float32))
    assert read_audio(path, 16000).size >= 8000


@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_a_file_written_piece_by_piece_is_the_one_written_at_once(tmp_path: Path, suffix: str) -> None:
    audio = np.random.default_rng(0).uniform(-1, 1, 5000).astype(np.float32)
    write_audio(tmp_path / f"once{suffix}", audio, 16000)
    with audio_writer(tmp_path / "new" / f"pieces{suffix}", 16000) as append:
        for piece in np.split(audio, [0, 100, 4000]):
            append(piece)
        assert not (tmp_path / "new" / f"pieces{suffix}").exists()
    assert np.array_equal(read_audio(tmp_path / "new" / f"pieces{suffix}"), read_audio(tmp_path / f"once{suffix}"))


def test_an_interrupted_writer_leaves_nothing(tmp_path: Path, monkeypatch) -> None:
    with contextlib.suppress(KeyboardInterrupt), audio_writer(tmp_path / "a.wav", 16000) as append:
        append(np.zeros(100))
        raise KeyboardInterrupt
    with pytest.raises(UserError, match=r"expected \.wav, \.flac, \.mp3"), audio_writer(tmp_path / "a.m4a", 16000):
        pass
    monkeypatch.setattr("kalle.audio.LONGEST_WAV_BYTES", 300)
    with pytest.raises(UserError, match="too long for a WAV"), audio_writer(tmp_path / "a.wav", 16000) as append:
        append(np.zeros(151))
    assert list(tmp_path.iterdir()) == []


def test_samples_survive_the_way_to_sixteen_bits_and_back() -> None:
    every = np.arange(-32767, 32768).astype(np.int16)
    assert np.array_equal(to_pcm16(from_pcm16(every)), every)


@pytest.mark.parametrize(("from_hz", "to_hz"), [(0, 16000), (-8000, 16000), (16000, 0), (0, 0)])
def test_a_rate_that_is_none_is_refused(from_hz: int, to_hz: int) -> None:
    with pytest.raises(UserError, match=r"bad sample rate: got (0|-8000) Hz, expected more than 0"):
        resample(np.zeros(10, dtype=np.float32), from_hz, to_hz)


@pytest.mark.parametrize("suffix", list(WRITABLE))
def test_every_format_is_written_whole_and_read_again(tmp_path: Path, suffix: str) -> None:
    said = 0.3 * np.sin(np.arange(12345) / 9)
    write_audio(tmp_path / f"a{suffix}", said, 16000)
    samples, rate = load_channels(tmp_path / f"a{suffix}")
    assert samples.shape == (1, 12345) if suffix != ".opus" else samples.shape[1] * 16000 == pytest.approx(12345 * rate, rel=1e-3)
    with audio_writer(tmp_path / f"b{suffix}", 16000) as append:
        for start in range(0, 12345, 5000):
            append(said[start : start + 5000])
    assert load_channels(tmp_path / f"b{suffix}")[0].shape == samples.shape
