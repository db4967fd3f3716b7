"""Speech as bytes: every format decodes to what went in, in pieces and whole, at every speed."""

from __future__ import annotations

import io

import numpy as np
import pytest

from kalle.errors import UserError
from kalle.serving.encoding import FORMATS, AudioEncoder, Stretch, encode

RATE = 16000
TONE = (0.3 * np.sin(2 * np.pi * 440 * np.arange(2 * RATE) / RATE)).astype(np.float32)


def decoded(content: bytes, name: str) -> tuple[np.ndarray, int]:
    if name == "pcm":
        return np.frombuffer(content, "<i2") / 32767, RATE
    av = pytest.importorskip("av")
    with av.open(io.BytesIO(content), format=FORMATS[name].container or "wav") as container:
        resampler = av.AudioResampler(format="flt", layout="mono")
        frames = [out.to_ndarray()[0] for frame in container.decode(audio=0) for out in resampler.resample(frame)]
        return np.concatenate(frames), container.streams.audio[0].rate


def pitch_hz(audio: np.ndarray, rate_hz: int) -> float:
    middle = audio[len(audio) // 4 : -len(audio) // 4]
    spectrum = np.abs(np.fft.rfft(middle * np.hanning(len(middle))))
    return float(np.argmax(spectrum) * rate_hz / len(middle))


def streamed(encoder: AudioEncoder, audio: np.ndarray, piece: int = 1280) -> list[bytes]:
    return [*(encoder.push(audio[start : start + piece]) for start in range(0, len(audio), piece)), encoder.finish()]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_holds_the_speech_streamed_and_whole(name: str) -> None:
    pieces = streamed(AudioEncoder(name, RATE), TONE)
    assert sum(map(bool, pieces[: len(pieces) // 2])) > 4, "the bytes came late"
    for content in (b"".join(pieces), encode(TONE, name, RATE)):
        audio, rate_hz = decoded(content, name)
        assert abs(len(audio) / rate_hz - 2) < 0.15
        assert pitch_hz(audio, rate_hz) == pytest.approx(440, abs=2)
        assert np.sqrt(np.mean(audio**2)) == pytest.approx(0.3 / np.sqrt(2), rel=0.1)
    if name in ("wav", "pcm", "flac"):
        np.testing.assert_allclose(audio[: len(TONE)], TONE, atol=1e-4)


def test_a_whole_wav_knows_its_length_and_a_streamed_one_says_it_does_not() -> None:
    whole, stream = encode(TONE, "wav", RATE), b"".join(streamed(AudioEncoder("wav", RATE), TONE))
    assert int.from_bytes(whole[40:44], "little") == len(whole) - 44 == 2 * len(TONE)
    assert stream[40:44] == b"\xff" * 4
    assert stream[44:] == whole[44:]


@pytest.mark.parametrize("rate_hz", [22050, 24000, 44100])
@pytest.mark.parametrize("name", ["opus", "mp3", "aac"])
def test_a_rate_that_the_format_lacks_is_resampled(name: str, rate_hz: int) -> None:
    tone = np.sin(2 * np.pi * 440 * np.arange(rate_hz) / rate_hz).astype(np.float32) / 4
    audio, stored_hz = decoded(encode(tone, name, rate_hz), name)
    assert pitch_hz(audio, stored_hz) == pytest.approx(440, abs=4)


@pytest.mark.parametrize("speed", [0.25, 0.4, 0.8, 1.5, 2.0, 4.0])
def test_another_speed_keeps_the_pitch_also_in_pieces(speed: float) -> None:
    whole = Stretch(RATE, speed)
    pieces = Stretch(RATE, speed)
    one = np.concatenate([whole.push(TONE), whole.finish()])
    several = np.concatenate([*(pieces.push(TONE[start : start + 1000]) for start in range(0, len(TONE), 1000)), pieces.finish()])
    assert len(one) == round(len(TONE) / speed)
    assert np.sqrt(np.mean(one[-2400:-800] ** 2)) > 0.1, "the end is missing"
    assert pitch_hz(one, RATE) == pytest.approx(440, abs=4)
    np.testing.assert_allclose(several, one, atol=1e-5)
    assert len(encode(TONE, "pcm", RATE, speed)) == 2 * len(one)


@pytest.mark.parametrize("name", FORMATS)
def test_no_speech_is_a_valid_file(name: str) -> None:
    encoder = AudioEncoder(name, RATE, 2.0)
    assert isinstance(encoder.push(TONE[:0]) + encoder.finish(), bytes)


def test_what_there_is_not_is_refused() -> None:
    with pytest.raises(UserError, match="unknown response_format"):
        AudioEncoder("ogg", RATE)
    for speed in (0.2, 4.5, float("nan")):
        with pytest.raises(UserError, match="bad speed"):
            AudioEncoder("wav", RATE, speed)
