"""One item heard: how long, how loud, fit to use or not, and converted where lhotse could not read it as it lies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from kalle.audio import AudioError, clipped_share, resample, rms_dbfs, write_audio
from kalle.data.corpora.items import TAG, Rejection, SourceItem
from kalle.data.item_audio import SEEKABLE, Sound, load_sound, read_header
from kalle.data.prepare_split import SplitPolicy, normalised
from kalle.errors import UserError


@dataclass(frozen=True)
class PrepareOptions:
    """What decides about an item; lengths in seconds, levels of full scale.

    ``headers_only`` believes the headers: silence, clipping and damage inside a file are not noticed. Items that must be converted are
    decoded, and checked in full, all the same.
    """

    sample_rate_hz: int = 16000
    min_seconds: float = 0.3
    max_seconds: float = 30.0
    silent_below_dbfs: float = -60.0
    max_clipped_share: float = 0.001
    headers_only: bool = False
    split: SplitPolicy = field(default_factory=SplitPolicy)

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds < self.max_seconds:
            raise UserError(
                f"length limits: got {self.min_seconds} to {self.max_seconds} s, expected 0 <= --min-seconds < --max-seconds; change them"
            )


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
    """Listen to one item and keep or reject it; more than one channel, or a file only PyAV reads, becomes FLAC in ``out``/audio."""
    text = " ".join(item.text.split())
    if not normalised(text):
        return _rejection(item, "no text", f"got '{item.text}', expected words")
    if TAG.fullmatch(text):
        return _rejection(item, "not speech", f"the text is the tag '{text}'")
    try:
        sound = (read_header(item) if options.headers_only else None) or load_sound(item)
    except AudioError as error:
        return _rejection(item, error.reason, str(error))
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
        seconds=sound.samples / sound.rate_hz,
        start_samples=start_samples,
        decoded=sound.channels is not None,
        custom=item.custom,
    )


def _sound_problem(sound: Sound, options: PrepareOptions) -> tuple[str, str] | None:
    """The reason and detail for which a recording is unfit, or None."""
    seconds = sound.samples / sound.rate_hz
    if seconds < options.min_seconds:
        return "too short", f"got {seconds:.3f} s, expected at least {options.min_seconds} s"
    if seconds > options.max_seconds:
        return "too long", f"got {seconds:.3f} s, expected at most {options.max_seconds} s"
    if sound.channels is None:
        return None
    level = rms_dbfs(sound.channels.mean(axis=0, dtype=np.float32))
    if level < options.silent_below_dbfs:
        return "silent", f"got {level:.1f} dBFS, expected at least {options.silent_below_dbfs} dBFS"
    # Averaging hides a clipped channel, so each is looked at by itself.
    clipped = max(clipped_share(channel) for channel in sound.channels)
    if clipped > options.max_clipped_share:
        return "clipped", f"got {clipped:.4f} of the samples at full scale, expected at most {options.max_clipped_share}"
    return None


def _stored(item: SourceItem, sound: Sound, wanted_hz: int, out: Path) -> tuple[str, int, int, int]:
    """Path, rate, length and first sample of what the cut will read: the original where lhotse reads it as mono, else a FLAC."""
    if sound.channels is None or (sound.channel_count == 1 and item.inside is None and _soundfile_agrees(item, sound)):
        return str(item.audio), sound.rate_hz, sound.file_samples, sound.start_samples
    relative = f"audio/{item.id}.flac"
    converted = resample(sound.channels.mean(axis=0, dtype=np.float32), sound.rate_hz, wanted_hz)
    write_audio(out / relative, converted, wanted_hz)
    return relative, wanted_hz, converted.size, 0


def _soundfile_agrees(item: SourceItem, sound: Sound) -> bool:
    try:
        info = soundfile.info(item.audio)
    except (soundfile.LibsndfileError, OSError):
        return False
    seekable = not item.is_segment or info.format in SEEKABLE
    return seekable and info.samplerate == sound.rate_hz and info.frames == sound.file_samples and info.channels == 1


def _rejection(item: SourceItem, reason: str, detail: str) -> Rejection:
    return Rejection(item.id, item.place, reason, detail)
