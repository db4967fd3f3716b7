"""Audio files as blocks of samples: what is easy is decoded here, the rest in a process that may die.

PCM and FLAC are decoded by libsndfile in this process. All other formats are decoded in another one, by libsndfile or else PyAV, because
decoding libraries can crash on a damaged or hostile file: that then costs the file and not the program. It may map
`DECODER_MEMORY_BYTES`; here a file takes a block of `_BLOCK_VALUES` at a time.
"""

from __future__ import annotations

import atexit
import contextlib
import errno
import io
import itertools
import json
import logging
import math
import os
import selectors
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import soundfile
from numpy.typing import NDArray

from kalle.errors import UserError
from kalle.files import is_file, points_elsewhere

logger = logging.getLogger(__name__)

Samples = NDArray[np.float32]
# Raw G.722 has no header, so a decoder cannot guess it from the content.
HEADERLESS = {".g722": "g722"}
MOST_VALUES_A_SECOND = 384_000
"""Of a file whose length is bounded, all channels together: 192 kHz in stereo. A header may claim any rate."""
MOST_CHANNELS = 64
"""More than any recording has, and no more than the resampler of FFmpeg takes."""
DECODER_MEMORY_BYTES = 2 * 2**30
"""Memory that the decoding process may map beyond that of its start."""
DECODER_SECONDS = 60.0
"""How long the decoding process may be silent within a file."""
_LONGEST_BELIEVED_SECONDS = 1e9
_BLOCK_VALUES = 2**18
_LARGEST_BLOCK_BYTES = 2**21
_LARGEST_LAYOUT_BYTES = 2**12
"""Of the fmt chunk of a WAV file; they have 16 to 40."""
MOST_CHUNKS = 4096
"""That are looked through in a file."""
_IN_DS64 = 2**32 - 1
"""The size of a data chunk of RF64 that stands in another chunk."""
_PLAIN_BEGINNINGS = (b"RIFF", b"RF64", b"riff", b"FORM", b".snd", b"caff", b"fLaC")
_PLAIN_SUBTYPES = ("PCM_S8", "PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW")
_WAVE_SUBTYPES = {(1, 8): "PCM_U8", (1, 16): "PCM_16", (1, 24): "PCM_24", (1, 32): "PCM_32", (3, 32): "FLOAT", (3, 64): "DOUBLE"}
"""(format tag, bits) of a WAV file -> libsndfile's name."""


class AudioError(UserError):
    """A file that gives no usable audio; ``reason`` is one of missing, unreadable, empty, not finite, too long, silent."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Decoded:
    """An open file: its header, and its samples (n, channels) float32 in blocks."""

    rate_hz: int
    channels: int
    seconds: float | None
    """The length of the file that its header claims; None where it states none."""
    blocks: Iterator[Samples]
    format: str = ""
    """libsndfile's name of the format; empty where libsndfile by itself does not read these samples."""

    @property
    def frames(self) -> int | None:
        """``seconds`` in samples a channel."""
        return None if self.seconds is None else round(self.seconds * self.rate_hz)


@dataclass(frozen=True)
class Span:
    """The part of a file that is read: from ``start_s`` on, ``duration_s`` long or, with None, to the end."""

    start_s: float = 0.0
    duration_s: float | None = None
    as_opened: bool = False
    """Begin where libsndfile does by itself, which is later than the first sample where an Ogg stream was cut out of a longer one."""

    def range(self, rate_hz: int) -> tuple[int, int | None]:
        """The first sample and how many at most, rounded as lhotse rounds times."""
        # To 8 digits, so that a time that means a sample is not taken for the one before it.
        start, frames = (None if time is None else math.floor(round(time * rate_hz, 8) + 0.5) for time in (self.start_s, self.duration_s))
        return start or 0, frames


WHOLE = Span()
HEADER = Span(duration_s=0.0)


def _beginning(path: Path) -> bytes:
    """The first bytes of a file; AudioError where there are none, also for what the system has against it: that ends no corpus."""
    if not is_file(path):
        raise AudioError(f"audio file not found: got '{path}', expected a readable audio file; check the path", "missing")
    try:
        with path.open("rb") as file:
            start = file.read(max(map(len, _PLAIN_BEGINNINGS)))
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.ELOOP, errno.ENAMETOOLONG):  # a disk that fails ends the run
            raise
        problem = f"cannot read '{path}': {error.strerror}, expected a file that you may read; change its permissions"
        raise AudioError(problem, "unreadable") from None
    if not start:
        raise AudioError(f"empty file: '{path}' has 0 bytes, expected audio; record or fetch the file again", "empty")
    return start


