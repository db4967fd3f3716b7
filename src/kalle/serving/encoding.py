"""Speech as bytes of a format, while it is made: encoding and change of speed, both in pieces. Needs PyAV for all but WAV and PCM."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from kalle.audio import to_pcm16, wav_header
from kalle.errors import UserError
from kalle.extras import require

if TYPE_CHECKING:
    from kalle.synthesis.generate import FloatArray

SPEEDS = (0.25, 4.0)
"""The slowest and the fastest speed."""
SLOWEST_STEP = 0.5
"""FFmpeg's filter goes down to half the speed; two of them go to a quarter."""
FLUSH_SECONDS = 1.0
"""Longer than what the filters hold back at any speed."""


@dataclass(frozen=True)
class Format:
    """An encoding of a response; ``container`` and ``codec`` are FFmpeg's names, None where there is no codec."""

    media_type: str
    container: str | None = None
    codec: str | None = None
    options: tuple[tuple[str, str], ...] = ()
    """Of the container, where it is streamed."""


FORMATS = {
    "wav": Format("audio/wav"),
    "pcm": Format("audio/pcm"),
    "flac": Format("audio/flac", "flac", "flac"),
    "mp3": Format("audio/mpeg", "mp3", "libmp3lame", (("write_xing", "0"),)),
    "opus": Format("audio/ogg", "ogg", "libopus", (("page_duration", "100000"),)),
    "aac": Format("audio/aac", "adts", "aac"),
}
"""By the names that OpenAI's API has for them. PCM is 16-bit little-endian mono at the rate of the model; a page of Opus takes 0.1 s."""


class AudioEncoder:
    """Mono speech at ``rate_hz`` as a stream of bytes: ``push`` what comes, then ``finish``.

    A ``whole`` one gives all bytes at the end, with a header that knows the length; a streamed WAV states the largest length there is.
    """

    def __init__(self, name: str, rate_hz: int, speed: float = 1.0, whole: bool = False) -> None:
        """UserError for a format that is none of `FORMATS`, a speed outside `SPEEDS`, or where PyAV is needed and missing."""
        if name not in FORMATS:
            raise UserError(f"unknown response_format: got {name!r}, expected {', '.join(FORMATS)}; correct it")
        if not SPEEDS[0] <= speed <= SPEEDS[1]:
            raise UserError(f"bad speed: got {speed!r}, expected a number from {SPEEDS[0]} to {SPEEDS[1]}; correct it")
        self._format, self._rate_hz, self._whole = FORMATS[name], rate_hz, whole
        self._header = name == "wav"
        self._stretch = None if speed == 1 else Stretch(rate_hz, speed)
        self._pcm = bytearray()
        self._codec = None if self._format.container is None else _Codec(self._format, rate_hz, whole)

    def push(self, audio: FloatArray) -> bytes:
        """Take samples (n,) in [-1, 1]; returns the bytes that are ready."""
        return self._put(audio if self._stretch is None else self._stretch.push(audio))

    def finish(self) -> bytes:
        """The last bytes."""
        rest = b"" if self._stretch is None else self._put(self._stretch.finish())
        if self._codec is not None:
            return rest + self._codec.finish()
        if not self._whole:
            return rest
        header = wav_header(self._rate_hz, len(self._pcm)) if self._header else b""
        return header + bytes(self._pcm)

    def _put(self, audio: FloatArray) -> bytes:
        samples = to_pcm16(audio)
        if self._codec is not None:
            return self._codec.push(samples)
        content = samples.astype("<i2").tobytes()
        if self._whole:
            self._pcm += content
            return b""
        header, self._header = wav_header(self._rate_hz, None) if self._header else b"", False
        return header + content


def encode(audio: FloatArray, name: str, rate_hz: int, speed: float = 1.0) -> bytes:
    """A whole file of ``audio`` (S,); UserError as for `AudioEncoder`."""
    encoder = AudioEncoder(name, rate_hz, speed, whole=True)
    return encoder.push(audio) + encoder.finish()


