"""Audio files in and out: mixed down and resampled to mono float32 in [-1, 1] on reading, written atomically as 16 bits."""

from __future__ import annotations

import errno
import math
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from kalle.decoding import WHOLE, AudioError, Decoded, Span, empty_audio, open_audio, sndfile_name
from kalle.errors import UserError
from kalle.files import atomic_file
from kalle.truncation import refuse_cut_short

Audio = NDArray[np.float32]
WAV_HEADER = struct.Struct("<4sI4s4sIHHIIHH4sI")
"""RIFF header, format chunk and the head of the data chunk of a PCM file."""
UNKNOWN_SIZE = 0xFFFFFFFF
"""The size that a WAV states in a pipe, where it cannot be written later."""
PCM16_SCALE = 32767.0
LONGEST_WAV_BYTES = 2**32 - 4096
"""A WAV file counts its bytes in 32 bits."""
SILENT_BELOW_LOUDEST_DB = 40.0
"""A channel whose level lies further below the loudest one's is silent: it is not counted when channels are averaged."""
CANCELLED_DB = 30.0
"""A mix whose level lies further below the loudest channel's is no mix: the channels are opposite and cancel each other."""
WRITABLE = {
    ".wav": ("WAV", "PCM_16"),
    ".flac": ("FLAC", "PCM_16"),
    ".mp3": ("MP3", "MPEG_LAYER_III"),
    ".opus": ("OGG", "OPUS"),
    ".ogg": ("OGG", "VORBIS"),
}
"""Suffix -> format and encoding of libsndfile."""


def load_channels(path: str | Path, longest_seconds: float | None = None, span: Span = WHOLE) -> tuple[Audio, int]:
    """Decode a file, or a ``span`` of it, as it is stored: float32 (channels, S) and its sample rate in Hz.

    libsndfile reads it, else PyAV where that is installed (`kalle.decoding`). Raises AudioError when the file is missing, unreadable,
    without samples, has more than 64 channels, or holds NaN or infinity; with ``longest_seconds`` also when it is longer: by its header
    before anything is decoded, and else before more than that is kept, for a small file can hold hours of silence.
    A WAV file whose header was never finished (0 samples, followed by samples) is read to its end, with a warning in the log.
    """
    path = Path(path)
    with open_audio(path, longest_seconds, span) as decoded:
        blocks = list(decoded.blocks)
        channels = np.ascontiguousarray(np.concatenate(blocks).T) if blocks else np.zeros((decoded.channels, 0), np.float32)
    if channels.shape[1] == 0:
        raise empty_audio(path)
    return channels, decoded.rate_hz


def load_mono(path: str | Path, longest_seconds: float | None = None) -> tuple[Audio, int]:
    """Decode a whole file and mix its channels down as ``mix_down`` does: float32 (S,) and its sample rate.

    Errors as `load_channels`, and an AudioError for channels that cancel each other and for a file that was cut short.
    """
    path = Path(path)
    with open_audio(path, longest_seconds) as decoded:
        mono, samples = _mixed(path, decoded, lambda total, last: total)
    if not len(mono):
        raise empty_audio(path)
    refuse_cut_short(path, samples / decoded.rate_hz)
    return mono, decoded.rate_hz


def read_audio(path: str | Path, sample_rate_hz: int = 16000, longest_seconds: float | None = None) -> Audio:
    """Read a file as mono float32 (S,) at ``sample_rate_hz``: channels are averaged (`mix_down`), another rate is resampled.

    It is decoded in blocks, so memory is 4 bytes a sample of the result. Raises AudioError (a UserError) as `load_mono` does.
    """
    return read_with_rate(path, sample_rate_hz, longest_seconds)[0]


def read_with_rate(path: str | Path, sample_rate_hz: int = 16000, longest_seconds: float | None = None) -> tuple[Audio, int]:
    """The audio that `read_audio` returns, and the rate in Hz at which the file is stored."""
    path = Path(path)
    with open_audio(path, longest_seconds) as decoded:
        if decoded.rate_hz == sample_rate_hz:
            mono, samples = _mixed(path, decoded, lambda total, last: total)
        else:
            _check_rates(decoded.rate_hz, sample_rate_hz)
            stream = soxr.ResampleStream(decoded.rate_hz, sample_rate_hz, 1, dtype="float32")
            mono, samples = _mixed(path, decoded, stream.resample_chunk)
    if not len(mono):
        raise AudioError(f"no audio in '{path}': too short for one sample at {sample_rate_hz} Hz; record it again", "empty")
    refuse_cut_short(path, samples / decoded.rate_hz)
    return mono, decoded.rate_hz


