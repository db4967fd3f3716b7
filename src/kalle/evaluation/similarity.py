"""Speaker similarity: the cosine between speaker embeddings of two whole utterances."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import warnings
from collections.abc import Mapping
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kalle.audio import Audio, rms_dbfs
from kalle.errors import UserError
from kalle.evaluation.metric import RATE_HZ, SPEAKER, Aggregate, MetricError, ScoreItem, Value

LEVEL_DBFS = -30.0
MIN_SAMPLES = RATE_HZ // 10


class SpeakerEmbedder(Protocol):
    """Audio to a vector that stands for the voice."""

    def __call__(self, audio: Audio) -> NDArray[np.float32]:
        """Embedding (E,) of mono float32 (S,) at 16 kHz."""
        ...

    def describe(self) -> Mapping[str, object]:
        """Model and version."""
        ...


class GE2E:
    """Resemblyzer's GE2E encoder (Wan et al., arXiv 1710.10467), whose weights come with the package.

    Its input is a linear mel spectrogram, so loudness matters: audio is scaled to -30 dBFS first. Resemblyzer's own
    preprocessing, which also cuts silences with a voice detector, is not applied: whole utterances are compared.
    """

    def __init__(self, device: str = "cpu") -> None:
        if importlib.util.find_spec("resemblyzer") is None:
            raise UserError("speaker similarity 'ge2e' needs the package Resemblyzer; pip install 'kalle-tts[eval]', or leave it out")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecated imports inside resemblyzer and webrtcvad
            from resemblyzer import VoiceEncoder

        self._encoder = VoiceEncoder(device, verbose=False)

    def __call__(self, audio: Audio) -> NDArray[np.float32]:
        """Embedding (256,) of unit length. MetricError for silence or less than 0.1 s."""
        level = rms_dbfs(audio) if len(audio) >= MIN_SAMPLES else float("-inf")
        if not np.isfinite(level):
            raise MetricError(f"no voice to embed: {len(audio)} samples, {level} dBFS")
        return np.asarray(self._encoder.embed_utterance(audio * np.float32(10 ** ((LEVEL_DBFS - level) / 20))), dtype=np.float32)

    def describe(self) -> Mapping[str, object]:
        """Model and version."""
        return {"model": "ge2e", "Resemblyzer": importlib.metadata.version("Resemblyzer")}


def speaker_embedder(model: str, device: str = "cpu") -> SpeakerEmbedder:
    """The embedder called ``model``; a UserError names the models there are and what a missing one would need."""
    if model == "ge2e":
        return GE2E(device)
    if model == "wavlm":
        raise UserError(
            "speaker similarity 'wavlm' is not available: it is WavLM-large fine-tuned for speaker verification (ECAPA head), "
            "whose weights no package ships; use model=ge2e (package Resemblyzer)"
        )
    raise UserError(f"unknown speaker model: got '{model}', expected ge2e (package Resemblyzer); correct the configuration")


class Similarity:
    """Cosine between the embeddings of the audio and of its prompt (or another recording of the speaker), mean over items.

    The same reference is embedded once while consecutive items share it.
    """

    name = "sim"
    needs = frozenset({SPEAKER})
    aggregates = (Aggregate("sim", "sim", lower_is_better=False),)

    def __init__(self, model: str = "ge2e", embedder: SpeakerEmbedder | None = None, device: str = "cpu") -> None:
        self.embedder = embedder if embedder is not None else speaker_embedder(model, device)
        self._last: tuple[Audio, NDArray[np.float32]] | None = None

    def _reference(self, audio: Audio) -> NDArray[np.float32]:
        if self._last is None or not np.array_equal(self._last[0], audio):
            self._last = (audio, self.embedder(audio))
        return self._last[1]

    def __call__(self, item: ScoreItem) -> dict[str, Value]:
        """``sim`` in [-1, 1]."""
        assert item.speaker is not None, f"'{item.id}' has no speaker reference"
        one, other = self._reference(item.speaker), self.embedder(item.audio)
        return {"sim": float(np.dot(one, other) / (np.linalg.norm(one) * np.linalg.norm(other)))}

    def describe(self) -> Mapping[str, object]:
        """The embedder."""
        return self.embedder.describe()
