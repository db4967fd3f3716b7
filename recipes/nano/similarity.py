"""Does every built-in voice sound like its speaker and like no other, and are its words understood? Cosines, margin and WER."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from corpora import LANGUAGES, STRANGERS, SYNTHETIC
from numpy.typing import NDArray
from voices import BUILT_IN, BuiltIn

from kalle.audio import Audio, resample
from kalle.errors import UserError
from kalle.evaluation.asr import FasterWhisper
from kalle.evaluation.metrics import RATE_HZ, MetricError
from kalle.evaluation.similarity import SpeakerEmbedder, speaker_embedder
from kalle.evaluation.test_list import TestItem, choose_prompt, read_test_list
from kalle.evaluation.word_errors import seed_tts, word_errors
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


class VoiceScores:
    """Scores of voices of the weights in a folder; each speaks the same unseen English sentences.

    ``texts``: how many of them; ``asr``: the recogniser, as `kalle.evaluation.asr.FasterWhisper` takes it. ``seed``: of the first text.
    """

    def __init__(self, weights: Path, corpora: Path, texts: int, device: str, seed: int, asr: str) -> None:
        self.weights, self.corpora, self.seed = weights, corpora, seed
        self._kalle, self._embedder, self._hear = Kalle.from_pretrained(weights, device), speaker_embedder("ge2e"), FasterWhisper(asr)
        self._unseen = read_test_list(corpora.parent / "test" / SYNTHETIC).items[-texts:]

    def built_in(self) -> dict[str, dict[str, object]]:
        """`margins` of the built-in voices, with ``wer``. UserError when the weights have none."""
        chosen = [voice for voice in BUILT_IN if (self.weights / "voices" / f"{voice.name}.safetensors").is_file()]
        if not chosen:
            names = ", ".join(voice.name for voice in BUILT_IN)
            raise UserError(f"no voices: got '{self.weights}', expected one of {names} in it; run --only voices")
        voices = {voice.name: self._kalle.load_voice(voice.name) for voice in chosen}
        return self._scored(voices, {voice.name: own_recordings(voice, self.corpora)[:RECORDINGS] for voice in chosen})

    def strangers(self) -> dict[str, dict[str, object]]:
        """The same of voices made from one recording each of speakers that no training heard; the recording itself is not compared with."""
        items = read_test_list(self.corpora.parent / "test" / STRANGERS).items
        voices: dict[str, Voice] = {}
        others: dict[str, list[TestItem]] = {}
        for name in sorted({item.speaker for item in items if item.speaker}):
            prompt = choose_prompt(items, speaker=name)
            assert prompt.audio_path is not None, "choose_prompt"
            voices[name] = self._kalle.voice(prompt.audio_path)
            others[name] = [item for item in items if item.speaker == name and item.id != prompt.id][:RECORDINGS]
        return self._scored(voices, others)

    def _scored(self, voices: Mapping[str, Voice], recordings: Mapping[str, Sequence[TestItem]]) -> dict[str, dict[str, object]]:
        spoken: dict[str, Vectors] = {}
        rates: dict[str, float] = {}
        for name, voice in voices.items():
            made = [self._kalle.synthesize(item.text, voice, seed=self.seed + index) for index, item in enumerate(self._unseen)]
            audio = [resample(speech.audio, speech.sample_rate, RATE_HZ) for speech in made]
            spoken[name] = _embedded(self._embedder, audio)
            rates[name] = self._error_rate(audio)
        recorded = {name: _embedded(self._embedder, [item.audio(RATE_HZ) for item in items]) for name, items in recordings.items()}
        return {name: {**row, "wer": rates[name]} for name, row in margins(spoken, recorded).items()}

    def _error_rate(self, audio: Sequence[Audio]) -> float:
        """WER over the corpus, with the normaliser of Seed-TTS."""
        pairs = zip(self._unseen, self._hear.batch(audio, "en"), strict=True)
        counted = [word_errors(seed_tts(item.text, "en"), seed_tts(transcript, "en")) for item, transcript in pairs]
        return sum(one.errors for one in counted) / sum(one.words for one in counted)


def own_recordings(voice: BuiltIn, corpora: Path) -> list[TestItem]:
    """Recordings of the speaker of ``voice``: of the test split, and where a teacher is the speaker of training."""
    split = "test" if voice.corpus in LANGUAGES else "train"
    items = read_test_list(corpora / voice.corpus / f"cuts_{split}.jsonl.gz").items
    return [item for item in items if voice.speaker in (None, item.speaker)]


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
    head = ["| voice | WER | own speaker | nearest other | margin | own recordings among themselves |", "|---|---|---|---|---|---|"]
    lines = []
    for name, row in found.items():
        others = row["others"]
        assert isinstance(others, Mapping)
        nearest = max(others, key=lambda other: others[other]) if others else None
        named = "-" if nearest is None else f"{nearest} {others[nearest]:.3f}"
        numbers = [row.get(key) for key in ("wer", "own", "margin", "ceiling")]
        rate, own, margin, ceiling = ("-" if value is None else f"{value:.3f}" for value in numbers)
        lines.append(f"| {name} | {rate} | {own} | {named} | {margin} | {ceiling} |")
    return head + lines
