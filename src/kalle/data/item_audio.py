"""The sound of one item: a whole file, a part of one, or a recording inside an archive."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import soundfile

from kalle.audio import Audio, AudioError, load_channels
from kalle.data.corpora.items import SourceItem

ROUNDING_S = 0.1
"""How far a segment may reach beyond its recording, for lists that give times rounded; what is beyond does not exist."""
SEEKABLE = frozenset(("WAV", "WAVEX", "FLAC", "AIFF", "AU", "NIST", "RF64", "W64"))
"""Formats of which a part is read quickly and to the sample."""


@dataclass(frozen=True)
class Sound:
    """What an item sounds like: float32 (channels, S), or None where only the header was read.

    ``file_samples`` is the length of the whole recording, ``start_samples`` where the item begins in it, all at ``rate_hz``.
    """

    channels: Audio | None
    rate_hz: int
    channel_count: int
    samples: int
    start_samples: int
    file_samples: int


def read_header(item: SourceItem) -> Sound | None:
    """The item's measures from the file's header alone; None where that is not enough: audio that is to be converted, or unreadable.

    Raises AudioError for a segment outside its recording.
    """
    if item.inside is not None:
        return None
    try:
        info = soundfile.info(item.audio)
    except (soundfile.LibsndfileError, OSError, TypeError):
        return None
    if info.channels != 1 or info.frames <= 0 or (item.is_segment and info.format not in SEEKABLE):
        return None
    start, stop = _range(item, info.frames, info.samplerate)
    return Sound(None, info.samplerate, 1, stop - start, start, info.frames)


def load_sound(item: SourceItem) -> Sound:
    """Decode the item; raises AudioError when it cannot be, or lies outside its recording."""
    if item.inside is not None:
        channels, rate_hz = _load_inside(item)
    elif item.is_segment:
        part = _read_part(item)
        if part is not None:
            return part
        channels, rate_hz = _load_long(item.audio)
    else:
        channels, rate_hz = load_channels(item.audio)
    start, stop = _range(item, channels.shape[1], rate_hz)
    return _sound(item, channels[:, start:stop], rate_hz, start, channels.shape[1])


def _sound(item: SourceItem, channels: Audio, rate_hz: int, start: int, file_samples: int) -> Sound:
    count = channels.shape[0]
    if item.channel is not None:
        if item.channel >= count:
            raise AudioError(f"no channel {item.channel} in '{item.place}': got {count}, counted from 0; correct the list", "unreadable")
        channels = channels[item.channel : item.channel + 1]
    return Sound(channels, rate_hz, count, channels.shape[1], start, file_samples)


def _range(item: SourceItem, samples: int, rate_hz: int) -> tuple[int, int]:
    """First and last sample (exclusive) of the item in a recording of ``samples``."""
    start = round(item.start_s * rate_hz)
    stop = samples if item.duration_s is None else round((item.start_s + item.duration_s) * rate_hz)
    if start < 0 or start >= samples or stop <= start or stop > samples + ROUNDING_S * rate_hz:
        raise AudioError(
            f"outside the recording: got {start / rate_hz:.3f} to {stop / rate_hz:.3f} s of '{item.place}', which has "
            f"{samples / rate_hz:.3f} s; correct the times",
            "outside the recording",
        )
    return start, min(stop, samples)


def _read_part(item: SourceItem) -> Sound | None:
    """The segment alone, where the format can be entered anywhere; None where the whole has to be decoded."""
    try:
        with soundfile.SoundFile(item.audio) as file:
            if file.format not in SEEKABLE:
                return None
            start, stop = _range(item, file.frames, file.samplerate)
            file.seek(start)
            frames = file.read(stop - start, dtype="float32", always_2d=True)
            rate_hz, file_samples = int(file.samplerate), int(file.frames)
    except (soundfile.LibsndfileError, OSError, TypeError):
        return None
    channels = np.ascontiguousarray(frames.T)
    if channels.shape[1] < stop - start:
        raise AudioError(f"unreadable audio: '{item.audio}' ends before its header says; fetch it again", "unreadable")
    if not np.isfinite(channels).all():
        raise AudioError(f"not finite: '{item.audio}' holds NaN or infinite samples; export it again", "not finite")
    return _sound(item, channels, rate_hz, start, file_samples)


@lru_cache(maxsize=1)
def _load_long(path: Path) -> tuple[Audio, int]:
    """A whole recording, kept for the next segment of it."""
    return load_channels(path)


def _load_inside(item: SourceItem) -> tuple[Audio, int]:
    assert item.inside is not None
    try:
        content = item.inside.read(item.audio)
    except (OSError, EOFError, KeyError, IndexError) as error:
        raise AudioError(f"unreadable audio: '{item.place}' ({error}); fetch the archive again", "unreadable") from None
    # A decoder that needs a file gets one; it never holds more than this recording.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"audio{Path(item.inside.name).suffix}"
        path.write_bytes(content)
        try:
            return load_channels(path)
        except AudioError as error:
            raise AudioError(str(error).replace(str(path), item.place), error.reason) from None
