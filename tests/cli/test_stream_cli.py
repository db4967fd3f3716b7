from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from kalle.checkpoint import read_json, write_json
from kalle.cli.audio_output import GrowingWav, Pipe, Sinks, wav_header
from kalle.cli.main import main
from kalle.errors import UserError
from kalle.models.lm import KalleLM
from kalle.synthesis.kalle import Kalle

RATE = 16000
COMMON = ("--seed", "4", "--max-seconds", "0.4", "--device", "cpu")
SLOW = """
import sys, time
import torch
from kalle.cli.main import main
from kalle.models.lm import KalleLM
torch.set_num_threads(1)
step = KalleLM.step
def slow(self, *arguments):
    time.sleep(0.02)
    return step(self, *arguments)
KalleLM.step = slow
sys.exit(main(sys.argv[1:]))
"""
"""A model that takes its time, so that a test can interrupt it."""


@pytest.fixture(scope="module")
def model(toy_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy weights, which never end the speech by themselves."""
    folder = tmp_path_factory.mktemp("stream") / "model"
    for path in toy_weights.rglob("*.*"):
        link = folder / path.relative_to(toy_weights)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path)
    config = read_json(folder / "config.json")
    (folder / "config.json").unlink()
    write_json(folder / "config.json", config | {"stop": {"threshold": 0.0}})
    return folder


@pytest.fixture(scope="module")
def offline(model: Path) -> np.ndarray:
    """What `kalle say` would write for the same request, as int16."""
    return Kalle.from_pretrained(model, "cpu").synthesize("Hello.", seed=4, max_seconds=0.4, retries=0).pcm16()


def stream(model: Path, *arguments: object) -> int:
    return main(["stream", "Hello.", *map(str, arguments), "--model", str(model), *COMMON])


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal up to the rounding of the streaming decoder, 1e-4 of full scale."""
    return len(one) == len(other) and int(np.abs(one.astype(int) - other.astype(int)).max(initial=0)) <= 4


def test_a_stream_is_what_say_writes(model: Path, tmp_path: Path, offline: np.ndarray, capsys) -> None:
    out = tmp_path / "new" / "out.wav"
    assert stream(model, "-o", out) == 0
    samples, rate = soundfile.read(out, dtype="int16")
    assert rate == RATE
    assert near(samples, offline)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.search(r"first audio after [\d.]+ s \(latency \d+ frames\)", captured.err)
    assert f"wrote {out}" in captured.err
    assert "seed: 4" in captured.err
    assert "stop reason: " in captured.err
    spent, audio, rtf = map(float, re.search(r"RTF = synthesis / audio = ([\d.]+) s / ([\d.]+) s = ([\d.]+)", captured.err).groups())
    assert audio == round(len(offline) / RATE, 2)
    assert rtf == pytest.approx(spent / audio, abs=0.05)


@pytest.mark.parametrize(("chunk", "latency"), [(1, 9), (3, 5), (100, 9)])
def test_chunks_and_latency_change_nothing(model: Path, tmp_path: Path, offline: np.ndarray, chunk: int, latency: int) -> None:
    assert stream(model, "-o", tmp_path / "a.wav", "--chunk", chunk, "--latency", latency) == 0
    assert near(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], offline)


