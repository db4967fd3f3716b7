"""One speaker's recording in, what the language model is to be for that voice out (test-time training, KALL-E paper)."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from kalle.adaptation.learning import (
    AdaptOptions,
    PromptSequence,
    Recording,
    Reporter,
    default_lr,
    learn,
    mean_kl,
    prompt_sequence,
    read_recording,
)
from kalle.audio import Audio, resample
from kalle.errors import UserError
from kalle.evaluation.metrics import RATE_HZ, MetricError
from kalle.evaluation.similarity import SpeakerEmbedder
from kalle.seeds import purpose_seed
from kalle.synthesis.adapter import Adapter
from kalle.synthesis.release_compat import OURS, ReleaseCompatibility
from kalle.synthesis.voice import Voice

if TYPE_CHECKING:
    from kalle.evaluation.similarity import SpeakerEmbedder
    from kalle.models.lm import KalleLM
    from kalle.synthesis.kalle import Kalle

LOGGER = logging.getLogger(__name__)
KL_DRAWS = 4
"""Fixed noises with which a divergence is measured."""
AudioSource = str | Path | NDArray[np.floating]


@dataclass(frozen=True)
class BeforeAfter:
    """A number of the model as it was, and with the adapter as it is stored."""

    before: float
    after: float


@dataclass(frozen=True, eq=False)
class Adaptation:
    """The result of ``adapt``."""

    adapter: Adapter
    voice: Voice
    """The first recording's voice, with the adapter."""
    losses: tuple[float, ...]
    """Loss of every step, in nats per dimension, each with its own noise and so not quite comparable."""
    kl: BeforeAfter
    """Of the training recordings, in nats per dimension, with the same noise before and after."""
    held_out_kl: BeforeAfter | None
    """Of the recordings that were not: the honest number."""
    similarity: BeforeAfter | None
    """Mean cosine of spoken texts to the first recording; None where there was no embedder."""
    held_out_similarity: BeforeAfter | None
    seconds: float
    """Wall time of the steps."""

    @property
    def report(self) -> dict[str, Any]:
        """Everything as JSON values; a number that is not finite is None."""
        return {**self.adapter.notes, "size_bytes": self.adapter.size_bytes, "losses": list(self.losses)}


def adapt(
    kalle: Kalle,
    audio: AudioSource | Sequence[AudioSource],
    text: str | Sequence[str],
    *,
    options: AdaptOptions | None = None,
    target_text: str | None = None,
    validate: Sequence[tuple[AudioSource, str]] = (),
    language: str | None = None,
    sample_rate_hz: int | None = None,
    compatibility: ReleaseCompatibility = OURS,
    embedder: SpeakerEmbedder | None = None,
    texts: Sequence[str] = (),
    report: Reporter | None = None,
) -> Adaptation:
    """Learn the voice of ``audio``, in which ``text`` is said; ``kalle`` and its weights stay as they are to the bit.

    Several recordings of one speaker, each with its transcript, take turns. The context is the transcript alone, so that the adapter serves
    any text; with ``target_text`` it is the transcript and that text, as in the paper, which adapts anew for each sentence.
    ``compatibility`` is that which the voice will be spoken with. ``validate`` are other recordings of the speaker, with their
    transcripts, to measure on.
    With an ``embedder`` the ``texts`` are spoken before and after and compared with the speaker. UserError for unusable recordings.
    """
    options = options or AdaptOptions()
    if kalle.adapter is not None:
        raise UserError("the model has an adapter already: expected none; set kalle.adapter to None first")
    recordings = [read_recording(kalle, *pair, options.seed, language, sample_rate_hz) for pair in _pairs(audio, text)]
    others = [read_recording(kalle, *pair, options.seed, language, sample_rate_hz) for pair in validate]
    sequences = [prompt_sequence(kalle, each, target_text, compatibility) for each in recordings]
    held_out = [prompt_sequence(kalle, each, None, compatibility) for each in others]
    lr = options.lr or default_lr(options.mode, kalle.lm.hidden_size)
    learnt = learn(kalle.lm, kalle.lm_hash, sequences, options, lr, report)
    adapted = learnt.adapter.applied_to(kalle.lm)
    kl = _kls(kalle.lm, adapted, sequences, options)
    held_out_kl = _kls(kalle.lm, adapted, held_out, options) if held_out else None
    voice = recordings[0].voice
    similarity, held_out_similarity = (None, None)
    if embedder is not None and texts:
        similarity, held_out_similarity = _similarities(kalle, voice, learnt.adapter, recordings, others, texts, embedder)
    notes = {
        **_notes(options, lr, recordings, target_text, compatibility),
        "steps_made": len(learnt.losses),
        "seconds": round(learnt.seconds, 2),
        "rounding": learnt.rounding,
        "kl": _json(kl),
        "held_out_kl": _json(held_out_kl),
        "similarity": _json(similarity),
        "held_out_similarity": _json(held_out_similarity),
        "embedder": None if embedder is None else dict(embedder.describe()),
    }
    adapter = dataclasses.replace(learnt.adapter, notes=notes)
    spoken = dataclasses.replace(voice, adapter=adapter)
    return Adaptation(adapter, spoken, learnt.losses, kl, held_out_kl, similarity, held_out_similarity, learnt.seconds)


def _pairs(audio: AudioSource | Sequence[AudioSource], text: str | Sequence[str]) -> list[tuple[AudioSource, str]]:
    audios: list[AudioSource] = list(audio) if isinstance(audio, list | tuple) else [audio]  # type: ignore[list-item]
    texts = [text] if isinstance(text, str) else list(text)
    if len(audios) != len(texts) or not audios:
        raise UserError(f"recordings and transcripts don't pair: got {len(audios)} and {len(texts)}, expected a text for each")
    return list(zip(audios, texts, strict=True))


def _kls(lm: KalleLM, adapted: KalleLM, sequences: Sequence[PromptSequence], options: AdaptOptions) -> BeforeAfter:
    seed = purpose_seed(f"kalle adapt measure {options.seed}")
    return BeforeAfter(*(mean_kl(model, sequences, KL_DRAWS, seed, options.direction) for model in (lm, adapted)))


def _similarities(
    kalle: Kalle,
    voice: Voice,
    adapter: Adapter,
    recordings: Sequence[Recording],
    others: Sequence[Recording],
    texts: Sequence[str],
    embedder: SpeakerEmbedder,
) -> tuple[BeforeAfter, BeforeAfter | None]:
    audios = [recordings[0].audio, *(each.audio for each in others)]
    before, after = (
        [each.mean for each in spoken_similarity(kalle, dataclasses.replace(voice, adapter=each), audios, texts, embedder)]
        for each in (None, adapter)
    )
    held_out = BeforeAfter(float(np.mean(before[1:])), float(np.mean(after[1:]))) if others else None
    return BeforeAfter(before[0], after[0]), held_out


def _notes(
    options: AdaptOptions, lr: float, recordings: Sequence[Recording], target_text: str | None, compatibility: ReleaseCompatibility
) -> dict[str, Any]:
    from kalle import __version__

    return {
        "kalle": __version__,
        **dataclasses.asdict(options),
        "lr": lr,
        "texts": [each.voice.text for each in recordings],
        "seconds_of_speech": [round(each.voice.seconds or 0.0, 3) for each in recordings],
        "target_text": target_text,
        "compatibility": None if compatibility == OURS else dataclasses.asdict(compatibility),
    }


def _json(pair: BeforeAfter | None) -> dict[str, float | None] | None:
    if pair is None:
        return None
    return {name: value if math.isfinite(value) else None for name, value in dataclasses.asdict(pair).items()}


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
