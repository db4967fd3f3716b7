"""Checks of the sound alone: readable, length, loudness, silence, clipping, bandwidth."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from kalle.data.doctor.findings import Finding, Flag, flagged_finding, spread
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item, Sound


def readable(items: Sequence[Item], limits: Limits) -> Finding:
    """Audio that cannot be decoded, or holds no numbers."""
    flags = [Flag("unreadable", *item.key, item.sound.problem) for item in items if item.sound.problem]
    remedy = "fetch or convert these files again, or leave the items out"
    return flagged_finding("unreadable", items, flags, limits, "none may be", remedy, {})


def duration(items: Sequence[Item], limits: Limits) -> Finding:
    """Items that are too short to hold speech or too long for a batch."""
    flags = []
    for item in heard(items):
        if not limits.min_seconds <= item.sound.seconds <= limits.max_seconds:
            flags.append(Flag("duration", *item.key, f"{item.sound.seconds:.2f} s long"))
    seconds = [item.sound.seconds for item in heard(items)]
    numbers = {"hours": round(sum(seconds) / 3600, 4), "seconds": spread(seconds)}
    threshold = f"{limits.min_seconds:g} to {limits.max_seconds:g} s"
    return flagged_finding("duration", items, flags, limits, threshold, "cut long items at pauses; drop those without speech", numbers)


def loudness(items: Sequence[Item], limits: Limits) -> Finding:
    """Items far from the corpus' usual loudness, or beyond what anybody records on purpose."""
    levels = [item.sound.loudness_lufs for item in heard(items) if item.sound.loudness_lufs is not None]
    median = float(np.median(levels)) if levels else 0.0
    flags = []
    for item in heard(items):
        level = item.sound.loudness_lufs
        if level is None:
            flags.append(Flag("loudness", *item.key, "silent"))
        elif not limits.min_loudness_lufs <= level <= limits.max_loudness_lufs:
            flags.append(Flag("loudness", *item.key, f"{level:.1f} LUFS"))
        elif abs(level - median) > limits.max_loudness_offset_db:
            flags.append(Flag("loudness", *item.key, f"{level:.1f} LUFS, {level - median:+.1f} dB from the median"))
    threshold = (
        f"{limits.min_loudness_lufs:g} to {limits.max_loudness_lufs:g} LUFS, within {limits.max_loudness_offset_db:g} dB of the median"
    )
    remedy = "bring the items to one loudness; drop silent ones"
    return flagged_finding("loudness", items, flags, limits, threshold, remedy, {"lufs": spread(levels, 1)})


def silences(items: Sequence[Item], limits: Limits) -> Finding:
    """Long silence before, after or inside the speech."""
    flags = [Flag("silence", *item.key, reason) for item in heard(items) if (reason := _silence_reason(item.sound, limits))]
    numbers = {
        "leading_s": spread([item.sound.leading_s for item in heard(items)]),
        "trailing_s": spread([item.sound.trailing_s for item in heard(items)]),
        "longest_pause_s": spread([item.sound.pause_s for item in heard(items)]),
        "inner_share": spread([item.sound.inner_silence_share for item in heard(items)]),
    }
    threshold = (
        f"leading {limits.max_leading_s:g} s, trailing {limits.max_trailing_s:g} s, pause {limits.max_pause_s:g} s, "
        f"inside {limits.max_inner_silence_share:.0%}"
    )
    remedy = "trim the ends; cut items at long pauses: a model learns them as part of the text"
    return flagged_finding("silence", items, flags, limits, threshold, remedy, numbers)


def _silence_reason(sound: Sound, limits: Limits) -> str:
    """Why the silences of an item are too long; empty when they are not."""
    said = [
        (sound.leading_s, limits.max_leading_s, f"{sound.leading_s:.2f} s of leading silence"),
        (sound.trailing_s, limits.max_trailing_s, f"{sound.trailing_s:.2f} s of trailing silence"),
        (sound.pause_s, limits.max_pause_s, f"a pause of {sound.pause_s:.2f} s"),
        (sound.inner_silence_share, limits.max_inner_silence_share, f"{sound.inner_silence_share:.0%} silence inside"),
    ]
    return ", ".join(words for value, limit, words in said if value > limit)


def clipping(items: Sequence[Item], limits: Limits) -> Finding:
    """Waveforms that were cut off."""
    flags = []
    for item in heard(items):
        if item.sound.clipped_share > limits.max_clipped_share:
            flags.append(Flag("clipping", *item.key, f"{item.sound.clipped_share:.2%} of the samples in flat tops"))
    numbers = {"clipped_share": spread([item.sound.clipped_share for item in heard(items)], 6)}
    remedy = "use a take with more headroom, or leave the items out: clipping cannot be undone"
    return flagged_finding("clipping", items, flags, limits, f"{limits.max_clipped_share:.2%} of the samples", remedy, numbers)


def bandwidth(items: Sequence[Item], limits: Limits) -> Finding:
    """Audio with less bandwidth than its sample rate promises: upsampled telephone speech, low-rate MP3."""
    flags = []
    for item in heard(items):
        if item.sound.bandwidth_hz < limits.min_bandwidth_share * item.sample_rate_hz / 2:
            reason = f"nothing above {item.sound.bandwidth_hz / 1000:.2f} kHz in audio of {item.sample_rate_hz / 1000:g} kHz"
            flags.append(Flag("bandwidth", *item.key, reason))
    kilohertz = Counter(round(item.sound.bandwidth_hz / 1000) for item in heard(items))
    numbers = {
        "bandwidth_hz": spread([item.sound.bandwidth_hz for item in heard(items)], 0),
        "items_by_khz": {str(band): kilohertz[band] for band in sorted(kilohertz)},
    }
    threshold = f"{limits.min_bandwidth_share:.0%} of half the sample rate"
    remedy = "fetch the recordings at their full rate, or leave the items out: the model learns to sound dull"
    return flagged_finding("bandwidth", items, flags, limits, threshold, remedy, numbers)


def heard(items: Sequence[Item]) -> list[Item]:
    """The items whose audio could be read."""
    return [item for item in items if not item.sound.problem]