def empty_audio(path: Path) -> AudioError:
    """The error for a file that holds nothing."""
    return AudioError(f"no audio in '{path}': got 0 samples, expected speech; record or fetch the file again", "empty")


@contextmanager
def open_audio(path: Path, longest_seconds: float | None, span: Span = WHOLE) -> Iterator[Decoded]:
    """The header of ``path`` and the samples of ``span`` in blocks, all checked: AudioError when it is missing or unreadable, has more
    channels than `MOST_CHANNELS`, or holds NaN or infinity, and with ``longest_seconds`` when the span is longer, by the header before
    anything is decoded. A span that reaches beyond the end is what there is of it.
    """
    with contextlib.ExitStack() as stack:
        decoded = _decode_here(path, _beginning(path), stack, span) or _decode_apart(path, stack, span)
        if decoded.channels > MOST_CHANNELS:
            raise AudioError(
                f"too many channels in '{path}': got {decoded.channels}, expected at most {MOST_CHANNELS}; mix it down", "unreadable"
            )
        most = _most_samples(path, longest_seconds, decoded, span)
        yield replace(decoded, blocks=_checked(path, decoded, most))


def _most_samples(path: Path, longest_seconds: float | None, decoded: Decoded, span: Span) -> int | None:
    """How many samples a channel may have, None for any number; refuses a header that claims more."""
    if longest_seconds is None:
        return None
    if decoded.rate_hz * decoded.channels > MOST_VALUES_A_SECOND:
        raise AudioError(
            f"too many samples a second in '{path}': got {decoded.channels} channels at {decoded.rate_hz} Hz, expected at most "
            f"{MOST_VALUES_A_SECOND} together; convert it",
            "too long",
        )
    claimed = math.inf if decoded.seconds is None else decoded.seconds - span.start_s
    claimed = min(claimed, math.inf if span.duration_s is None else span.duration_s)
    if longest_seconds < claimed < math.inf:
        raise _too_long(path, longest_seconds, claimed)
    return int(longest_seconds * decoded.rate_hz)


def _checked(path: Path, decoded: Decoded, most: int | None) -> Iterator[Samples]:
    seen = 0
    for block in _told(path, decoded.blocks):
        seen += len(block)
        if most is not None and seen > most:
            raise _too_long(path, most / decoded.rate_hz)
        if not np.isfinite(block).all():
            raise AudioError(f"not finite: '{path}' holds NaN or infinite samples, expected numbers only; export it again", "not finite")
        yield block


def _told(path: Path, blocks: Iterator[Samples]) -> Iterator[Samples]:
    try:
        yield from blocks
    except _DecodingError as error:
        raise _unreadable(path, str(error)) from None


def _too_long(path: Path, longest_seconds: float, seconds: float = math.inf) -> AudioError:
    got = f"{seconds:.2f} s" if math.isfinite(seconds) else f"more than {longest_seconds:g} s"
    return AudioError(
        f"too long: got {got} of audio in '{path}', expected at most {longest_seconds:g} s; record or cut it again", "too long"
    )


def sndfile_name(path: Path) -> Path | bytes:
    """``path`` for soundfile, which by itself opens no name that is other bytes than UTF-8."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        return os.fsencode(path)
    return path


class _Sequential(soundfile.SoundFile):
    """A file read from its beginning to its end.

    soundfile seeks after every read of a file that it may seek in, which fails at the end of a FLAC file of unknown length.
    """

    def seekable(self) -> bool:
        """No, for soundfile's purposes."""
        return False


def open_plain(content: bytes) -> soundfile.SoundFile:
    """An audio file in memory; a ValueError unless it is PCM or FLAC, which is decoded in this process."""
    if not content.startswith(_PLAIN_BEGINNINGS):
        raise ValueError("it is neither PCM nor FLAC")
    try:
        file = soundfile.SoundFile(io.BytesIO(content))
    except soundfile.LibsndfileError as error:
        raise ValueError(str(error)) from None
    if file.subtype not in _PLAIN_SUBTYPES:
        raise ValueError(f"it is neither PCM nor FLAC but {file.subtype}")
    return file


