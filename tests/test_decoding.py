"""Files that are decoded in a process of their own, and headers that were never finished. All input here is harmless."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import struct
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kalle import decoding
from kalle.audio import AudioError, load_channels, read_audio


def tone(seconds: float = 0.5, rate_hz: int = 16000) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(seconds * rate_hz)) / rate_hz)).astype(np.float32)


@pytest.fixture
def ogg(tmp_path: Path) -> Path:
    soundfile.write(tmp_path / "a.ogg", tone(), 16000)
    return tmp_path / "a.ogg"


@pytest.fixture(autouse=True)
def fresh_decoder():
    decoding._decoder.stop()
    yield
    decoding._decoder.stop()


def pid() -> int:
    process = decoding._decoder._process
    assert process is not None
    return process.pid


def test_one_process_decodes_many_files_and_names_what_it_cannot_read(ogg: Path, tmp_path: Path) -> None:
    first = read_audio(ogg)
    np.testing.assert_allclose(first[1000:7000], tone()[1000:7000], atol=0.05)
    started = pid()
    (tmp_path / "b.mp3").write_bytes(b"this is no audio at all")
    for _ in range(2):
        with pytest.raises(AudioError, match=r"unreadable audio: '.*b\.mp3' \(.*expected WAV, FLAC, Ogg") as caught:
            read_audio(tmp_path / "b.mp3")
        assert caught.value.reason == "unreadable"
    assert np.array_equal(read_audio(ogg), first)
    assert pid() == started


def test_plain_files_need_no_other_process(tmp_path: Path) -> None:
    for suffix in (".wav", ".flac", ".aiff"):
        soundfile.write(tmp_path / f"a{suffix}", tone(), 16000)
        read_audio(tmp_path / f"a{suffix}")
    assert decoding._decoder._process is None


@pytest.mark.parametrize("when", ["at the header", "within the samples"])
def test_a_decoder_that_dies_costs_the_file_and_no_more(ogg: Path, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    read_audio(ogg)
    name = "ask" if when == "at the header" else "blocks"
    real = getattr(decoding._Decoder, name)

    def dying(decoder: decoding._Decoder, *arguments: object) -> object:
        os.kill(pid(), signal.SIGSEGV)
        time.sleep(0.2)
        return real(decoder, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(decoding._Decoder, name, dying)
        if when == "at the header":
            patch.setattr(decoding._Decoder, "_running", lambda decoder: decoder._process)
        with pytest.raises(AudioError, match=r"a\.ogg' \(the decoder crashed: SIGSEGV\)") as caught:
            # More than fits into the pipe, so that a part of it is missing.
            read_audio(ogg if when == "at the header" else _long(ogg))
        assert caught.value.reason == "unreadable"
    assert len(read_audio(ogg)) == (8000 if when == "at the header" else 320000), "the next file has a new process"


def _long(ogg: Path) -> Path:
    soundfile.write(ogg, tone(20.0), 16000)
    return ogg


def test_a_decoder_that_hangs_is_ended(ogg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read_audio(ogg)
    os.kill(pid(), signal.SIGSTOP)
    monkeypatch.setattr(decoding, "DECODER_SECONDS", 0.2)
    with pytest.raises(AudioError, match="the decoder does not answer"):
        read_audio(ogg)
    monkeypatch.undo()
    assert len(read_audio(ogg)) == 8000


def test_its_memory_is_bounded(ogg: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Path("/proc") / "self" / "limits"
    if not limits.exists():
        pytest.skip("no /proc here")
    read_audio(ogg)
    line = next(line for line in Path(f"/proc/{pid()}/limits").read_text().splitlines() if line.startswith("Max address space"))
    assert decoding.DECODER_MEMORY_BYTES < int(line.split()[3]) < decoding.DECODER_MEMORY_BYTES + 8 * 2**30


def test_forked_processes_and_threads_have_their_turn(ogg: Path) -> None:
    whole = read_audio(ogg)
    results: list[bool] = []
    threads = [threading.Thread(target=lambda: results.append(np.array_equal(read_audio(ogg), whole))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert [len(audio) for audio in pool.map(read_audio, [ogg] * 4)] == [len(whole)] * 4
    assert np.array_equal(read_audio(ogg), whole)


@pytest.mark.parametrize("channels", [1, 9, 40])
def test_pyav_decodes_many_channels_in_packed_frames(tmp_path: Path, channels: int) -> None:
    pytest.importorskip("av")
    samples = np.random.default_rng(0).normal(0, 0.1, (1600, channels)).astype(np.float32)
    soundfile.write(tmp_path / "a.wav", samples, 16000, subtype="FLOAT")
    with contextlib.ExitStack() as stack:
        decoded = decoding._from_av(tmp_path / "a.wav", stack)
        assert decoded is not None
        assert (decoded.channels, decoded.rate_hz, decoded.seconds) == (channels, 16000, pytest.approx(0.1))
        np.testing.assert_array_equal(np.concatenate(list(decoded.blocks)), samples)


def test_an_ogg_opus_file_is_read_from_its_first_sample(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.opus", tone(1.0, 48000), 48000, format="OGG", subtype="OPUS")
    got = load_channels(tmp_path / "a.opus")[0][0]
    assert len(got) == 48000
    np.testing.assert_allclose(got[2400:40000], tone(1.0, 48000)[2400:40000], atol=0.05)


def unfinished(path: Path, subtype: str = "PCM_16", riff: int | None = 0) -> Path:
    """A WAV file whose data chunk claims no samples, as a recorder leaves it that was stopped."""
    soundfile.write(path, tone(), 16000, subtype=subtype)
    content = bytearray(path.read_bytes())
    place = content.index(b"data") + 4
    content[place : place + 4] = bytes(4)
    if riff is not None:
        content[4:8] = struct.pack("<I", riff)
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("riff", [0, 36, None])
def test_a_header_that_was_never_finished_is_read_to_the_end(
    tmp_path: Path, subtype: str, riff: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    got = read_audio(unfinished(tmp_path / "a.wav", subtype, riff))
    np.testing.assert_allclose(got, tone(), atol=0.01)
    assert "a.wav': its header was never finished, read to the end of the file (0.50 s)" in caplog.text


def test_an_empty_recording_with_notes_behind_it_is_empty(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), 16000)
    with (tmp_path / "a.wav").open("ab") as file:
        file.write(b"LIST" + struct.pack("<I", 8) + b"INFOxxxx")
    with pytest.raises(AudioError, match="no audio in"):
        read_audio(tmp_path / "a.wav")


def test_a_file_that_breaks_off_is_unreadable_or_read_so_far(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.flac", np.random.default_rng(0).normal(0, 0.1, 160000), 16000)
    content = (tmp_path / "a.flac").read_bytes()
    for share in (0.1, 0.5, 0.9):
        (tmp_path / "b.flac").write_bytes(content[: int(share * len(content))])
        with contextlib.suppress(AudioError):
            assert len(read_audio(tmp_path / "b.flac")) <= 160000


@pytest.mark.parametrize("name", ["é" * 300 + ".wav", "a\0b.wav"])
def test_a_name_that_no_file_can_have_is_missing(tmp_path: Path, name: str) -> None:
    with pytest.raises(AudioError, match="audio file not found") as caught, decoding.open_audio(tmp_path / name, None):
        pytest.fail("there is nothing to read")
    assert caught.value.reason == "missing"
