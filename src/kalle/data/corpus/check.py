"""One item decoded and checked: how long, how loud, fit to use or not; converted where lhotse could not read it."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from kalle.audio import Audio, AudioError, cancelled, clipped_share, load_channels, mix_down, resample, rms_dbfs, write_audio
from kalle.data.corpus.cuts import is_resampled_cheaply
from kalle.data.corpus.items import TAG, PrepareOptions, Rejection, SourceItem, normalised
from kalle.decoding import HEADER, Decoded, Span, open_audio
from kalle.errors import UserError
from kalle.text.tokenizer import unspeakable
from kalle.truncation import refuse_cut_short

ROUNDING_S = 0.1
"""How far a segment may reach beyond its recording, for lists that give times rounded; what is beyond does not exist."""
LONGEST_RECORDING_SECONDS = 4 * 3600.0
"""Of a compressed recording that holds segments: it is decoded as a whole. An hour of mono at 16 kHz takes 230 MB."""
SEEKABLE = frozenset(("WAV", "WAVEX", "FLAC", "AIFF", "AU", "NIST", "RF64", "W64"))
"""Formats of which a part is read quickly and to the sample."""


@dataclass(frozen=True)
class ItemAudio:
    """The samples of an item, float32 (channels, S), or None where only the header was read.

    ``file_samples`` is the length of the whole recording, ``start_samples`` where the item begins in it, all at ``rate_hz``.
    """

    channels: Audio | None
    rate_hz: int
    channel_count: int
    samples: int
    start_samples: int
    file_samples: int


def read_header(item: SourceItem, wanted_hz: int) -> ItemAudio | None:
    """The item's measures from the file's header alone; None where that is not enough: audio that is to be converted, or unreadable.

    Raises AudioError for a segment outside its recording, and for a file that was cut short.
    """
    if item.inside is not None:
        return None
    header = _header(item.audio)
    if header is None or header.channels != 1 or not header.frames or not header.format:
        return None
    if not is_resampled_cheaply(header.rate_hz, wanted_hz):
        return None
    if item.is_segment and header.format not in SEEKABLE:
        return None
    if not item.is_segment:
        refuse_cut_short(item.audio, header.frames / header.rate_hz)
    start, stop = _range(item, header.frames, header.rate_hz)
    return ItemAudio(None, header.rate_hz, 1, stop - start, start, header.frames)


def _header(path: Path) -> Decoded | None:
    """The length and format that the header of ``path`` states; None where it is unreadable."""
    try:
        with open_audio(path, None, HEADER) as header:
            return header if not any(map(len, header.blocks)) else None
    except AudioError:
        return None


def load_sound(item: SourceItem, longest_seconds: float = LONGEST_RECORDING_SECONDS) -> ItemAudio:
    """Decode the item; raises AudioError when it cannot be, lies outside its recording or is longer than ``longest_seconds``.

    No more than that is decoded of an item, and no more than `LONGEST_RECORDING_SECONDS` of one that is read from its start.
    """
    if item.is_segment and (item.duration_s or 0.0) > longest_seconds:
        raise AudioError(f"too long: got {item.duration_s:.3f} s, expected at most {longest_seconds:g} s; cut it", "too long")
    if item.inside is not None:
        channels, rate_hz = _load_inside(item, LONGEST_RECORDING_SECONDS if item.is_segment else longest_seconds)
    elif item.is_segment:
        part = _read_part(item, longest_seconds)
        if part is not None:
            return part
        channels, rate_hz = _load_long(item.audio)
    else:
        channels, rate_hz = load_channels(item.audio, longest_seconds)
        refuse_cut_short(item.audio, channels.shape[1] / rate_hz)
    start, stop = _range(item, channels.shape[1], rate_hz)
    return _sound(item, channels[:, start:stop], rate_hz, start, channels.shape[1])


def _sound(item: SourceItem, channels: Audio, rate_hz: int, start: int, file_samples: int) -> ItemAudio:
    count = channels.shape[0]
    if item.channel is not None:
        if item.channel >= count:
            raise AudioError(f"no channel {item.channel} in '{item.place}': got {count}, counted from 0; correct the list", "unreadable")
        channels = channels[item.channel : item.channel + 1]
    return ItemAudio(channels, rate_hz, count, channels.shape[1], start, file_samples)


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


def _read_part(item: SourceItem, longest_seconds: float) -> ItemAudio | None:
    """The segment alone, where the format allows reading from any place; None where the whole has to be decoded."""
    header = _header(item.audio)
    if header is None or header.frames is None or header.format not in SEEKABLE:
        return None
    start, stop = _range(item, header.frames, header.rate_hz)
    part = Span(start / header.rate_hz, (stop - start) / header.rate_hz)
    channels, rate_hz = load_channels(item.audio, longest_seconds, part)
    if channels.shape[1] < stop - start:
        raise AudioError(f"unreadable audio: '{item.audio}' ends before its header says; fetch it again", "unreadable")
    return _sound(item, channels, rate_hz, start, header.frames)


@lru_cache(maxsize=1)
def _load_long(path: Path) -> tuple[Audio, int]:
    """A whole recording, kept for the next segment of it."""
    return load_channels(path, LONGEST_RECORDING_SECONDS)


def _load_inside(item: SourceItem, longest_seconds: float) -> tuple[Audio, int]:
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
            channels, rate_hz = load_channels(path, longest_seconds)
            if not item.is_segment:
                refuse_cut_short(path, channels.shape[1] / rate_hz)
            return channels, rate_hz
        except AudioError as error:
            raise AudioError(str(error).replace(str(path), item.place), error.reason) from None


@dataclass(frozen=True)
class Kept:
    """An item that passed, with its audio as it is stored: ``audio`` is absolute, or relative to the corpus folder if converted.

    ``stored_samples`` counts the stored file, of which the item begins at ``start_samples`` and lasts ``seconds``.
    """

    id: str
    audio: str
    source: str
    text: str
    speaker: str
    language: str
    split: str
    source_rate_hz: int
    source_channels: int
    stored_rate_hz: int
    stored_samples: int
    seconds: float
    start_samples: int = 0
    decoded: bool = True
    custom: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values, the inverse of ``Kept(**values)``."""
        return asdict(self)


