"""One item heard: how long, how loud, fit to use or not, and converted where lhotse could not read it as it lies."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from kalle.audio import Audio, AudioError, clipped_share, load_channels, resample, rms_dbfs, write_audio
from kalle.data.corpora.items import TAG, Rejection, SourceItem
from kalle.data.prepare_split import SplitPolicy, normalised
from kalle.errors import UserError


@dataclass(frozen=True)
class PrepareOptions:
    """What decides about an item; lengths in seconds, levels of full scale."""

    sample_rate_hz: int = 16000
    min_seconds: float = 0.3
    max_seconds: float = 30.0
    silent_below_dbfs: float = -60.0
    max_clipped_share: float = 0.001
    split: SplitPolicy = field(default_factory=SplitPolicy)

    def __post_init__(self) -> None:
        if not 0 <= self.min_seconds < self.max_seconds:
            raise UserError(
                f"length limits: got {self.min_seconds} to {self.max_seconds} s, expected 0 <= --min-seconds < --max-seconds; change them"
            )


@dataclass(frozen=True)
class Kept:
    """An item that passed, with its audio as it is stored: ``audio`` is absolute, or relative to the corpus folder if converted."""

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
        channels, rate_hz = load_channels(item.audio)
    except AudioError as error:
        return _rejection(item, error.reason, str(error))
    mono = channels.mean(axis=0, dtype=np.float32)
    problem = _sound_problem(channels, mono, rate_hz, options)
    if problem is not None:
        return _rejection(item, *problem)
    audio, stored_rate_hz, stored_samples = _stored(item, channels, mono, rate_hz, options.sample_rate_hz, out)
    return Kept(
        id=item.id,
        audio=audio,
        source=str(item.audio),
        text=text,
        speaker=item.speaker,
        language=item.language,
        split=item.split or options.split.assign(text),
        source_rate_hz=rate_hz,
        source_channels=channels.shape[0],
        stored_rate_hz=stored_rate_hz,
        stored_samples=stored_samples,
        seconds=mono.size / rate_hz,
    )


def _sound_problem(channels: Audio, mono: Audio, rate_hz: int, options: PrepareOptions) -> tuple[str, str] | None:
    """The reason and detail for which a recording is unfit, or None."""
    seconds = mono.size / rate_hz
    if seconds < options.min_seconds:
        return "too short", f"got {seconds:.3f} s, expected at least {options.min_seconds} s"
    if seconds > options.max_seconds:
        return "too long", f"got {seconds:.3f} s, expected at most {options.max_seconds} s"
    level = rms_dbfs(mono)
    if level < options.silent_below_dbfs:
        return "silent", f"got {level:.1f} dBFS, expected at least {options.silent_below_dbfs} dBFS"
    # Averaging hides a clipped channel, so each is looked at by itself.
    clipped = max(clipped_share(channel) for channel in channels)
    if clipped > options.max_clipped_share:
        return "clipped", f"got {clipped:.4f} of the samples at full scale, expected at most {options.max_clipped_share}"
    return None


def _stored(item: SourceItem, channels: Audio, mono: Audio, rate_hz: int, wanted_hz: int, out: Path) -> tuple[str, int, int]:
    """Path, rate and samples of the file that the cut will read: the original where lhotse reads it as mono, else a FLAC."""
    if channels.shape[0] == 1 and _soundfile_agrees(item.audio, rate_hz, mono.size):
        return str(item.audio), rate_hz, mono.size
    relative = f"audio/{item.id}.flac"
    converted = resample(mono, rate_hz, wanted_hz)
    write_audio(out / relative, converted, wanted_hz)
    return relative, wanted_hz, converted.size


def _soundfile_agrees(path: Path, rate_hz: int, samples: int) -> bool:
    try:
        info = soundfile.info(path)
    except (soundfile.LibsndfileError, OSError):
        return False
    return info.samplerate == rate_hz and info.frames == samples and info.channels == 1


def _rejection(item: SourceItem, reason: str, detail: str) -> Rejection:
    return Rejection(item.id, str(item.audio), reason, detail)