def _decode_here(path: Path, start: bytes, stack: contextlib.ExitStack, span: Span) -> Decoded | None:
    """The file where it is PCM or FLAC; None for another format, or none."""
    if not start.startswith(_PLAIN_BEGINNINGS) or path.suffix.lower() in HEADERLESS:
        return None
    try:
        file = stack.enter_context(_Sequential(sndfile_name(path)))
    # A TypeError is the answer to a suffix that means samples without a header.
    except (soundfile.LibsndfileError, OSError, TypeError):
        return None
    if file.subtype not in _PLAIN_SUBTYPES:
        return None
    if not file.frames and (rest := _unfinished_wave(path, stack)):
        return replace(_from_sndfile(rest, span), format="")
    return _from_sndfile(file, span)


def _from_sndfile(file: soundfile.SoundFile, span: Span) -> Decoded:
    seconds = file.frames / file.samplerate
    # A file that was written into a pipe doesn't know its length, which reads as the largest there is.
    known = seconds if seconds < _LONGEST_BELIEVED_SECONDS else None
    return Decoded(int(file.samplerate), int(file.channels), known, _sndfile_blocks(file, span), file.format)


def _sndfile_blocks(file: soundfile.SoundFile, span: Span) -> Iterator[Samples]:
    start, left = span.range(file.samplerate)
    most = max(1, _BLOCK_VALUES // file.channels)
    try:
        # An Ogg stream whose first granule is late begins elsewhere without it.
        if start or (file.format == "OGG" and not span.as_opened):
            file.seek(min(start, file.frames))
        # Behind the last sample of a FLAC file may be a tag, at which libsndfile fails.
        if file.format == "FLAC" and file.frames < _LONGEST_BELIEVED_SECONDS * file.samplerate:
            rest = max(0, file.frames - start)
            left = rest if left is None else min(left, rest)
        while left != 0 and len(block := file.read(most if left is None else min(most, left), dtype="float32", always_2d=True)):
            yield block
            left = None if left is None else left - len(block)
    except soundfile.LibsndfileError as error:
        raise _DecodingError(str(error)) from None


class _Rest(io.RawIOBase):
    """The part of a file after ``start``, as a file."""

    def __init__(self, file: IO[bytes], start: int) -> None:
        super().__init__()
        self._file, self._start = file, start
        self.seek(0)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        place = self._file.seek(offset + (self._start if whence == os.SEEK_SET else 0), whence)
        return place - self._start

    def tell(self) -> int:
        return self._file.tell() - self._start

    def readinto(self, buffer: Any) -> int:
        return self._file.readinto(buffer)  # type: ignore[attr-defined,no-any-return]


def wave_data(file: IO[bytes]) -> tuple[bytes, int, int] | None:
    """The fmt chunk of a WAV or RF64 file, the bytes that its data chunk claims, and where these begin; None for another file."""
    layout = None
    whole = -1  # of the data chunk, where its own four bytes cannot hold it
    if file.read(4) not in (b"RIFF", b"RF64") or file.read(8)[4:] != b"WAVE":
        return None
    for _ in range(MOST_CHUNKS):
        head = file.read(8)
        name, length, start = head[:4], int.from_bytes(head[4:], "little"), file.tell()
        if len(head) < 8:
            return None
        if name == b"data":
            length = whole if length == _IN_DS64 and whole >= 0 else length
            return (layout, length, start) if layout is not None and len(layout) >= 16 else None
        if name == b"ds64":
            whole = int.from_bytes(file.read(16)[8:], "little")
        if name == b"fmt ":
            layout = file.read(min(length, _LARGEST_LAYOUT_BYTES))
        file.seek(start + length + length % 2)
    return None


def _unfinished_wave(path: Path, stack: contextlib.ExitStack) -> soundfile.SoundFile | None:
    """The samples of a WAV file whose data chunk claims none and is followed by some: its recorder never wrote the length."""
    file = stack.enter_context(path.open("rb"))
    size, found = path.stat().st_size, wave_data(file)
    if found is None:
        return None
    layout, length, start = found
    if length or start >= size or _are_chunks(file, start, size):
        return None
    tag, channels, rate_hz, _, _, bits = struct.unpack_from("<HHIIHH", layout)
    if tag == 0xFFFE and len(layout) >= 26:
        tag = int.from_bytes(layout[24:26], "little")
    subtype = _WAVE_SUBTYPES.get((tag, bits))
    if subtype is None or not channels or not rate_hz:
        return None
    options = {"samplerate": rate_hz, "channels": channels, "format": "RAW", "subtype": subtype, "endian": "LITTLE"}
    rest = stack.enter_context(_Sequential(_Rest(file, start), **options))
    logger.warning("'%s': its header was never finished, read to the end of the file (%.2f s)", path, rest.frames / rate_hz)
    return rest


def _are_chunks(file: IO[bytes], place: int, size: int) -> bool:
    """Whether the file consists of chunks from ``place`` to its end: then an empty data chunk means what it says."""
    for _ in range(MOST_CHUNKS):
        if place + 8 > size:
            break
        file.seek(place + 4)
        length = int.from_bytes(file.read(4), "little")
        place += 8 + length + length % 2
    return place == size


# The decoding process: a request is a line of JSON with the path and the span; the answer a line of JSON with the header, blocks (their
# bytes, then the samples), and after an empty block a line that says how it ended. Nothing that comes from it is trusted.
_LENGTH = struct.Struct("<I")


class _Decoder:
    """The process that decodes for this one, started when it is first needed and again after it died."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0

    def ask(self, path: Path, span: Span) -> dict[str, Any]:
        """Begin to decode ``span`` of ``path``; its header."""
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(json.dumps([os.fsencode(path.absolute()).hex(), astuple(span)]).encode() + b"\n")
        process.stdin.flush()
        return self._line()

    def blocks(self, channels: int) -> Iterator[Samples]:
        """The samples (n, channels) that follow the header."""
        width = 4 * channels
        while size := _LENGTH.unpack(self._exactly(_LENGTH.size))[0]:
            if size % width or size > _LARGEST_BLOCK_BYTES:
                raise EOFError
            yield np.frombuffer(self._exactly(size), dtype="<f4").reshape(-1, channels)
        end = self._line()
        if "error" in end:
            raise _DecodingError(str(end["error"]))

    def death(self) -> str:
        """How the process ended; one that hangs is ended."""
        ended = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = None if self._process is None else self._process.wait(1.0)
        self.stop()
        if ended is None:
            return "the decoder does not answer"
        return f"the decoder crashed: {signal.Signals(-ended).name}" if ended < 0 else "the decoder ended"

    def stop(self) -> None:
        """End the process; the next request starts another."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for stream in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                stream.close()  # type: ignore[union-attr]

    def forget(self) -> None:
        """Leave the process alone: it belongs to the parent that this one was forked from."""
        self.lock, self._process = threading.Lock(), None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self.stop()
        if self._process is None:
            code = f"import sys; sys.path[:] = {sys.path!r}; from kalle.decoding import serve; serve()"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # an interrupt is for this process, which then ends that one
            )
        return self._process

    def _exactly(self, size: int) -> bytes:
        assert self._process is not None
        stream = self._process.stdout
        assert stream is not None
        content = bytearray()
        with selectors.DefaultSelector() as selector:
            selector.register(stream, selectors.EVENT_READ)
            while len(content) < size:
                if not selector.select(DECODER_SECONDS):
                    raise EOFError
                more = os.read(stream.fileno(), size - len(content))
                if not more:
                    raise EOFError
                content += more
        return bytes(content)

    def _line(self) -> dict[str, Any]:
        size = _LENGTH.unpack(self._exactly(_LENGTH.size))[0]
        if size > 65536:
            raise EOFError
        answer = json.loads(self._exactly(size))
        if not isinstance(answer, dict):
            raise EOFError
        return answer


