from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kalle.audio import Audio, rms_dbfs
from kalle.errors import UserError
from kalle.evaluation.metrics import PESQ, STOI, DurationRatio, MelDistance, Metric, MetricError, ScoreItem
from kalle.evaluation.similarity import GE2E, LEVEL_DBFS, Similarity, speaker_embedder

pytest.importorskip("pesq")
pytest.importorskip("pystoi")
SIGNAL_METRICS = [STOI, lambda: PESQ("wb"), lambda: PESQ("nb"), MelDistance, DurationRatio]


def pair(audio: Audio, recording: Audio) -> ScoreItem:
    return ScoreItem("x", audio, "some text", recording=recording, aligned=True, speaker=recording)


@pytest.mark.parametrize(
    ("metric", "column", "identity"),
    [
        (STOI(), "stoi", 1.0),
        (PESQ("wb"), "pesq_wb", 4.644),
        (PESQ("nb"), "pesq_nb", 4.549),
        (MelDistance(), "mel_l1", 0.0),
        (DurationRatio(), "duration_ratio", 1.0),
    ],
)
def test_identity(metric: Metric, column: str, identity: float, speech: Callable[..., Audio]) -> None:
    audio = speech()
    assert isinstance(metric, Metric)
    assert metric(pair(audio, audio))[column] == pytest.approx(identity, abs=1e-3)


@pytest.mark.parametrize("make", [STOI, lambda: PESQ("wb"), lambda: PESQ("nb")])
def test_noise_lowers_quality(make: Callable[[], Metric], speech: Callable[..., Audio]) -> None:
    metric, audio = make(), speech()
    noise = np.random.default_rng(1).standard_normal(audio.size).astype(np.float32)
    little, much = (metric(pair(audio + level * noise, audio))[metric.aggregates[0].numerator] for level in (0.01, 0.1))
    assert float(much) < float(little) < float(metric(pair(audio, audio))[metric.aggregates[0].numerator])


def test_mel_l1_of_a_gain_is_its_logarithm(speech: Callable[..., Audio]) -> None:
    loud = speech() + 0.01 * np.random.default_rng(2).standard_normal(32000).astype(np.float32)
    assert MelDistance()(pair(0.5 * loud, loud))["mel_l1"] == pytest.approx(np.log(2), abs=1e-3)


def test_pairs_are_cropped_to_the_shorter(speech: Callable[..., Audio]) -> None:
    audio = speech(2.0)
    longer = np.concatenate([audio, np.ones(4000, np.float32)])
    assert MelDistance()(pair(longer, audio))["mel_l1"] == 0
    assert MelDistance()(pair(audio, longer))["mel_l1"] == 0


def test_duration_ratio(speech: Callable[..., Audio]) -> None:
    assert DurationRatio()(pair(speech(3.0), speech(2.0)))["duration_ratio"] == 1.5


@pytest.mark.parametrize("make", SIGNAL_METRICS[:3])
def test_silence_is_an_error_and_not_a_number(make: Callable[[], Metric]) -> None:
    silence = np.zeros(16000, np.float32)
    with pytest.raises(MetricError):
        make()(pair(silence, silence))


@pytest.mark.parametrize("make", SIGNAL_METRICS[:4])
def test_too_short_is_an_error_and_not_a_number(make: Callable[[], Metric], speech: Callable[..., Audio]) -> None:
    audio = speech(2.0)[:100]
    with pytest.raises(MetricError):
        make()(pair(audio, audio))


def test_pesq_mode_is_checked() -> None:
    with pytest.raises(UserError, match="expected wb or nb"):
        PESQ("swb")


class Levels:
    """An embedder of two numbers: the level of each half."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, audio: Audio) -> Audio:
        self.calls += 1
        return np.array([np.abs(half).mean() for half in np.array_split(audio, 2)], dtype=np.float32)

    def describe(self) -> dict[str, object]:
        return {"model": "levels"}


def test_similarity_is_the_cosine_and_embeds_a_shared_reference_once() -> None:
    embedder = Levels()
    metric = Similarity(embedder=embedder)
    first, second = np.array([1, 0], np.float32).repeat(10), np.array([1, 1], np.float32).repeat(10)
    same = metric(ScoreItem("x", first, "t", speaker=first))["sim"]
    other = metric(ScoreItem("y", second, "t", speaker=first))["sim"]
    assert (same, other) == (pytest.approx(1), pytest.approx(np.sqrt(0.5)))
    assert embedder.calls == 2


@pytest.mark.parametrize(("model", "words"), [("wavlm", "checkpoint=FILE"), ("dvector", "ge2e.*Resemblyzer")])
def test_missing_speaker_model_names_model_and_package(model: str, words: str) -> None:
    with pytest.raises(UserError, match=f"{model}.*{words}"):
        speaker_embedder(model)


@pytest.mark.slow
def test_ge2e_identity_loudness_and_silence(speech: Callable[..., Audio], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("resemblyzer")
    metric, audio = Similarity("ge2e"), speech(3.0)
    assert isinstance(metric.embedder, GE2E)
    theirs = metric.embedder._encoder.embed_utterance(audio * np.float32(10 ** ((LEVEL_DBFS - rms_dbfs(audio)) / 20)))
    assert np.abs(metric.embedder(audio) - theirs).max() < 1e-4
    assert metric(pair(audio, audio))["sim"] == pytest.approx(1, abs=1e-5)
    assert metric(pair(0.05 * audio, audio))["sim"] == pytest.approx(1, abs=1e-4)
    assert float(metric(pair(speech(3.0, seed=5)[::2].repeat(2), audio))["sim"]) < 0.999
    with pytest.raises(MetricError, match="no voice"):
        metric(pair(np.zeros(16000, np.float32), audio))
    assert capsys.readouterr().out == ""
