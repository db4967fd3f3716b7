"""Metrics behind one interface, and those that compare audio with the recording it reproduces."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.extras import require
from kalle.losses.waveform import mel_l1
from kalle.models.mel import LogMel, MelConfig

RATE_HZ = 16000
"""Every metric here works at this rate."""
TEXT = "text"
RECORDING = "recording"
ALIGNED = "aligned"
SPEAKER = "speaker"
Value = float | str


class MetricError(ValueError):
    """One item cannot be scored by one metric (silence for PESQ, say): the row says so and the report counts it."""

    def __init__(self, message: str, columns: Mapping[str, Value] | None = None) -> None:
        """``columns`` are those that could be measured all the same."""
        super().__init__(message)
        self.columns = dict(columns or {})


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
    rate_hz: int = RATE_HZ
    """Sample rate at which ``audio`` was stored or made, before it was resampled."""

    def offers(self) -> frozenset[str]:
        """The names among text, recording, aligned and speaker that this item has."""
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
    trimmed_too: bool = False
    """Whether it is also measured without the silence at the ends, for silence can turn a fail into a pass."""


@dataclass(frozen=True)
class Declared:
    """A line of ``DECLARED``: everything about a metric that no model decides."""

    unit: str
    lower_is_better: bool | None
    band_hz: int
    """The content it was made for reaches up to here; audio without it is scored all the same, and the report says so."""
    says: str
    rate_hz: int = RATE_HZ
    """Sample rate of its input."""
    trimmed_too: bool = False
    package: str = ""
    """The distribution whose version decides the number."""


DECLARED: Mapping[str, Declared] = {
    "wer_utt_mean": Declared("error / word", True, 8000, "word error rate, mean over utterances", trimmed_too=True),
    "wer_corpus": Declared("error / word", True, 8000, "word errors of all utterances over all reference words", trimmed_too=True),
    "sim": Declared("cosine", False, 8000, "speaker embeddings of audio and prompt", trimmed_too=True),
    "stoi": Declared("0 to 1", False, 5000, "intelligibility against the recording", 10000, package="pystoi"),
    "pesq_wb": Declared("MOS-LQO", False, 8000, "quality against the recording, wide band", package="pesq"),
    "pesq_nb": Declared("MOS-LQO", False, 3400, "quality against the recording, narrow band", package="pesq"),
    "mel_l1": Declared("neper", True, 8000, "distance of log-mel spectrograms"),
    "mcd": Declared("dB", True, 8000, "mel-cepstral distortion, frame by frame"),
    "duration_ratio": Declared("s / s", None, 0, "seconds over the recording's", trimmed_too=True),
    "utmos": Declared("MOS 1 to 5", False, 8000, "naturalness, UTMOS22 strong", trimmed_too=True, package="utmos-pytorch"),
    "distillmos": Declared("MOS 1 to 5", False, 8000, "quality, DistillMOS", trimmed_too=True, package="distillmos"),
    "dnsmos_ovrl": Declared("MOS 1 to 5", False, 8000, "overall quality, DNSMOS P.835", trimmed_too=True, package="speechmos"),
    "dnsmos_sig": Declared("MOS 1 to 5", False, 8000, "quality of the speech, DNSMOS P.835", trimmed_too=True, package="speechmos"),
    "dnsmos_bak": Declared("MOS 1 to 5", False, 8000, "quality of the background, DNSMOS P.835", trimmed_too=True, package="speechmos"),
    "emotion": Declared("probability", False, 8000, "mean score of the intended emotion", package="funasr"),
}
"""The one table of metrics, by the name of the number in the summary. Model, version and weight hash come from ``describe()``."""


def declared(name: str, numerator: str | None = None, denominator: str | None = None, suffix: str = "") -> Aggregate:
    """The number called ``name`` + ``suffix`` with the direction that ``DECLARED`` states: the mean of ``numerator`` (the name itself)."""
    known = DECLARED[name]
    numerator = (numerator or name) + suffix
    bottom = None if denominator is None else denominator + suffix
    return Aggregate(name + suffix, numerator, bottom, known.lower_is_better, known.trimmed_too and not suffix)


def unit_of(name: str) -> str | None:
    """The unit that ``DECLARED`` states of the number called ``name``, with whatever suffix; None for another number."""
    known = max((key for key in DECLARED if f"{name}_".startswith(f"{key}_")), key=len, default=None)
    return None if known is None else DECLARED[known].unit


def described(metric: Metric) -> dict[str, object]:
    """Unit, expected rate and bandwidth by ``DECLARED``, and the metric's own description."""
    known = {rule.name: DECLARED[rule.name] for rule in metric.aggregates if rule.name in DECLARED}
    if not known:
        return dict(metric.describe())
    first = next(iter(known.values()))
    own: dict[str, object] = {"unit": first.unit, "rate_hz": first.rate_hz, "band_hz": first.band_hz}
    if first.package:
        own[first.package] = importlib.metadata.version(first.package)
    return own | dict(metric.describe())


