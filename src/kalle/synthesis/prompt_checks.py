"""What is wrong with a recording that is to be a voice, said before it is used."""

from __future__ import annotations

import unicodedata

import numpy as np

from kalle.audio import Audio, clipped_share, rms_dbfs
from kalle.errors import UserError

LONGEST_PROMPT_SECONDS = 60.0
SILENT_DBFS = -60.0
"""A recording below this level is refused: it has nothing of a voice in it."""
QUIET_DBFS = -45.0
LARGEST_PEAK = 8.0
"""Float recordings may overshoot 1 a little; integers that nobody scaled are far above."""
GOOD_SECONDS = (2.0, 20.0)
"""Shorter prompts say little of a voice, longer ones cost positions and time for every sentence."""
LETTERS_A_SECOND = (3.0, 26.0)
"""Outside this a transcript hardly belongs to the recording: 203 studio recordings of more than 2 s had 7 to 18, pauses
included."""
NOISE_FLATNESS = 0.3
"""Spectral flatness (geometric over arithmetic mean of the average power spectrum): white noise has 1, studio recordings at most 0.12."""
CLIPPED_SHARE = 0.001
_IDEOGRAPH_LETTERS, _DIGIT_LETTERS = 3.5, 4.0
_WINDOW = 512


def check_prompt(wav: Audio, sample_rate_hz: int, shortest_samples: int) -> None:
    """A UserError for a recording (S,) that no voice can be made of: a length outside the bounds, silence, unscaled integers."""
    seconds = len(wav) / sample_rate_hz
    if not shortest_samples <= len(wav) <= LONGEST_PROMPT_SECONDS * sample_rate_hz:
        raise UserError(
            f"bad prompt length: got {seconds:.2f} s of audio, expected {shortest_samples / sample_rate_hz:g} to "
            f"{LONGEST_PROMPT_SECONDS:g} s; record or cut it again"
        )
    peak = float(np.abs(wav).max())
    if peak > LARGEST_PEAK:
        raise UserError(f"bad prompt audio: got samples up to {peak:.0f}, expected -1 to 1; divide integers by their full scale")
    level = rms_dbfs(wav)
    if level < SILENT_DBFS:
        spoken = "digital silence" if np.isneginf(level) else f"{level:.0f} dBFS"
        raise UserError(f"a silent prompt: got {spoken}, expected speech above {SILENT_DBFS:g} dBFS; record it louder")


def prompt_warnings(wav: Audio, sample_rate_hz: int, text: str | None = None, source_rate_hz: int | None = None) -> list[str]:
    """One line for each thing that makes a usable recording (S,) a doubtful voice, with numbers.

    ``text`` is its transcript, ``source_rate_hz`` the rate it was recorded at, where that is known.
    """
    seconds, level = len(wav) / sample_rate_hz, rms_dbfs(wav)
    found = []
    if seconds < GOOD_SECONDS[0]:
        found.append(f"a short prompt: got {seconds:.2f} s, {GOOD_SECONDS[0]:g} to {GOOD_SECONDS[1]:g} s tell more of a voice")
    if seconds > GOOD_SECONDS[1]:
        found.append(f"a long prompt: got {seconds:.2f} s, each sentence is spoken slower for it; {GOOD_SECONDS[1]:g} s are enough")
    if level < QUIET_DBFS:
        found.append(f"a quiet prompt: got {level:.0f} dBFS, expected speech above {QUIET_DBFS:g} dBFS")
    clipped = clipped_share(wav)
    if clipped > CLIPPED_SHARE:
        found.append(f"a clipped prompt: {clipped:.1%} of its samples are cut off at full scale")
    flatness = spectral_flatness(wav)
    if flatness > NOISE_FLATNESS:
        found.append(f"the prompt sounds like noise: spectral flatness {flatness:.2f}, speech has less than {NOISE_FLATNESS:g}")
    if source_rate_hz is not None and source_rate_hz < sample_rate_hz:
        found.append(f"a narrow prompt: recorded at {source_rate_hz} Hz for a model of {sample_rate_hz} Hz, the voice may sound dull")
    return found + ([] if text is None else _pace_warnings(text, seconds))


def spectral_flatness(wav: Audio) -> float:
    """Geometric over arithmetic mean of the power spectrum of (S,), averaged over windows: 1 for white noise, near 0 for tones."""
    padded = np.pad(wav, (0, max(0, _WINDOW - len(wav))))
    frames = np.lib.stride_tricks.sliding_window_view(padded, _WINDOW)[:: _WINDOW // 2] * np.hanning(_WINDOW)
    power = (np.abs(np.fft.rfft(frames)) ** 2).mean(axis=0)[1:]
    return float(np.exp(np.log(power + np.finfo(np.float64).tiny).mean()) / (power.mean() + np.finfo(np.float64).tiny))


def letters(text: str) -> float:
    """How many letters ``text`` is worth in time: an ideograph, kana or hangul stands for a syllable, a digit for a word."""
    return sum(_letters(character) for character in text)


def _letters(character: str) -> float:
    if character.isdigit():
        return _DIGIT_LETTERS
    if not character.isalpha():
        return 0.5
    wide = unicodedata.category(character) == "Lo" and unicodedata.east_asian_width(character) in "WF"
    return _IDEOGRAPH_LETTERS if wide else 1.0


def _pace_warnings(text: str, seconds: float) -> list[str]:
    pace = letters(text) / seconds
    slowest, fastest = LETTERS_A_SECOND
    # A word or two between pauses is slow by nature.
    if pace > fastest or (pace < slowest and seconds > GOOD_SECONDS[0]):
        return [
            f"the transcript may not belong to the recording: {letters(text):.0f} letters in {seconds:.2f} s are {pace:.1f} a second, "
            f"speech has {slowest:g} to {fastest:g}; a wrong transcript is spoken along or swallows words"
        ]
    return []
