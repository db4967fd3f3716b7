"""Audio files in and out: mono float32 arrays in [-1, 1], resampled on reading, PCM16 written atomically."""

from __future__ import annotations

import errno
import itertools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from kalle.errors import UserError
from kalle.files import atomic_file

Audio = NDArray[np.float32]
PCM16_SCALE = 32767.0
# Raw G.722 has no header, so a decoder cannot guess it from the content.
HEADERLESS = {".g722": "g722"}
LONGEST_WAV_BYTES = 2**32 - 4096
"""A WAV file counts its bytes in 32 bits."""
MOST_VALUES_A_SECOND = 384_000
"""Of a file whose length is bounded, all channels together: 192 kHz in stereo. A header may claim any rate."""
_LONGEST_BELIEVED_SECONDS = 1e9
WRITABLE = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".opus": ("OGG", "OPUS"),
    ".ogg": ("OGG", "VORBIS"),
}
"""Suffix -> format and encoding of libsndfile."""


class AudioError(UserError):
    """A file that gives no usable audio; ``reason`` is one of missing, unreadable, empty, not finite, too long."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


def load_channels(path: str | Path, longest_seconds: float | None = None) -> tuple[Audio, int]:
    """Decode a whole file as it is stored: float32 (channels, S) and its sample rate in Hz.

    libsndfile reads it, else PyAV where that is installed. Raises AudioError when the file is missing,
    unreadable, without samples, or holds NaN or infinity; with ``longest_seconds`` also when it is longer, of which no more
    than that is ever decoded: a small file can hold hours of silence, and its header may say anything.
    """
    path = Path(path)
    _require_content(path)
    channels, rate_hz = _decode(path, math.inf if longest_seconds is None else longest_seconds)
    if channels.shape[1] == 0:
        raise AudioError(f"no audio in '{path}': got 0 samples, expected speech; record or fetch the file again", "empty")
    if not np.isfinite(channels).all():
        bad = int((~np.isfinite(channels)).sum())
        raise AudioError(f"not finite: '{path}' holds {bad} NaN or infinite samples, expected numbers only; export it again", "not finite")
    return channels, rate_hz


def read_audio(path: str | Path, sample_rate_hz: int = 16000) -> Audio:
    """Read a file as mono float32 (S,) at ``sample_rate_hz``: channels are averaged, another rate is resampled.

    Raises AudioError (a UserError) as `load_channels` does.
    """
    channels, rate_hz = load_channels(path)
    mono = resample(channels.mean(axis=0, dtype=np.float32), rate_hz, sample_rate_hz)
    if mono.size == 0:
        raise AudioError(f"no audio in '{path}': too short for one sample at {sample_rate_hz} Hz; record it again", "empty")
    return mono


def resample(audio: Audio, from_hz: int, to_hz: int) -> Audio:
    """Band-limited resampling of mono float32 (S,) to (about S * to_hz / from_hz,); a UserError for a rate that is none."""
    for rate_hz in (from_hz, to_hz):
        if not rate_hz > 0:
            raise UserError(f"bad sample rate: got {rate_hz} Hz, expected more than 0; give the rate the audio was recorded at")
    if from_hz == to_hz:
        return np.ascontiguousarray(audio, dtype=np.float32)
    return np.asarray(soxr.resample(audio, from_hz, to_hz), dtype=np.float32)


def write_audio(path: str | Path, audio: NDArray[np.floating], sample_rate_hz: int) -> None:
    """Write mono (S,) in [-1, 1] rounded and clipped to 16 bits, in the format of the suffix (``WRITABLE``).

    Nothing is left behind on failure.

    Raises UserError for another suffix, an empty or non-finite array, or when the file cannot be written.
    """
    path = Path(path)
    kind = writable_kind(path)
    samples = np.asarray(audio)
    assert samples.ndim == 1, f"expected mono (S,), got shape {samples.shape}"
    if samples.size == 0 or not np.isfinite(samples).all():
        raise UserError(f"no audio to write to '{path}': got {samples.size} samples with NaN or none at all, expected finite speech")
    write_encoded(path, to_pcm16(samples), sample_rate_hz, kind[0], kind[1])


def writable_kind(path: Path) -> tuple[str, str]:
    """The format and encoding in which ``path`` is written, by its suffix; a UserError for one that nothing is written in."""
    kind = WRITABLE.get(path.suffix.lower())
    if kind is None:
        kinds = f"{', '.join(list(WRITABLE)[:-1])} or {list(WRITABLE)[-1]}"
        raise UserError(f"cannot write '{path}': got the suffix '{path.suffix}', expected {kinds}; rename the output")
    return kind


def to_pcm16(audio: NDArray[np.floating]) -> NDArray[np.int16]:
    """Samples in [-1, 1] (S,) as int16 (S,), rounded to the nearest and clipped."""
    return np.clip(np.rint(np.asarray(audio, dtype=np.float64) * PCM16_SCALE), -32768, 32767).astype(np.int16)


def from_pcm16(samples: NDArray[np.int16]) -> Audio:
    """16-bit samples (S,) as floats (S,) that ``to_pcm16`` turns into the same samples again."""
    return np.asarray(samples, dtype=np.float32) / np.float32(PCM16_SCALE)


@contextmanager
def audio_writer(path: Path, sample_rate_hz: int) -> Iterator[Callable[[NDArray[np.floating]], None]]:
    """Yield a function that appends mono samples (S,) in [-1, 1] to a file in the format of its suffix (``WRITABLE``).

    It appears when the block ends well.

    For audio that is too long to be held in memory. UserError for another suffix; a DiskError when the disk refuses.
    """
    kind = writable_kind(path)
    written = 0
    with atomic_file(path) as temporary:
        temporary.touch()
        try:
            with soundfile.SoundFile(temporary, "w", sample_rate_hz, channels=1, format=kind[0], subtype=kind[1]) as file:

                def append(audio: NDArray[np.floating]) -> None:
                    nonlocal written
                    written += len(audio)
                    if kind[0] == "WAV" and 2 * written > LONGEST_WAV_BYTES:
                        raise UserError(f"too long for a WAV file: '{path}' would pass {LONGEST_WAV_BYTES} bytes; write a .flac file")
                    file.write(to_pcm16(audio))

                yield append
            complete = soundfile.info(temporary).frames == written
        except (soundfile.LibsndfileError, AssertionError):
            complete = False
        if not complete:
            raise OSError(errno.ENOSPC, "the disk did not take the whole file")


def write_encoded(
    path: Path, samples: NDArray[Any], sample_rate_hz: int, file_format: str, subtype: str, compression_level: float | None = None
) -> None:
    """Write mono (S,) in a format of libsndfile through ``atomic_file``; a UserError, and no partial file, when the disk refuses.

    libsndfile gets a real file, not a Python buffer: an interrupt inside its write callback would be lost and the file damaged.
    """
    with atomic_file(path) as temporary:
        # Opening it here gives the system's own reason where libsndfile has none.
        temporary.touch()
        _write_checked(temporary, samples, sample_rate_hz, file_format, subtype, compression_level)


def _write_checked(path: Path, samples: NDArray[Any], rate_hz: int, file_format: str, subtype: str, level: float | None) -> None:
    try:
        soundfile.write(path, samples, rate_hz, format=file_format, subtype=subtype, compression_level=level)
        written = soundfile.info(path).frames
    except (soundfile.LibsndfileError, AssertionError):
        # soundfile asserts that all frames were taken, so a full disk shows as an AssertionError.
        written = -1
    if written != samples.size:
        raise OSError(errno.ENOSPC, "the disk did not take the whole file")


def rms_dbfs(audio: Audio) -> float:
    """Root mean square of (S,) in dB relative to full scale; minus infinity for digital silence."""
    mean_square = float(np.mean(np.square(audio, dtype=np.float64)))
    return 10.0 * float(np.log10(mean_square)) if mean_square > 0 else float("-inf")


def clipped_share(audio: Audio, level: float = 0.999, run_samples: int = 3) -> float:
    """Share of the samples of (S,) that lie in runs of at least ``run_samples`` at or above ``level`` of full scale.

    A single sample at full scale is a peak; several in a row are a waveform that was cut off.
    """
    loud = np.abs(audio) >= level
    edges = np.flatnonzero(np.diff(np.concatenate(([False], loud, [False])).astype(np.int8)))
    lengths = edges[1::2] - edges[::2]
    return float(lengths[lengths >= run_samples].sum()) / max(audio.size, 1)


def _require_content(path: Path) -> None:
    if not path.is_file():
        raise AudioError(f"audio file not found: got '{path}', expected a readable audio file; check the path", "missing")
    if path.stat().st_size == 0:
        raise AudioError(f"empty file: '{path}' has 0 bytes, expected audio; record or fetch the file again", "empty")


def _decode(path: Path, longest_seconds: float) -> tuple[Audio, int]:
    if path.suffix.lower() not in HEADERLESS:
        try:
            return _decode_sndfile(path, longest_seconds)
        # A TypeError is the answer to a suffix that means samples without a header.
        except (soundfile.LibsndfileError, OSError, TypeError) as error:
            problem = str(error)
    else:
        problem = "it needs PyAV (`pip install av`)"
    decoded = _decode_av(path, longest_seconds)
    if decoded is None:
        raise AudioError(
            f"unreadable audio: '{path}' ({_one_line(problem)}); expected WAV, FLAC, Ogg, Opus, MP3 or what PyAV decodes; convert it",
            "unreadable",
        )
    return decoded


def _decode_sndfile(path: Path, longest_seconds: float) -> tuple[Audio, int]:
    with soundfile.SoundFile(path) as file:
        most = _most_samples(path, longest_seconds, file.samplerate, file.channels)
        if file.format == "OGG":
            file.seek(0)  # an Opus stream whose granule positions begin late is opened in its middle
        frames = file.read(-1 if most is None else most + 1, dtype="float32", always_2d=True)
        if most is not None and len(frames) > most:
            raise _too_long(path, longest_seconds, file.frames / file.samplerate)
        return np.ascontiguousarray(frames.T), int(file.samplerate)


def _decode_av(path: Path, longest_seconds: float) -> tuple[Audio, int] | None:
    """float32 (channels, S) and the rate by way of PyAV; None when PyAV is absent or finds no audio."""
    try:
        import av
    except ImportError:
        return None
    try:
        with av.open(str(path), format=HEADERLESS.get(path.suffix.lower())) as container:
            if not container.streams.audio:
                return None
            frames = _av_frames(path, container, av.AudioResampler(format="fltp"), longest_seconds)
    except AudioError:
        raise
    except (av.FFmpegError, OSError, ValueError):
        return None
    if not frames:
        return np.zeros((1, 0), dtype=np.float32), 1
    return np.concatenate([frame.to_ndarray() for frame in frames], axis=1), int(frames[0].sample_rate)


def _av_frames(path: Path, container: Any, resampler: Any, longest_seconds: float) -> list[Any]:
    """The frames of the first audio stream, refused as soon as they are too long together."""
    kept: list[Any] = []
    samples = 0
    for frame in itertools.chain(container.decode(audio=0), (None,)):
        for out in resampler.resample(frame):
            kept.append(out)
            samples += out.samples
            most = _most_samples(path, longest_seconds, out.sample_rate, len(out.layout.channels))
            if most is not None and samples > most:
                raise _too_long(path, longest_seconds)
    return kept


def _most_samples(path: Path, longest_seconds: float, rate_hz: int, channels: int) -> int | None:
    """How many samples a channel may have; None for any number."""
    if math.isinf(longest_seconds):
        return None
    if rate_hz * channels > MOST_VALUES_A_SECOND:
        raise AudioError(
            f"too many samples a second in '{path}': got {channels} channels at {rate_hz} Hz, expected at most {MOST_VALUES_A_SECOND} "
            "together; convert it",
            "too long",
        )
    return int(longest_seconds * rate_hz)


def _too_long(path: Path, longest_seconds: float, seconds: float = math.inf) -> AudioError:
    # A file that was written into a pipe doesn't know its length, which reads as the largest there is.
    got = f"{seconds:.2f} s" if longest_seconds < seconds < _LONGEST_BELIEVED_SECONDS else f"more than {longest_seconds:g} s"
    return AudioError(
        f"too long: got {got} of audio in '{path}', expected at most {longest_seconds:g} s; record or cut it again", "too long"
    )


def _one_line(text: str) -> str:
    return " ".join(text.split())