class _DecodingError(Exception):
    """The message of a decoder for a file that it cannot read."""


_decoder = _Decoder()
atexit.register(_decoder.stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_decoder.forget)


def _decode_apart(path: Path, stack: contextlib.ExitStack, span: Span) -> Decoded:
    """The part decoded by the other process, which is ended when anything else than the whole part was read from it."""
    stack.enter_context(_decoder.lock)
    whole = False

    def end() -> None:
        if not whole:
            _decoder.stop()

    stack.callback(end)
    try:
        header = _decoder.ask(path, span)
        if "error" in header:
            whole = True
            raise _DecodingError(str(header["error"]))
        rate_hz, channels, seconds, name = int(header["rate"]), int(header["channels"]), header["seconds"], str(header["format"])
        if rate_hz < 1 or channels < 1:
            raise _DecodingError("its header makes no sense")
    except _DecodingError as error:
        raise _unreadable(path, str(error)) from None
    except (EOFError, OSError, ValueError, KeyError, TypeError):
        whole = True
        raise _unreadable(path, _decoder.death()) from None

    def blocks() -> Iterator[Samples]:
        nonlocal whole
        try:
            yield from _decoder.blocks(channels)
            whole = True
        except _DecodingError:
            whole = True
            raise
        except (EOFError, OSError, ValueError):
            whole = True
            raise _unreadable(path, _decoder.death()) from None

    return Decoded(rate_hz, channels, float(seconds) if isinstance(seconds, int | float) else None, blocks(), name)


