"""Metrics behind one interface, and those that compare audio with the recording it reproduces."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

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


PESQ_MODES = ("wb", "nb")


class STOI:
    """Short-time objective intelligibility (Taal et al. 2011), not extended, by pystoi; 1 for equal signals."""

    name = "stoi"
    needs = frozenset({ALIGNED})
    aggregates = (Aggregate("stoi", "stoi", lower_is_better=False),)

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
        """Version."""
        return {"extended": False, "pystoi": importlib.metadata.version("pystoi")}


class PESQ:
    """ITU-T P.862 (narrow band, "nb") or P.862.2 (wide band, "wb") by the package pesq, both at 16 kHz."""

    needs = frozenset({ALIGNED})

    def __init__(self, mode: str = "wb") -> None:
        require("pesq", "eval", "PESQ")
        if mode not in PESQ_MODES:
            raise UserError(f"PESQ mode: got '{mode}', expected {' or '.join(PESQ_MODES)}; correct the configuration")
        self.mode, self.name = mode, f"pesq_{mode}"
        self.aggregates: tuple[Aggregate, ...] = (Aggregate(self.name, self.name, lower_is_better=False),)

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
        """Mode and version."""
        return {"mode": self.mode, "pesq": importlib.metadata.version("pesq")}


class MelDistance:
    """L1 distance of log-mel spectrograms, the reconstruction loss of the Flow-VAE, in nepers; 0 for equal signals."""

    name = "mel_l1"
    needs = frozenset({ALIGNED})
    aggregates = (Aggregate("mel_l1", "mel_l1", lower_is_better=True),)

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


class DurationRatio:
    """Seconds of the audio over seconds of the recording of the same text."""

    name = "duration_ratio"
    needs = frozenset({RECORDING})
    aggregates = (Aggregate("duration_ratio", "duration_ratio"),)

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``duration_ratio``."""
        assert item.recording is not None, f"'{item.id}' has no recording"
        return {"duration_ratio": len(item.audio) / len(item.recording)}

    def describe(self) -> Mapping[str, object]:
        """The formula."""
        return {"formula": "seconds of audio / seconds of recording"}