def check_item(item: SourceItem, options: PrepareOptions, out: Path) -> Kept | Rejection:
    """Decode one item and keep or reject it; more than one channel, or a file only PyAV reads, becomes FLAC in ``out``/audio."""
    text = " ".join(item.text.split())
    strange = unspeakable(text)
    if strange:
        detail = (
            f"the text has {strange}, expected words; convert its file to UTF-8 from the encoding it is in, such as Windows-1252 or UTF-16"
        )
        return _rejection(item, "bad entry", detail)
    if not normalised(text):
        return _rejection(item, "no text", f"got '{item.text}', expected words")
    if TAG.fullmatch(text):
        return _rejection(item, "not speech", f"the text is the tag '{text}'")
    try:
        sound = (read_header(item, options.sample_rate_hz) if options.headers_only else None) or load_sound(item, options.max_seconds)
        seconds = sound.samples / sound.rate_hz
    except AudioError as error:
        return _rejection(item, error.reason, str(error))
    except Exception as error:  # whatever a decoder raises for a damaged file; nothing has been written yet
        return _rejection(item, "unreadable", " ".join(f"{type(error).__name__}: {error}".split())[:300])
    problem = _sound_problem(sound, options)
    if problem is not None:
        return _rejection(item, *problem)
    audio, stored_rate_hz, stored_samples, start_samples = _stored(item, sound, options.sample_rate_hz, out)
    return Kept(
        id=item.id,
        audio=audio,
        source=item.place,
        text=text,
        speaker=item.speaker,
        language=item.language,
        split=item.split or options.split.assign(text),
        source_rate_hz=sound.rate_hz,
        source_channels=sound.channel_count,
        stored_rate_hz=stored_rate_hz,
        stored_samples=stored_samples,
        seconds=seconds,
        start_samples=start_samples,
        decoded=sound.channels is not None,
        custom=item.custom,
    )