def _unreadable(path: Path, problem: str) -> AudioError:
    return AudioError(
        f"unreadable audio: '{path}' ({_one_line(problem)}); expected WAV, FLAC, Ogg, Opus, MP3 or what PyAV decodes"
        + (points_elsewhere(path) or "; convert it"),
        "unreadable",
    )


def serve() -> None:
    """The loop of the decoding process: reads requests from standard input until that is closed."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints is no answer
    _limit_memory()
    for line in sys.stdin.buffer:
        name, span = json.loads(line)
        end: dict[str, Any] = {}
        try:
            with contextlib.ExitStack() as stack:
                decoded = _decode_any(Path(os.fsdecode(bytes.fromhex(name))), stack, Span(*span))
                header = {"rate": decoded.rate_hz, "channels": decoded.channels, "seconds": decoded.seconds, "format": decoded.format}
                _say(answers, header)
                if decoded.channels > MOST_CHANNELS:
                    continue  # refused by whoever asked; this process is ended
                try:
                    for block in decoded.blocks:
                        content = np.ascontiguousarray(block, dtype="<f4").tobytes()
                        answers.write(_LENGTH.pack(len(content)) + content)
                finally:
                    answers.write(_LENGTH.pack(0))
        except MemoryError:
            end = {"error": f"it takes more than {DECODER_MEMORY_BYTES / 2**30:g} GiB to decode"}
        except Exception as error:  # whatever a decoder raises about a file
            end = {"error": str(error) or type(error).__name__}
        _say(answers, end)


def _say(answers: IO[bytes], value: dict[str, Any]) -> None:
    content = json.dumps(value).encode()[:65000]
    answers.write(_LENGTH.pack(len(content)) + content)
    answers.flush()


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (mapped + DECODER_MEMORY_BYTES, resource.RLIM_INFINITY))


def _decode_any(path: Path, stack: contextlib.ExitStack, span: Span) -> Decoded:
    problem = "it needs PyAV (`pip install av`)"
    if path.suffix.lower() not in HEADERLESS:
        try:
            return _from_sndfile(stack.enter_context(_Sequential(sndfile_name(path))), span)
        except (soundfile.LibsndfileError, OSError, TypeError) as error:
            problem = str(error)
    decoded = _from_av(path, stack, span)
    if decoded is None:
        raise _DecodingError(problem)
    return decoded


def _from_av(path: Path, stack: contextlib.ExitStack, span: Span = WHOLE) -> Decoded | None:
    """The first audio stream by way of PyAV; None when PyAV is absent or finds none."""
    try:
        import av
    except ImportError:
        return None
    try:
        container = stack.enter_context(av.open(str(path), format=HEADERLESS.get(path.suffix.lower())))
        stream: Any = container.streams.audio[0]
    except (av.FFmpegError, OSError, ValueError, IndexError):
        return None
    # Known before anything is decoded: planar frames of many channels end a process in PyAV, so packed ones are asked for.
    context = stream.codec_context
    lengths = ((stream.duration, stream.time_base), (container.duration, 1e-6))
    claimed = next((float(length * base) for length, base in lengths if length and base), None)
    channels, rate_hz = int(context.channels or 0), int(context.sample_rate or 0)
    blocks = _av_blocks(container, av.AudioResampler(format="flt"), channels, rate_hz)
    return Decoded(rate_hz, channels, claimed, _within(blocks, *span.range(max(rate_hz, 1))))


def _within(blocks: Iterator[Samples], start: int, left: int | None) -> Iterator[Samples]:
    """``left`` samples from ``start`` on, of ``blocks`` that can only be read in turn."""
    while left != 0 and (block := next(blocks, None)) is not None:
        begun, start = block[start:], max(0, start - len(block))
        chosen = begun if left is None else begun[:left]
        left = None if left is None else left - len(chosen)
        if len(chosen):
            yield chosen


def _av_blocks(container: Any, resampler: Any, channels: int, rate_hz: int) -> Iterator[Samples]:
    for frame in itertools.chain(container.decode(audio=0), (None,)):
        for out in resampler.resample(frame):
            if len(out.layout.channels) != channels or out.sample_rate != rate_hz:
                raise _DecodingError("its channels or rate change on the way")
            samples = out.to_ndarray().reshape(-1, channels)
            step = max(1, _BLOCK_VALUES // channels)
            yield from (samples[start : start + step] for start in range(0, len(samples), step))


def _one_line(text: str) -> str:
    return " ".join(text.split())
