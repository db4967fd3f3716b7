"""Scores without a reference: what they refuse, and the heat map of emotions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation.asr import state_sha256
from kalle.evaluation.metrics import MetricError, ScoreItem
from kalle.evaluation.opinion import DNSMOS, EMOTIONS, UTMOS, DistillMOS, Emotion2Vec, emotion_matrix, intended_emotion


def item(audio: Audio, name: str = "x") -> ScoreItem:
    return ScoreItem(name, audio, "text")


@pytest.mark.slow
@pytest.mark.parametrize(("make", "module", "columns"), [
    (DistillMOS, "distillmos", ["distillmos"]),
    (DNSMOS, "speechmos", ["dnsmos_ovrl", "dnsmos_sig", "dnsmos_bak"]),
])  # fmt: skip
def test_scores_of_packages_with_weights(make: Callable[[], Any], module: str, columns: list[str], speech: Callable[..., Audio]) -> None:
    pytest.importorskip(module)
    metric = make()
    scores = metric(item(speech(2.0)))
    assert list(scores) == columns
    assert all(1 <= float(score) <= 5 for score in scores.values())
    assert scores == metric(item(speech(2.0)))
    assert len(str(metric.describe()["weights_sha256"])) == 16
    with pytest.raises(MetricError):
        metric(item(np.zeros(16000, np.float32)))


def test_utmos_asks_for_its_weights(tmp_path: Path) -> None:
    pytest.importorskip("utmos_pytorch")
    with pytest.raises(UserError, match="download_utmos_ckpt"):
        UTMOS()
    torch.save({"other": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"lacks \d+ tensors"):
        UTMOS(tmp_path / "other.pt")


def test_emotion_of_an_id() -> None:
    assert [intended_emotion(name) for name in ("sad_03", "sad/03", "other", "glad_1")] == ["sad", "sad", "other", None]


def scores_of(audio: Audio) -> list[float]:
    """Hears the emotion whose number is the length in seconds."""
    scores = np.full(len(EMOTIONS), 0.05)
    scores[round(len(audio) / 16000) - 1] = 0.6
    return list(scores)


def test_the_intended_emotion_is_scored(speech: Callable[..., Audio]) -> None:
    metric = Emotion2Vec(classifier=scores_of)
    row = metric(item(speech(7.0), "sad_1"))
    assert (row["emotion"], row["emotion_heard"], row["emotion_angry"]) == (0.6, "sad", 0.05)
    with pytest.raises(MetricError, match="begins with none"):
        metric(item(speech(1.0), "x_1"))


def test_every_column_of_the_heat_map_sums_to_one() -> None:
    generator = np.random.default_rng(0)
    shown = ["angry", "sad", "happy"]
    rows = [
        {"id": f"{emotion}_{index}", **{f"emotion_{name}": float(score) for name, score in zip(EMOTIONS, generator.random(9), strict=True)}}
        for emotion in shown[:2]
        for index in range(4)
    ]
    means, counts = emotion_matrix([*rows, {"id": "sad_9", "error": "gone"}, {"id": "unknown_1", "emotion_unknown": 1.0}], shown)
    np.testing.assert_allclose(means.sum(axis=0), [1, 1, 0])
    assert counts.sum(axis=0).tolist() == [4, 4, 0]
    certain = {"id": "sad_1", **dict.fromkeys((f"emotion_{name}" for name in EMOTIONS), 0.0), "emotion_sad": 1.0}
    means, counts = emotion_matrix([certain], shown)
    assert (means[1, 1], counts[1, 1]) == (1, 1)
    with pytest.raises(UserError, match="metric emotion"):
        emotion_matrix([{"id": "sad_1"}], shown)


def test_a_classifier_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="funasr"):
        Emotion2Vec("nowhere/at_all")


@pytest.mark.usefixtures("funasr_on_the_path")
def test_a_classifier_states_its_weights() -> None:
    told = Emotion2Vec("large").describe()
    torch.manual_seed(len("large"))
    assert told["weights_sha256"] == state_sha256(torch.nn.Linear(2, 2))
    assert Emotion2Vec("larger").describe()["weights_sha256"] != told["weights_sha256"]
    assert "weights_sha256" not in Emotion2Vec(classifier=scores_of).describe(), "a function states none"