def _sound_problem(sound: ItemAudio, options: PrepareOptions) -> tuple[str, str] | None:
    """The reason and detail for which a recording is unfit, or None."""
    seconds = sound.samples / sound.rate_hz
    if seconds < options.min_seconds:
        return "too short", f"got {seconds:.3f} s, expected at least {options.min_seconds} s"
    if seconds > options.max_seconds:
        return "too long", f"got {seconds:.3f} s, expected at most {options.max_seconds} s"
    if sound.channels is None:
        return None
    mixed = mix_down(sound.channels)
    opposite = cancelled(mixed, np.mean(np.square(sound.channels, dtype=np.float64), axis=1))
    if opposite:
        return "silent", opposite
    level = rms_dbfs(mixed)
    if level < options.silent_below_dbfs:
        return "silent", f"got {level:.1f} dBFS, expected at least {options.silent_below_dbfs} dBFS"
    # Averaging hides a clipped channel, so each is looked at by itself.
    clipped = max(clipped_share(channel) for channel in sound.channels)
    if clipped > options.max_clipped_share:
        return "clipped", f"got {clipped:.4f} of the samples at full scale, expected at most {options.max_clipped_share}"
    return None


def _stored(item: SourceItem, sound: ItemAudio, wanted_hz: int, out: Path) -> tuple[str, int, int, int]:
    """Path, rate, length and first sample of what the cut will read: the original where lhotse reads it as mono, else a FLAC."""
    plain = sound.channel_count == 1 and item.inside is None and is_resampled_cheaply(sound.rate_hz, wanted_hz)
    if sound.channels is None or (plain and _soundfile_agrees(item, sound)):
        return str(item.audio), sound.rate_hz, sound.file_samples, sound.start_samples
    relative = f"audio/{item.id}.flac"
    _refuse_itself(item.audio, out, out / relative)
    converted = resample(mix_down(sound.channels), sound.rate_hz, wanted_hz)
    write_audio(out / relative, converted, wanted_hz)
    return relative, wanted_hz, converted.size, 0


def _refuse_itself(audio: Path, out: Path, place: Path) -> None:
    """A UserError where ``place`` in the corpus ``out`` is the recording ``audio`` itself, through links too."""
    with suppress(OSError):  # nothing is there
        if place.samefile(audio):
            raise replaces_source(out, audio)


def replaces_source(out: Path, taken: Path) -> UserError:
    """The refusal of a corpus folder ``out`` in which a file would take the place of ``taken``, of its source."""
    return UserError(
        f"the corpus would replace its source: got '{out}', where a file takes the place of '{taken}', expected a folder beside the "
        "source; choose another one"
    )


def _soundfile_agrees(item: SourceItem, sound: ItemAudio) -> bool:
    """Whether lhotse, which by itself reads from where libsndfile opens a file, gets the samples that were checked."""
    file = _header(item.audio)
    if file is None or not file.format or (item.is_segment and file.format not in SEEKABLE):
        return False
    if (file.rate_hz, file.frames, file.channels) != (sound.rate_hz, sound.file_samples, 1):
        return False
    if file.format != "OGG":
        return True
    # An Ogg stream that begins late is opened in its middle.
    try:
        opened, _ = load_channels(item.audio, LONGEST_RECORDING_SECONDS, Span(as_opened=True))
        return sound.channels is not None and np.array_equal(opened, sound.channels)
    except AudioError:
        return False


def _rejection(item: SourceItem, reason: str, detail: str) -> Rejection:
    return Rejection(item.id, item.place, reason, detail)
