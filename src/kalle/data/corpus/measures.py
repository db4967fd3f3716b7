"""Measures of one item's sound and text: loudness, silence, clipping, spectrum, scripts; collected over a corpus."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchaudio
from lhotse.cut import Cut
from numpy.typing import NDArray

from kalle.audio import PCM16_SCALE, Audio, clipped_share, to_pcm16
from kalle.data.corpus.cuts import corpus_cuts, load_audio
from kalle.data.shared_work import ResumeJournal
from kalle.errors import UserError
from kalle.files import file_stamp
from kalle.text.languages import LANGUAGE_OF_SCRIPT, script_of

FRAME_S = 0.01
BLOCK_S = 0.4
"""One gating block of BS.1770."""
_LOUD_PERCENTILE, _FLOOR_PERCENTILE = 95, 5
_BELOW_LOUD_DB, _ABOVE_FLOOR_DB, _LEAST_BELOW_LOUD_DB = 40.0, 8.0, 20.0
_SOUND_FRAMES = 4
_LOWEST_DB = -120.0
_QUIETEST_PEAK = 0.1


@dataclass(frozen=True)
class Silence:
    """Seconds before the first and after the last sound, the longest pause between, and the silent share between."""

    leading_s: float
    trailing_s: float
    pause_s: float
    inner_share: float


def silence(audio: Audio, sample_rate_hz: int) -> Silence:
    """The silences of (S,), to one frame of `FRAME_S`; all leading where nothing sounds.

    A frame is silent when it is well below the loud frames, or hardly above the quiet ones: the recording's own noise counts as
    silence. Sounds of fewer than `_SOUND_FRAMES` frames (clicks) don't end a silence.
    """
    frame = max(round(FRAME_S * sample_rate_hz), 1)
    levels = _frame_levels_db(audio, frame)
    loud, floor = np.percentile(levels, _LOUD_PERCENTILE), np.percentile(levels, _FLOOR_PERCENTILE)
    # Speech without a pause has a floor that is speech itself, hence the last bound.
    threshold = max(loud - _BELOW_LOUD_DB, min(floor + _ABOVE_FLOOR_DB, loud - _LEAST_BELOW_LOUD_DB))
    sounding = (levels >= threshold) & (levels > _LOWEST_DB)
    starts, ends = _runs(sounding)
    kept = ends - starts >= _SOUND_FRAMES
    starts, ends = starts[kept], ends[kept]
    if not starts.size:
        return Silence(len(audio) / sample_rate_hz, 0.0, 0.0, 0.0)
    pauses = starts[1:] - ends[:-1]
    scale = frame / sample_rate_hz
    return Silence(
        leading_s=float(starts[0]) * scale,
        trailing_s=max(len(audio) / sample_rate_hz - float(ends[-1]) * scale, 0.0),
        pause_s=float(pauses.max(initial=0)) * scale,
        inner_share=float(pauses.sum() / (ends[-1] - starts[0])),
    )


def loudness_lufs(audio: Audio, sample_rate_hz: int) -> float:
    """Integrated loudness of (S,) by ITU-R BS.1770-4 (torchaudio's); shorter than one gating block it is repeated to fill it.

    Minus infinity for silence.
    """
    block = round(BLOCK_S * sample_rate_hz) + 1
    samples = np.resize(audio, block) if len(audio) < block else audio
    value = float(torchaudio.functional.loudness(torch.from_numpy(np.ascontiguousarray(samples)).double()[None], sample_rate_hz))
    return value if np.isfinite(value) and value > -100 else float("-inf")


def flat_share(audio: Audio) -> float:
    """Share of the samples of (S,) in flat tops at full scale, or at the peak of a recording that was clipped and then turned down."""
    peak = float(np.abs(audio).max(initial=0.0))
    lowered = clipped_share(audio, 0.9995 * peak) if peak >= _QUIETEST_PEAK else 0.0
    return max(clipped_share(audio, 0.99), lowered)


def _frame_levels_db(audio: Audio, frame: int) -> NDArray[np.float64]:
    """RMS in dB of full scale of the whole frames of (S,), at least `_LOWEST_DB`."""
    samples = np.pad(audio, (0, max(frame - len(audio), 0)))
    squares = np.square(samples[: len(samples) // frame * frame], dtype=np.float64).reshape(-1, frame)
    with np.errstate(divide="ignore"):
        return np.maximum(10 * np.log10(squares.mean(axis=1)), _LOWEST_DB)


def _runs(mask: NDArray[np.bool_]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    edges = np.flatnonzero(np.diff(np.concatenate(([False], mask, [False])).astype(np.int8)))
    return edges[::2], edges[1::2]


BANDS = 32
"""Of the stored spectrum, from 0 to half the sample rate."""
PRESENT_DB = 70.0
"""Below the strongest part of the spectrum nothing is counted as present: consonants reach higher, what a resampler leaves does not."""
_WINDOW_S = 0.032
_PERCENTILE = 98
"""Of a bin over time: a few hisses show the bandwidth, a single click does not."""
_SMOOTH_HZ = 250.0
_FLOOR_MARGIN_DB = 10.0


@dataclass(frozen=True)
class Spectrum:
    """The highest frequency present in Hz, and the level of `BANDS` bands in dB below the strongest."""

    bandwidth_hz: float
    bands_db: tuple[int, ...]


def spectrum(audio: Audio, sample_rate_hz: int) -> Spectrum:
    """The spectrum of the loudest moments of (S,), bin by bin.

    Present is what lies within `PRESENT_DB` of the strongest part and above the rounding noise of 16-bit samples.
    """
    size = max(round(_WINDOW_S * sample_rate_hz / 2) * 2, 64)
    window = np.hanning(size)
    power = _high_percentile_power(audio, window)
    width = max(round(_SMOOTH_HZ * size / sample_rate_hz), 1)
    power = np.convolve(power, np.ones(width) / width, "same")
    rounding = np.square(window).sum() / (12 * PCM16_SCALE**2)
    if power.max() <= rounding:
        return Spectrum(0.0, (0,) * BANDS)
    present = power >= max(power.max() * 10 ** (-PRESENT_DB / 10), min(rounding * 10 ** (_FLOOR_MARGIN_DB / 10), power.max()))
    highest = int(np.flatnonzero(present)[-1])
    edges = np.linspace(0, len(power), BANDS + 1).astype(int)
    levels = [10 * np.log10(power[low:high].mean() / power.max() + 1e-12) for low, high in itertools.pairwise(edges)]
    return Spectrum(highest * sample_rate_hz / size, tuple(round(level) for level in levels))


def _high_percentile_power(audio: Audio, window: NDArray[np.float64]) -> NDArray[np.float64]:
    size = len(window)
    samples = np.pad(audio, (0, max(size - len(audio), 0)))
    frames = np.lib.stride_tricks.sliding_window_view(samples, size)[:: size // 2] * window
    return np.asarray(np.percentile(np.abs(np.fft.rfft(frames, axis=1)) ** 2, _PERCENTILE, axis=0))


SIGN_SCRIPTS = frozenset({"CJK", "HIRAGANA", "KATAKANA", "HANGUL"})
"""Scripts whose characters are about a syllable each and are counted one by one."""
_KANA_AND_HAN = frozenset({"HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA", "CJK"})
_LATIN = "ca cs cy da de en es et eu fi fr ga hr hu id is it lt lv ms mt nl no nb nn pl pt ro sk sl sq sv sw tl tr vi"
SCRIPTS_OF_LANGUAGE: Mapping[str, frozenset[str]] = {
    **{language: frozenset({script}) for script, language in LANGUAGE_OF_SCRIPT.items()},
    **dict.fromkeys(_LATIN.split(), frozenset({"LATIN"})),
    **dict.fromkeys(("uk", "be", "bg", "mk", "kk", "ky", "mn"), frozenset({"CYRILLIC"})),
    **dict.fromkeys(("fa", "ur", "ps"), frozenset({"ARABIC"})),
    **dict.fromkeys(("mr", "ne", "sa"), frozenset({"DEVANAGARI"})),
    "sr": frozenset({"CYRILLIC", "LATIN"}),
    "yue": frozenset({"CJK"}),
    "ja": _KANA_AND_HAN,
    "ko": frozenset({"HANGUL", "CJK"}),
}
"""ISO 639 code -> the scripts it is written in."""
MARKUP = re.compile(r"<[^<>\s][^<>]*>|&(?:#\d+|#x[0-9a-f]+|[a-z]+);|https?://|\[[^\]]*\]|\{[^}]*\}", re.IGNORECASE)
MOJIBAKE = re.compile("[\u00c2\u00c3][\u0080-\u00bf]|\u00e2\u20ac|\u00ef\u00bb\u00bf")
"""UTF-8 read as Latin-1 or Windows-1252."""
_UNSPEAKABLE = {"Cc": "control character", "Cn": "unassigned character", "Co": "private character", "Cs": "half a character"}
_INVISIBLE = frozenset("\u200b\u2060\ufeff\u00ad\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
_APOSTROPHES = re.compile(r"[^\W\d_]+(?:['\u2019][^\W\d_]+)*")


def letters_and_signs(text: str) -> tuple[int, int]:
    """Numbers of characters that are spoken: letters and digits of alphabets, and signs of syllabic scripts."""
    letters = signs = 0
    for character in text:
        if script_of(character) in SIGN_SCRIPTS:
            signs += 1
        elif unicodedata.category(character)[0] in "LN":
            letters += 1
    return letters, signs


def script_counts(text: str) -> Counter[str]:
    """How many letters of each script ``text`` has."""
    return Counter(script for script in map(script_of, text) if script is not None and script not in ("MODIFIER", "FEMININE", "MASCULINE"))


def mixed_word(text: str) -> str | None:
    """The first word that mixes alphabets, such as a Cyrillic word with a Latin letter that looks alike; None when there is none."""
    for word in _APOSTROPHES.findall(text):
        scripts = set(script_counts(word)) - SIGN_SCRIPTS - _KANA_AND_HAN
        if len(scripts) > 1:
            return str(word)
    return None


def odd_characters(text: str) -> str | None:
    """The first thing in ``text`` that is no speech, in words; None for clean text."""
    for character in text:
        kind = _UNSPEAKABLE.get(unicodedata.category(character))
        if character == "\ufffd":
            kind = "replacement character (a decoding error)"
        elif character in _INVISIBLE:
            kind = "invisible character"
        if kind is not None:
            return f"{kind} U+{ord(character):04X}"
    found = MOJIBAKE.search(text)
    if found:
        return f"{found.group()!r} looks like UTF-8 read as Latin-1"
    found = MARKUP.search(text)
    return f"markup {found.group()!r}" if found else None


MEASURES_VERSION = 1
"""Counts up when a measure changes its meaning, so that kept measurements are not reused."""


@dataclass(frozen=True)
class Measures:
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
    def from_dict(cls, values: dict[str, Any]) -> Measures:
        """From the values of `to_dict`, which JSON may have stored."""
        return cls(**{**values, "bands_db": tuple(values["bands_db"])})


@dataclass(frozen=True)
class MeasuredItem:
    """An item of the corpus: what is said of it, and what was measured."""

    id: str
    split: str
    text: str
    speaker: str
    language: str
    sample_rate_hz: int
    sound: Measures

    @property
    def key(self) -> tuple[str, str]:
        """Split and id, which together name one item."""
        return self.split, self.id


def item_of(cut: Cut, split: str, sound: Measures) -> MeasuredItem:
    """The item of a cut, the texts of its supervisions joined by spaces."""
    said = cut.supervisions
    text = " ".join((supervision.text or "").strip() for supervision in said).strip()
    speaker, language = (said[0].speaker or "", said[0].language or "") if said else ("", "")
    return MeasuredItem(cut.id, split, text, speaker, language, int(cut.sampling_rate), sound)


def measure(cut: Cut) -> Measures:
    """Load and measure one cut's audio, channels averaged; audio that cannot be read is a `Measures` with a problem, not an error."""
    rate_hz = int(cut.sampling_rate)
    try:
        audio = load_audio(cut, rate_hz)
    except UserError as error:
        return Measures(seconds=float(cut.duration), problem=str(error)[:300])
    if audio.size == 0:
        return Measures(seconds=float(cut.duration), problem="no samples")
    gaps, heard, loudness = silence(audio, rate_hz), spectrum(audio, rate_hz), loudness_lufs(audio, rate_hz)
    return Measures(
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
        stamp = file_stamp(Path(str(source.source))) if source.type == "file" else None
        stamps.append(f"{stamp[0]}-{stamp[1]}" if stamp else "-")
    return ",".join(stamps)


MEASUREMENTS_NAME = "measurements.jsonl"
_CUTS_A_TASK = 16
ItemProgress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Passes an iterable of so many things through, showing how far it is."""


@dataclass(frozen=True)
class CollectedMeasures:
    """The items of a corpus, its cuts by (split, id), and how many measurements an earlier run had left."""

    items: list[MeasuredItem]
    cuts: dict[tuple[str, str], Cut]
    reused: int


def collect_measures(corpus: Path, out: Path, jobs: int, progress: ItemProgress) -> CollectedMeasures:
    """Measure every item of ``corpus`` with ``jobs`` processes, keeping the measurements in ``out``.

    Measurements of an earlier run are used again where the audio file has not changed since.
    """
    cuts = corpus_cuts(corpus)
    stamps = {key: _stamp(cut) for key, cut in cuts.items()}
    journal = ResumeJournal(out / MEASUREMENTS_NAME, f"kalle data doctor measures {MEASURES_VERSION}")
    try:
        sounds: dict[tuple[str, str], Measures] = {}
        for entry in journal.entries:
            key = (entry["split"], entry["id"])
            if stamps.get(key) == entry["stamp"]:
                sounds[key] = Measures.from_dict(entry["sound"])
        reused = len(sounds)
        waiting = {key: cut for key, cut in cuts.items() if key not in sounds}
        for key, sound in progress(_measured(waiting, jobs), len(waiting)):
            journal.add({"split": key[0], "id": key[1], "stamp": stamps[key], "sound": sound.to_dict()})
            sounds[key] = sound
    finally:
        journal.close()
    return CollectedMeasures([item_of(cut, key[0], sounds[key]) for key, cut in cuts.items()], cuts, reused)


def _stamp(cut: Cut) -> str:
    return f"{cut.start:.6f}+{cut.duration:.6f}@{cut.sampling_rate}:{audio_stamp(cut)}"


def _measured(waiting: dict[tuple[str, str], Cut], jobs: int) -> Iterator[tuple[tuple[str, str], Measures]]:
    """Key and sound of each cut, in order."""
    if jobs < 1:
        raise UserError(f"jobs: got {jobs}, expected at least 1; correct it")
    if jobs == 1 or len(waiting) <= _CUTS_A_TASK:
        yield from ((key, measure(cut)) for key, cut in waiting.items())
        return
    keys = list(waiting)
    # Forking a process in which torch has threads can deadlock.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)
    try:
        yield from zip(keys, pool.map(measure, waiting.values(), chunksize=_CUTS_A_TASK), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
