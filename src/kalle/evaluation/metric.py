"""What every metric is: something that scores one item, and says how its numbers are averaged over many."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from kalle.audio import Audio

RATE_HZ = 16000
"""Every metric here works at this rate."""
TEXT = "text"
RECORDING = "recording"
ALIGNED = "aligned"
SPEAKER = "speaker"
Value = float | str


class MetricError(ValueError):
    """One item cannot be scored by one metric (silence for PESQ, say): the row says so and the report counts it."""


@dataclass(frozen=True)
class ScoreItem:
    """One piece of audio to score, and what it is compared with; audio is mono float32 (S,) at 16 kHz."""

    id: str
    audio: Audio
    text: str
    language: str = "en"
    recording: Audio | None = None
    """A recording of the same text."""
    aligned: bool = False
    """Whether ``audio`` and ``recording`` run in step, as a reconstruction does and a synthesis does not."""
    speaker: Audio | None = None
    """The prompt, or another recording of the speaker to resemble."""

    def offers(self) -> frozenset[str]:
        """What of text, recording, aligned, speaker a metric may ask of this item."""
        present = {TEXT: bool(self.text.strip()), RECORDING: self.recording is not None, SPEAKER: self.speaker is not None}
        present[ALIGNED] = self.aligned and self.recording is not None
        return frozenset(name for name, there in present.items() if there)

    def pair(self) -> tuple[Audio, Audio]:
        """Recording and audio, both cropped to the shorter."""
        assert self.recording is not None, f"'{self.id}' has no recording"
        length = min(len(self.recording), len(self.audio))
        return self.recording[:length], self.audio[:length]


@dataclass(frozen=True)
class Aggregate:
    """A number of the summary: the mean of column ``numerator``, or the sum of it over the sum of ``denominator``."""

    name: str
    numerator: str
    denominator: str | None = None
    lower_is_better: bool | None = None


@runtime_checkable
class Metric(Protocol):
    """Scores one item; an object of a few lines can be one."""

    name: str
    needs: frozenset[str]
    """Which of ``ScoreItem.offers`` it cannot do without."""
    aggregates: tuple[Aggregate, ...]

    def __call__(self, item: ScoreItem) -> Mapping[str, Value]:
        """The item's columns: finite numbers, or strings to keep. MetricError when this item cannot be scored."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Model, versions and settings, for the report."""
        ...
