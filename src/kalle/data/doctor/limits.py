"""Every threshold of the corpus doctor, once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from kalle.errors import UserError


@dataclass(frozen=True)
class Limits:
    """From where on an item is flagged, and from which share of flagged items on a corpus is worth a look, or bad."""

    look_share: float = 0.001
    """Share of flagged items above which a check says "look"; below it a large corpus is as good as corpora get."""
    bad_share: float = 0.05
    """Share of flagged items above which a check says "bad"."""
    min_seconds: float = 0.3
    max_seconds: float = 30.0
    min_loudness_lufs: float = -45.0
    max_loudness_lufs: float = -8.0
    max_loudness_offset_db: float = 12.0
    """Distance from the median loudness of the corpus."""
    max_leading_s: float = 1.0
    max_trailing_s: float = 1.0
    max_pause_s: float = 2.0
    """Longest silence between two sounds."""
    max_inner_silence_share: float = 0.5
    """Share of the time between the first and the last sound that is silent."""
    max_clipped_share: float = 0.001
    """Share of samples in flat tops, at full scale or at the recording's own peak."""
    min_bandwidth_share: float = 0.75
    """Of half the sample rate; below it the audio was recorded, coded or sent with less than the file promises."""
    max_letters_per_s: float = 30.0
    max_signs_per_s: float = 14.0
    """Ideographs, kana or hangul."""
    min_letters_per_s: float = 1.0
    min_signs_per_s: float = 0.4
    outlier_z: float = 5.0
    """Robust z of the log rate among texts of like length and language."""
    min_outlier_ratio: float = 1.8
    """An outlier is also this many times faster or slower than its like: in a very even corpus a large z means little."""
    min_like_items: int = 20
    """With fewer items of a language nothing is said about outliers."""
    max_foreign_share: float = 0.3
    """Share of letters that are not in a script of the item's language."""
    look_repeated_share: float = 0.2
    """Share of items that repeat a text of the same speaker."""
    min_speaker_minutes: float = 1.0
    max_speaker_share: float = 0.5
    """Share of the audio of one speaker among several."""

    def __post_init__(self) -> None:
        if not 0 <= self.look_share <= self.bad_share <= 1:
            raise UserError(f"limits: got look_share {self.look_share} and bad_share {self.bad_share}, expected 0 <= look <= bad <= 1")


def limits_from(settings: list[str]) -> Limits:
    """`Limits` with ``NAME=NUMBER`` settings applied; a UserError lists the names there are."""
    defaults = {field.name: getattr(Limits(), field.name) for field in fields(Limits)}
    changed: dict[str, Any] = {}
    for setting in settings:
        name, _, value = setting.partition("=")
        if name not in defaults:
            raise UserError(f"unknown limit: got '{setting}', expected NAME=NUMBER with one of {', '.join(defaults)}")
        try:
            changed[name] = type(defaults[name])(value)
        except ValueError:
            raise UserError(f"bad limit: got '{setting}', expected {name}=NUMBER, such as {name}={defaults[name]}") from None
    return Limits(**changed)