SILENCE_BELOW_PEAK_DB = 50.0
"""A frame of 20 ms this far below the loudest one is silence."""
KEPT_SILENCE_S = 0.25
"""Silence that trimming leaves at each end, as between two phrases."""
_FRAME = RATE_HZ // 50


def end_silences(audio: Audio) -> tuple[int, int]:
    """Samples of silence before and behind the speech in (S,) at 16 kHz, in whole frames of 20 ms; (S, 0) for nothing but silence."""
    count = len(audio) // _FRAME
    if count == 0:
        return 0, 0
    power = np.square(audio[: count * _FRAME].reshape(count, _FRAME), dtype=np.float64).mean(axis=1)
    if not power.max() > 0:
        return len(audio), 0
    loud = np.flatnonzero(power > power.max() * 10 ** (-SILENCE_BELOW_PEAK_DB / 10))
    return int(loud[0]) * _FRAME, max(0, len(audio) - (int(loud[-1]) + 1) * _FRAME)


def trimmed(item: ScoreItem) -> tuple[ScoreItem, float, float]:
    """``item`` with at most ``KEPT_SILENCE_S`` of silence at each end of its audio, and the seconds of silence that were found there."""
    before, behind = end_silences(item.audio)
    kept = int(KEPT_SILENCE_S * RATE_HZ)
    start, end = max(0, before - kept), len(item.audio) - max(0, behind - kept)
    cut = item if end - start == len(item.audio) or before == len(item.audio) else replace(item, audio=item.audio[start:end])
    return cut, before / RATE_HZ, behind / RATE_HZ


BAND_BELOW_PEAK_DB = 70.0


