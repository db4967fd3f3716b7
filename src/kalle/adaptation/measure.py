"""How near the speech in a voice comes to the speaker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kalle.audio import Audio, resample
from kalle.evaluation.metrics import RATE_HZ, MetricError
from kalle.evaluation.similarity import SpeakerEmbedder
from kalle.synthesis.voice import Voice

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle


@dataclass(frozen=True)
class SpokenSimilarity:
    """Cosine of the speaker embeddings of spoken texts and a recording of the speaker."""

    mean: float
    """NaN where no text gave a voice."""
    texts: int
    """How many gave one."""
    failed: int
    """How many gave silence, or next to nothing."""


def spoken_similarity(
    kalle: Kalle, voice: Voice, recordings: Sequence[Audio], texts: Sequence[str], embedder: SpeakerEmbedder, seed: int = 0
) -> list[SpokenSimilarity]:
    """Speak ``texts`` in ``voice``, text i with the seed ``seed`` + i, and compare them with each of ``recordings`` (S,) of the speaker.

    The recordings are at the model's rate. UserError for a text that can't be spoken.
    """
    spoken = [embedding(embedder, kalle.synthesize(text, voice, seed=seed + i).audio, kalle.sample_rate) for i, text in enumerate(texts)]
    heard = [each for each in spoken if each is not None]
    found = []
    for recording in recordings:
        wanted = embedding(embedder, recording, kalle.sample_rate)
        mean = float(np.mean([each @ wanted for each in heard])) if heard and wanted is not None else float("nan")
        found.append(SpokenSimilarity(mean, len(heard), len(texts) - len(heard)))
    return found


def embedding(embedder: SpeakerEmbedder, audio: Audio, rate_hz: int) -> np.ndarray | None:
    """The speaker embedding (E,) of ``audio``, of unit length; None where it has no voice."""
    try:
        found = np.asarray(embedder(resample(audio, rate_hz, RATE_HZ)), dtype=np.float64)
    except MetricError:
        return None
    return found / np.linalg.norm(found)
