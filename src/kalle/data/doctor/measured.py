"""One item of a corpus, and what was measured of its sound."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from lhotse.cut import Cut

from kalle.audio import to_pcm16
from kalle.data.doctor.sound import flat_share, loudness_lufs, silence
from kalle.data.doctor.spectrum import BANDS, spectrum

MEASURES_VERSION = 1
"""Counts up when a measure changes its meaning, so that kept measurements are not reused."""


@dataclass(frozen=True)
class Sound:
    """Seconds, levels and shares of one item's audio at the corpus' sample rate; ``problem`` says why there are none."""

    seconds: float = 0.0
    digest: str = ""
    """SHA-256 of the decoded samples as 16-bit integers."""
    loudness_lufs: float | None = None
    """None for silence."""
    leading_s: float = 0.0
    trailing_s: float = 0.0
    pause_s: float = 0.0
    inner_silence_share: float = 0.0
    clipped_share: float = 0.0
    bandwidth_hz: float = 0.0
    bands_db: tuple[int, ...] = (0,) * BANDS
    problem: str = ""

    @property
    def spoken_s(self) -> float:
        """Seconds from the first to the last sound."""
        return max(self.seconds - self.leading_s - self.trailing_s, 1e-3)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Sound:
        """From the values of `to_dict` after a journey through JSON."""
        return cls(**{**values, "bands_db": tuple(values["bands_db"])})


@dataclass(frozen=True)
class Item:
    """An item of the corpus: what is said of it, and what was measured."""

    id: str
    split: str
    text: str
    speaker: str
    language: str
    sample_rate_hz: int
    sound: Sound

    @property
    def key(self) -> tuple[str, str]:
        """Split and id, which together name one item."""
        return self.split, self.id


def item_of(cut: Cut, split: str, sound: Sound) -> Item:
    """The item of a cut, the texts of its supervisions joined by spaces."""
    said = cut.supervisions
    text = " ".join((supervision.text or "").strip() for supervision in said).strip()
    speaker, language = (said[0].speaker or "", said[0].language or "") if said else ("", "")
    return Item(cut.id, split, text, speaker, language, int(cut.sampling_rate), sound)


def measure(cut: Cut) -> Sound:
    """Load and measure one cut's audio, channels averaged; audio that cannot be read is a `Sound` with a problem, not an error."""
    rate_hz = int(cut.sampling_rate)
    try:
        channels = np.asarray(cut.load_audio(), dtype=np.float32)
    except Exception as error:  # whatever a decoder raises for a broken file
        return Sound(seconds=float(cut.duration), problem=" ".join(f"{type(error).__name__}: {error}".split())[:300])
    audio = channels.mean(axis=0) if channels.ndim == 2 else channels
    if audio.size == 0 or not np.isfinite(audio).all():
        return Sound(seconds=float(cut.duration), problem="no samples" if audio.size == 0 else "NaN or infinite samples")
    gaps, heard, loudness = silence(audio, rate_hz), spectrum(audio, rate_hz), loudness_lufs(audio, rate_hz)
    return Sound(
        seconds=audio.size / rate_hz,
        digest=hashlib.sha256(to_pcm16(audio).tobytes()).hexdigest(),
        loudness_lufs=round(loudness, 2) if np.isfinite(loudness) else None,
        leading_s=round(gaps.leading_s, 3),
        trailing_s=round(gaps.trailing_s, 3),
        pause_s=round(gaps.pause_s, 3),
        inner_silence_share=round(gaps.inner_share, 4),
        clipped_share=flat_share(audio),
        bandwidth_hz=heard.bandwidth_hz,
        bands_db=heard.bands_db,
    )


def audio_stamp(cut: Cut) -> str:
    """Size and modification time of the files behind a cut: what tells that a kept measurement is out of date."""
    stamps = []
    for source in getattr(cut, "recording", None).sources if getattr(cut, "has_recording", False) else []:  # type: ignore[union-attr]
        path = Path(str(source.source))
        stat = path.stat() if source.type == "file" and path.is_file() else None
        stamps.append(f"{stat.st_size}-{stat.st_mtime_ns}" if stat else "-")
    return ",".join(stamps)