@pytest.mark.parametrize("kind", ["wav", "raw"])
def test_standard_output(model: Path, offline: np.ndarray, capfdbinary, kind: str) -> None:
    assert stream(model, "-o", "-", "--format", kind) == 0
    out = capfdbinary.readouterr().out
    if kind == "wav":
        assert out[:44] == wav_header(RATE, None)
        assert near(soundfile.read(io.BytesIO(out), dtype="int16")[0], offline)
        out = out[44:]
    assert near(np.frombuffer(out, dtype="<i2"), offline)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nowhere to speak to"),
        (["-o", "a.flac"], "cannot stream into 'a.flac': expected a .wav file or -"),
        (["-o", "a.wav", "--chunk", "0"], "bad --chunk: got 0"),
        (["-o", "a.wav", "--latency", "-1"], "latency"),
        (["-o", "a.wav", "--voice", "nobody"], "voice file not found"),
        (["-o", "a.wav", "--prompt-text", "x"], "a transcript without its recording"),
        (["-o", "a.wav", "--temperature", "nan"], "bad temperature: got nan"),
        (["-o", "a.wav", "--format", "mp3"], "mp3"),
    ],
)
def test_mistakes(model: Path, tmp_path: Path, monkeypatch, capsys, arguments: list[str], message: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert stream(model, *arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line
    assert not list(tmp_path.iterdir())


def test_an_interrupt_inside_a_write_keeps_a_valid_file(model: Path, tmp_path: Path, offline: np.ndarray, capsys, monkeypatch) -> None:
    pieces = []
    put = GrowingWav._put

    def interrupted(self, file, content) -> None:
        if len(content) != 44:
            pieces.append(content)
        if len(pieces) == 3 and len(content) != 44:
            file.write(content[:101])
            raise KeyboardInterrupt
        put(self, file, content)

    monkeypatch.setattr(GrowingWav, "_put", interrupted)
    assert stream(model, "-o", tmp_path / "a.wav", "--chunk", 2) == 130
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert len(samples) == (len(pieces[0]) + len(pieces[1]) + 100) // 2
    assert near(samples, offline[: len(samples)])
    said = capsys.readouterr().err
    assert f"interrupted: kept {len(samples) / RATE:.2f} s at {RATE} Hz" in said
    assert "stop reason: interrupted" in said


def test_an_interrupt_before_any_audio_leaves_no_file(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("kalle.models.lm.KalleLM.step", interrupted)
    assert stream(model, "-o", tmp_path / "a.wav") == 130
    assert not list(tmp_path.iterdir())
    assert "was not written: nothing was finished yet" in capsys.readouterr().err


def test_a_full_disk_keeps_what_was_written(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    put, calls = GrowingWav._put, []

    def full(self, file, content) -> None:
        calls.append(len(content))
        if sum(size != 44 for size in calls) == 2 and len(content) != 44:
            raise OSError(28, "No space left on device", str(self.path))
        put(self, file, content)

    monkeypatch.setattr(GrowingWav, "_put", full)
    assert stream(model, "-o", tmp_path / "a.wav", "--chunk", 2) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    seconds = len(soundfile.read(tmp_path / "a.wav")[0]) / RATE
    assert seconds > 0
    assert "No space left" in line
    assert line.endswith(f"; kept {seconds:.2f} s in {tmp_path / 'a.wav'}, seed: 4")


def test_a_disk_that_takes_nothing_keeps_nothing_and_tells_the_seed(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").touch()
    assert stream(model, "-o", tmp_path / "file" / "a.wav") == 2
    assert "; kept nothing, seed: 4" in capsys.readouterr().err


def test_two_streams_into_one_file(model: Path, tmp_path: Path, capsys) -> None:
    first = GrowingWav(tmp_path / "a.wav", RATE)
    first.write(np.arange(50, dtype=np.int16))
    assert stream(model, "-o", tmp_path / "a.wav") == 2
    assert f"another run is speaking into '{tmp_path / 'a.wav'}'" in capsys.readouterr().err
    first.write(np.arange(50, 80, dtype=np.int16))
    first.close()
    np.testing.assert_array_equal(soundfile.read(tmp_path / "a.wav", dtype="int16")[0], np.arange(80))
    assert stream(model, "-o", tmp_path / "a.wav") == 0
    assert len(soundfile.read(tmp_path / "a.wav")[0]) > 80


def test_audio_that_nobody_heard_and_nothing_kept_is_an_error(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    player = tmp_path / "bin" / "aplay"
    player.parent.mkdir()
    player.write_text("#!/bin/sh\necho no device >&2; exit 1\n")
    player.chmod(0o700)
    monkeypatch.setenv("PATH", str(player.parent))
    assert stream(model, "--play") == 2
    said = capsys.readouterr().err
    assert "seed: 4" in said
    assert "error: the audio could not be played and was not kept: aplay" in said
    assert "give -o FILE too" in said
    assert stream(model, "--play", "-o", tmp_path / "a.wav") == 0
    assert "could not play it: aplay" in capsys.readouterr().err


def test_a_text_without_words_is_spoken_with_a_warning(model: Path, tmp_path: Path, capsys) -> None:
    for command in ("stream", "say"):
        assert main([command, "...", "-o", str(tmp_path / "a.wav"), "--model", str(model), *COMMON]) == 0
        assert "warning: nothing in the text is a letter or number" in "".join(capsys.readouterr())
    assert stream(model, "-o", tmp_path / "a.wav") == 0
    assert "letter or number" not in capsys.readouterr().err


def test_a_long_text_is_streamed_sentence_by_sentence(model: Path, tmp_path: Path, capsys) -> None:
    text = "The first sentence is here. The second one follows it. Here is the third."
    assert main(["stream", text, "--by-sentences", "--pause", "0.1", "-o", str(tmp_path / "a.wav"), "--model", str(model), *COMMON]) == 0
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    frames = round(0.4 * RATE)
    assert len(samples) == 3 * frames + 2 * 1600
    assert not samples[frames : frames + 1600].any()
    assert capsys.readouterr().err.count("warning: sentence ") == 3, "none of them ends with these weights"


def popen(model: Path, output: object) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", SLOW, "stream", "Hello.", "-o", str(output), "--model", str(model), "--seed", "4"]
    command += ["--max-seconds", "8", "--device", "cpu", "--chunk", "2"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def wait_for(path: Path, size: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if path.exists() and path.stat().st_size > size:
            return
        time.sleep(0.01)
    raise AssertionError(f"no {size} bytes in time: {process.poll()}")


@pytest.fixture
def heard_interrupts() -> Iterator[None]:
    """Ctrl-C as in a terminal: a shell starts its background jobs with it ignored, and Python leaves it so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heard_interrupts")
def test_ctrl_c_in_the_middle_keeps_finished_audio(model: Path, tmp_path: Path, offline: np.ndarray, capsys, monkeypatch) -> None:
    step, calls = KalleLM.step, []

    def interrupted(self, *arguments):
        calls.append(1)
        if len(calls) == 30:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments)

    monkeypatch.setattr(KalleLM, "step", interrupted)
    assert stream(model, "-o", tmp_path / "a.wav", "--chunk", 2) == 130
    samples, _ = soundfile.read(tmp_path / "a.wav", dtype="int16")
    assert 0 < len(samples) < len(offline)
    assert near(samples, offline[: len(samples)])
    assert f"interrupted: kept {len(samples) / RATE:.2f} s" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_signal_to_the_process_keeps_finished_audio(model: Path, tmp_path: Path, number: int) -> None:
    out = tmp_path / "a.wav"
    process = popen(model, out)
    wait_for(out, 5000, process)
    samples, _ = soundfile.read(out, dtype="int16")
    assert len(samples) > 1000, "not readable while it grows"
    process.send_signal(number)
    error = process.communicate(timeout=60)[1].decode()
    kept, _ = soundfile.read(out, dtype="int16")
    assert len(kept) >= len(samples)
    assert near(kept[: len(samples)], samples)
    if number == signal.SIGINT:
        assert process.returncode == 130, error
        assert f"interrupted: kept {len(kept) / RATE:.2f} s" in error
        assert "Traceback" not in error


@pytest.mark.slow
def test_a_reader_that_has_had_enough_ends_it_quietly(model: Path) -> None:
    process = popen(model, "-")
    assert process.stdout is not None
    assert process.stdout.read(1000).startswith(b"RIFF")
    process.stdout.close()
    error = process.stderr.read().decode()
    assert process.wait(timeout=60) == 0, error
    assert error == ""


def test_a_growing_wav_is_valid_at_any_moment(tmp_path: Path) -> None:
    wav = GrowingWav(tmp_path / "deep" / "a.wav", RATE)
    wav.write(np.zeros(0, dtype=np.int16))
    assert not list(tmp_path.iterdir())
    said = np.arange(-500, 500, dtype=np.int16)
    for start in range(0, 1000, 250):
        wav.write(said[start : start + 250])
        np.testing.assert_array_equal(soundfile.read(wav.path, dtype="int16")[0], said[: start + 250])
    assert wav.samples == 1000
    wav.close()
    wav.close()
    soundfile.write(tmp_path / "b.wav", said, RATE, subtype="PCM_16")
    assert wav.path.read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_a_growing_wav_says_where_it_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"):
        GrowingWav(tmp_path / "file" / "a.wav", RATE).write(np.ones(3, dtype=np.int16))


def test_every_sink_is_closed_whatever_happens() -> None:
    closed = []

    class Broken:
        def __init__(self, name: str) -> None:
            self.name = name

        def write(self, samples: np.ndarray) -> None:
            raise BrokenPipeError

        def close(self) -> None:
            closed.append(self.name)
            raise OSError(self.name)

    with pytest.raises(OSError, match="a"), Sinks(Broken("a"), Broken("b")) as sinks:
        sinks.write(np.zeros(1, dtype=np.int16))
    assert sorted(closed) == ["a", "b"]


def test_a_pipe_writes_its_header_once() -> None:
    reading, writing = os.pipe()
    pipe = Pipe(writing, RATE, raw=False)
    for _ in range(2):
        pipe.write(np.ones(5, dtype=np.int16))
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        assert file.read() == wav_header(RATE, None) + b"\x01\x00" * 10