def mix_down(channels: Audio) -> Audio:
    """The average (S,) of those of ``channels`` (C, S) that are not silent.

    A channel more than `SILENT_BELOW_LOUDEST_DB` below the loudest one does not count: speech on one of six channels keeps its level,
    where the average of all six would be 16 dB quieter. Two channels of speech are averaged as ever.
    """
    power = np.mean(np.square(channels, dtype=np.float64), axis=1)
    return np.asarray(channels.sum(axis=0, dtype=np.float32) / np.float32(_active(power)), dtype=np.float32)


def _active(power: NDArray[np.float64]) -> int:
    """How many channels of that ``power`` (C,) are not silent; all when all are."""
    return int(np.count_nonzero(power >= power.max() * 10 ** (-SILENT_BELOW_LOUDEST_DB / 10))) if power.size else 1


def cancelled(mixed: Audio, power: NDArray[np.float64]) -> str:
    """The levels, in words, where the channels of mean ``power`` (C,) cancel each other in their mix (S,); empty where they don't."""
    loudest = float(power.max(initial=0.0))
    level = rms_dbfs(mixed)
    loudest_db = 10 * math.log10(loudest) if loudest > 0 else -math.inf
    if len(power) < 2 or loudest == 0 or level >= loudest_db - CANCELLED_DB:
        return ""
    return (
        f"opposite channels: got a mix of {level:.1f} dBFS from channels of {loudest_db:.1f} dBFS, which cancel out, expected channels "
        "of the same phase; keep one of them, or turn one over"
    )


def _mixed(path: Path, decoded: Decoded, further: Callable[[Audio, bool], Audio]) -> tuple[Audio, int]:
    """The mix of all blocks, each sent through ``further`` (sum of the channels, whether it is the last), and how many samples they had."""
    power, parts, samples = np.zeros(decoded.channels), [], 0
    # Silent channels add nothing to the sum, so that how many there are may be known at the end.
    for block in decoded.blocks:
        power += np.square(block, dtype=np.float64).sum(axis=0)
        samples += len(block)
        parts.append(further(block.sum(axis=1, dtype=np.float32), False))
    parts.append(further(np.zeros(0, np.float32), True))
    mono = np.concatenate(parts)
    mono /= np.float32(_active(power))
    if len(mono) and (problem := cancelled(mono, power / samples)):
        raise AudioError(f"{problem} ('{path}')", "silent")
    return mono, samples


def resample(audio: Audio, from_hz: int, to_hz: int) -> Audio:
    """Band-limited resampling of mono float32 (S,) to (about S * to_hz / from_hz,); a UserError for a rate that is none."""
    _check_rates(from_hz, to_hz)
    if from_hz == to_hz:
        return np.ascontiguousarray(audio, dtype=np.float32)
    return np.asarray(soxr.resample(audio, from_hz, to_hz), dtype=np.float32)


def _check_rates(*rates_hz: int) -> None:
    for rate_hz in rates_hz:
        if not rate_hz > 0:
            raise UserError(f"bad sample rate: got {rate_hz} Hz, expected more than 0; give the rate the audio was recorded at")


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


def wav_header(sample_rate_hz: int, data_bytes: int | None) -> bytes:
    """The 44 bytes in front of ``data_bytes`` of 16-bit mono; None for a stream whose length is not known."""
    size = UNKNOWN_SIZE if data_bytes is None else data_bytes
    whole = UNKNOWN_SIZE if data_bytes is None else WAV_HEADER.size - 8 + data_bytes
    rate, width = sample_rate_hz, 2
    return WAV_HEADER.pack(b"RIFF", whole, b"WAVE", b"fmt ", 16, 1, 1, rate, rate * width, width, 8 * width, b"data", size)


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
            with soundfile.SoundFile(sndfile_name(temporary), "w", sample_rate_hz, channels=1, format=kind[0], subtype=kind[1]) as file:

                def append(audio: NDArray[np.floating]) -> None:
                    nonlocal written
                    written += len(audio)
                    if kind[0] == "WAV" and 2 * written > LONGEST_WAV_BYTES:
                        raise UserError(f"too long for a WAV file: '{path}' would pass {LONGEST_WAV_BYTES} bytes; write a .flac file")
                    file.write(to_pcm16(audio))

                yield append
            complete = soundfile.info(sndfile_name(temporary)).frames == written
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
        soundfile.write(sndfile_name(path), samples, rate_hz, format=file_format, subtype=subtype, compression_level=level)
        written = soundfile.info(sndfile_name(path)).frames
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
