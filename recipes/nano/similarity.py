"""Does every built-in voice sound like its speaker, and not like another? Cosines between speaker embeddings, and the margin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from corpora import LANGUAGES, STRANGERS, SYNTHETIC
from numpy.typing import NDArray
from voices import BUILT_IN, BuiltIn

from kalle.audio import Audio, resample
from kalle.errors import UserError
from kalle.evaluation.metrics import RATE_HZ, MetricError
from kalle.evaluation.similarity import SpeakerEmbedder, speaker_embedder
from kalle.evaluation.test_list import TestItem, choose_prompt, read_test_list
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.voice import Voice

RECORDINGS = 10
Vectors = NDArray[np.float64]


def margins(spoken: Mapping[str, Vectors], recorded: Mapping[str, Vectors]) -> dict[str, dict[str, object]]:
    """For every voice: ``own``, the mean cosine of all pairs of what it spoke and its speaker's recordings; ``others``, the same with
    every other speaker's; ``margin``, ``own`` less the greatest of those; ``ceiling``, how alike the speaker's own recordings are.

    Arguments are unit vectors (N, E) by the name of the voice.
    """
    found: dict[str, dict[str, object]] = {}
    for name, vectors in spoken.items():
        cosines = {other: float((vectors @ theirs.T).mean()) for other, theirs in recorded.items()}
        own = cosines.pop(name)
        pairs = (recorded[name] @ recorded[name].T)[np.triu_indices(len(recorded[name]), 1)]
        margin = own - max(cosines.values()) if cosines else None
        ceiling = float(pairs.mean()) if len(pairs) else None
        found[name] = {"own": own, "others": cosines, "margin": margin, "ceiling": ceiling, "texts": len(vectors)}
    return found


def voice_margins(weights: Path, corpora: Path, texts: int, device: str, seed: int) -> dict[str, dict[str, object]]:
    """`margins` of the built-in voices in ``weights``, each speaking ``texts`` unseen English sentences.

    UserError when ``weights`` have no such voice.
    """
    kalle, embedder = Kalle.from_pretrained(weights, device), speaker_embedder("ge2e")
    chosen = [voice for voice in BUILT_IN if (weights / "voices" / f"{voice.name}.safetensors").is_file()]
    if not chosen:
        raise UserError(
            f"no voices: got '{weights}', expected one of {', '.join(voice.name for voice in BUILT_IN)} in it; run --only voices"
        )
    unseen = read_test_list(corpora.parent / "test" / SYNTHETIC).items[-texts:]
    spoken: dict[str, Vectors] = {}
    recorded: dict[str, Vectors] = {}
    for voice in chosen:
        items = own_recordings(voice, corpora)
        recorded[voice.name] = _embedded(embedder, [item.audio(RATE_HZ) for item in items[:RECORDINGS]])
        spoken[voice.name] = _embedded(embedder, _speak(kalle, kalle.load_voice(voice.name), unseen, seed))
    return margins(spoken, recorded)


def own_recordings(voice: BuiltIn, corpora: Path) -> list[TestItem]:
    """Recordings of the speaker of ``voice``: of the test split, and where a teacher is the speaker of training."""
    split = "test" if voice.corpus in LANGUAGES else "train"
    items = read_test_list(corpora / voice.corpus / f"cuts_{split}.jsonl.gz").items
    return [item for item in items if voice.speaker in (None, item.speaker)]


def stranger_margins(weights: Path, corpora: Path, texts: int, device: str, seed: int) -> dict[str, dict[str, object]]:
    """`margins` of voices made from one recording each of speakers that no training heard; the recording itself is not compared with."""
    kalle, embedder = Kalle.from_pretrained(weights, device), speaker_embedder("ge2e")
    items = read_test_list(corpora.parent / "test" / STRANGERS).items
    unseen = read_test_list(corpora.parent / "test" / SYNTHETIC).items[-texts:]
    spoken: dict[str, Vectors] = {}
    recorded: dict[str, Vectors] = {}
    for name in sorted({item.speaker for item in items if item.speaker}):
        prompt = choose_prompt(items, speaker=name)
        others = [item for item in items if item.speaker == name and item.id != prompt.id]
        recorded[name] = _embedded(embedder, [item.audio(RATE_HZ) for item in others[:RECORDINGS]])
        assert prompt.audio_path is not None, "choose_prompt"
        spoken[name] = _embedded(embedder, _speak(kalle, kalle.voice(prompt.audio_path), unseen, seed))
    return margins(spoken, recorded)


def _speak(kalle: Kalle, voice: Voice, items: Sequence[TestItem], seed: int) -> list[Audio]:
    made = [kalle.synthesize(item.text, voice, seed=seed + index) for index, item in enumerate(items)]
    return [resample(speech.audio, speech.sample_rate, RATE_HZ) for speech in made]


def _embedded(embedder: SpeakerEmbedder, audio: Sequence[Audio]) -> Vectors:
    vectors = []
    for one in audio:
        try:
            vectors.append(np.asarray(embedder(one), dtype=np.float64))
        except MetricError:  # silence has no voice; the number of texts says so
            continue
    if not vectors:
        raise UserError(f"no voice to compare: got silence from all of {len(audio)} utterances; check the model with `kalle say`")
    return np.stack([vector / np.linalg.norm(vector) for vector in vectors])


def margins_table(found: Mapping[str, Mapping[str, object]]) -> list[str]:
    """What `margins` found, as Markdown."""
    head = ["| voice | own speaker | nearest other | margin | own recordings among themselves |", "|---|---|---|---|---|"]
    lines = []
    for name, row in found.items():
        others = row["others"]
        assert isinstance(others, Mapping)
        nearest = max(others, key=lambda other: others[other]) if others else None
        named = "-" if nearest is None else f"{nearest} {others[nearest]:.3f}"
        numbers = [row[key] for key in ("own", "margin", "ceiling")]
        own, margin, ceiling = ("-" if value is None else f"{value:.3f}" for value in numbers)
        lines.append(f"| {name} | {own} | {named} | {margin} | {ceiling} |")
    return head + lines