class Stretch:
    """Speech ``speed`` times as fast at the same pitch, in pieces: FFmpeg's ``atempo``, a WSOLA (Verhelst and Roelands, ICASSP 1993)."""

    def __init__(self, rate_hz: int, speed: float) -> None:
        """UserError where PyAV is missing."""
        require("av", "serve", "another speed")
        import av.filter

        steps = [speed]
        while steps[-1] < SLOWEST_STEP:
            steps[-1:] = [SLOWEST_STEP, steps[-1] / SLOWEST_STEP]
        self._rate_hz, self._speed, self._taken, self._given = rate_hz, speed, 0, 0
        self._graph = av.filter.Graph()
        source = self._graph.add_abuffer(sample_rate=rate_hz, format="flt", layout="mono")
        filters = [source, *(self._graph.add("atempo", f"{step:g}") for step in steps), self._graph.add("abuffersink")]
        self._graph.link_nodes(*filters).configure()

    def push(self, audio: FloatArray) -> FloatArray:
        """Take samples (n,); returns those that are ready."""
        if len(audio):
            self._graph.push(_frame(np.ascontiguousarray(audio, np.float32), "flt", self._rate_hz, self._taken))
            self._taken += len(audio)
        ready = self._ready()
        self._given += len(ready)
        return ready

    def finish(self) -> FloatArray:
        """The last samples."""
        if not self._taken:
            return np.zeros(0, np.float32)
        left = round(self._taken / self._speed) - self._given
        # The filter drops the rest of its last window: silence pushes the speech out, and is cut off again.
        silence = np.zeros(round(FLUSH_SECONDS * self._rate_hz), np.float32)
        self._graph.push(_frame(silence, "flt", self._rate_hz, self._taken))
        self._graph.push(None)
        return self._ready()[: max(0, left)]

    def _ready(self) -> FloatArray:
        from av.error import BlockingIOError, EOFError

        pieces = [np.zeros(0, np.float32)]
        while True:
            try:
                pieces.append(cast("Any", self._graph.pull()).to_ndarray()[0])
            except (BlockingIOError, EOFError):
                return np.concatenate(pieces)


class _Written:
    """A file that can only be appended to."""

    def __init__(self) -> None:
        self._content = bytearray()

    def write(self, content: bytes) -> int:
        self._content += content
        return len(content)

    def take(self) -> bytes:
        content = bytes(self._content)
        self._content.clear()
        return content


class _Codec:
    """A codec of FFmpeg and its container, written into memory."""

    def __init__(self, form: Format, rate_hz: int, whole: bool) -> None:
        require("av", "serve", f"audio as {form.container}")
        import av

        self._file: Any = io.BytesIO() if whole else _Written()
        self._container = av.open(self._file, "w", format=form.container, options={} if whole else dict(form.options))
        assert form.codec is not None
        rates = av.Codec(form.codec, "w").audio_rates
        # Opus knows five rates, MP3 nine; the encoder resamples from any other.
        rate = rate_hz if not rates or rate_hz in rates else min((each for each in rates if each > rate_hz), default=max(rates))
        self._stream = cast("Any", self._container.add_stream(form.codec, rate=rate))
        self._stream.layout = "mono"
        self._rate_hz, self._taken, self._whole = rate_hz, 0, whole

    def push(self, samples: np.ndarray) -> bytes:
        if len(samples):
            self._mux(_frame(samples, "s16", self._rate_hz, self._taken))
            self._taken += len(samples)
        return b"" if self._whole else self._file.take()

    def finish(self) -> bytes:
        if self._taken:
            self._mux(None)
        self._container.close()
        return self._file.getvalue() if self._whole else self._file.take()

    def _mux(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def _frame(samples: np.ndarray, kind: str, rate_hz: int, position: int) -> Any:
    """Samples (n,) as a frame of FFmpeg at ``position`` samples from the start."""
    from fractions import Fraction

    import av

    frame = av.AudioFrame.from_ndarray(samples[None], format=kind, layout="mono")
    frame.sample_rate, frame.pts, frame.time_base = rate_hz, position, Fraction(1, rate_hz)
    return frame