def bandwidth_hz(audio: Audio) -> float:
    """The frequency in Hz up to which (S,) at 16 kHz holds more than the rest of a filter: 70 dB below the peak of its mean spectrum.

    0 for less than one window of 32 ms, or silence.
    """
    size = 512
    if len(audio) < size:
        return 0.0
    frames = np.lib.stride_tricks.sliding_window_view(audio, size)[:: size // 2] * np.hanning(size).astype(np.float32)
    power = np.square(np.abs(np.fft.rfft(frames, axis=1))).mean(axis=0)
    if not power.max() > 0:
        return 0.0
    return float(np.flatnonzero(power > power.max() * 10 ** (-BAND_BELOW_PEAK_DB / 10))[-1] * RATE_HZ / size)


@runtime_checkable
class Metric(Protocol):
    """Scores one item; an object of a few lines can be one."""

    name: str
    needs: frozenset[str]
    """The names of ``ScoreItem.offers`` that it cannot do without."""

    @property
    def aggregates(self) -> tuple[Aggregate, ...]:
        """The numbers of the summary."""
        ...

    def __call__(self, item: ScoreItem) -> Mapping[str, Value]:
        """The item's columns: finite numbers, or strings to keep. MetricError when this item cannot be scored."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Model, versions and settings, for the report."""
        ...


class BatchMetric(Metric, Protocol):
    """A metric that scores several items sooner than one after another."""

    def batch(self, items: Sequence[ScoreItem]) -> list[Mapping[str, Value] | MetricError]:
        """For each item the result or the MetricError of calling it."""
        ...


PESQ_MODES = ("wb", "nb")


class STOI:
    """Short-time objective intelligibility (Taal et al. 2011), not extended, by pystoi; 1 for equal signals."""

    name = "stoi"
    needs = frozenset({ALIGNED})
    aggregates = (declared("stoi"),)

    def __init__(self) -> None:
        require("pystoi", "eval", "STOI")

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``stoi``. MetricError when too little speech is left after pystoi removed the silent frames."""
        from pystoi import stoi

        recording, audio = item.pair()
        if not recording.any():
            raise MetricError("STOI: the recording is silent")
        with warnings.catch_warnings():
            # pystoi answers 1e-5 with a warning where it has too few frames; that is no measurement.
            warnings.simplefilter("error", RuntimeWarning)
            try:
                return {"stoi": float(stoi(recording, audio, RATE_HZ, extended=False))}
            except (RuntimeWarning, ValueError) as error:
                raise MetricError(f"STOI: {' '.join(str(error).split())}") from None

    def describe(self) -> Mapping[str, object]:
        """Name the variant of the measure, for the report."""
        return {"extended": False}


class PESQ:
    """ITU-T P.862 (narrow band, "nb") or P.862.2 (wide band, "wb") by the package pesq, both at 16 kHz."""

    needs = frozenset({ALIGNED})

    def __init__(self, mode: str = "wb") -> None:
        require("pesq", "eval", "PESQ")
        if mode not in PESQ_MODES:
            raise UserError(f"PESQ mode: got '{mode}', expected {' or '.join(PESQ_MODES)}; correct the configuration")
        self.mode, self.name = mode, f"pesq_{mode}"
        self.aggregates: tuple[Aggregate, ...] = (declared(self.name),)

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``pesq_wb`` or ``pesq_nb`` (MOS-LQO). MetricError when pesq finds no speech or too little."""
        import pesq

        recording, audio = item.pair()
        if not recording.any():
            raise MetricError("PESQ: the recording is silent")
        try:
            return {self.name: float(pesq.pesq(RATE_HZ, recording, audio, self.mode))}
        except (pesq.PesqError, ValueError, ZeroDivisionError) as error:
            raise MetricError(f"PESQ: {type(error).__name__} {' '.join(str(error).split())}") from None

    def describe(self) -> Mapping[str, object]:
        """Name the mode, for the report."""
        return {"mode": self.mode}


class MelDistance:
    """L1 distance of log-mel spectrograms, the reconstruction loss of the Flow-VAE, in nepers; 0 for equal signals."""

    name = "mel_l1"
    needs = frozenset({ALIGNED})
    aggregates = (declared("mel_l1"),)

    def __init__(self, config: MelConfig | None = None) -> None:
        self.mel = LogMel(config or MelConfig(sample_rate=RATE_HZ))

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``mel_l1``. MetricError when the pair is too short for one frame."""
        recording, audio = (torch.from_numpy(side.copy())[None] for side in item.pair())
        try:
            with torch.no_grad():
                return {"mel_l1": float(mel_l1(self.mel(recording), self.mel(audio)))}
        except UserError as error:
            raise MetricError(f"log-mel: {error}") from None

    def describe(self) -> Mapping[str, object]:
        """The spectrogram's numbers."""
        return {"mel": str(self.mel.config)}


class MCD:
    """Mel-cepstral distortion (Kubichek 1993) frame by frame, in dB; 0 for equal signals.

    10 sqrt(2) / ln 10 times the Euclidean distance of cepstra 1 to 13 (the orthonormal DCT of log-mel spectra), mean over frames. Other
    tools take other cepstra (WORLD's, say), so compare only what was measured alike.
    """

    name = "mcd"
    needs = frozenset({ALIGNED})
    aggregates = (declared("mcd"),)
    coefficients = 13

    def __init__(self) -> None:
        self.mel = LogMel(MelConfig(sample_rate=RATE_HZ))

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``mcd``. MetricError when the pair is too short for one frame."""
        from scipy.fft import dct

        recording, audio = (torch.from_numpy(side.copy())[None] for side in item.pair())
        try:
            with torch.no_grad():
                difference = (self.mel(recording) - self.mel(audio))[0].double().numpy()
        except UserError as error:
            raise MetricError(f"MCD: {error}") from None
        cepstra = dct(difference, axis=0, norm="ortho")[1 : self.coefficients + 1]
        return {"mcd": float(10 / np.log(10) * np.sqrt(2 * np.square(cepstra).sum(axis=0)).mean())}

    def describe(self) -> Mapping[str, object]:
        """Name the cepstra that are compared, for the report."""
        return {"cepstra": f"1 to {self.coefficients} of {self.mel.config.n_mels} log-mel bands"}


class DurationRatio:
    """Seconds of the audio over seconds of the recording of the same text."""

    name = "duration_ratio"
    needs = frozenset({RECORDING})
    aggregates = (declared("duration_ratio"),)

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """Compute ``duration_ratio``."""
        assert item.recording is not None, f"'{item.id}' has no recording"
        return {"duration_ratio": len(item.audio) / len(item.recording)}

    def describe(self) -> Mapping[str, object]:
        """State the formula, for the report."""
        return {"formula": "seconds of audio / seconds of recording"}
