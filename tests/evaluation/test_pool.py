"""Batches, worker processes, and the silence at the ends of what is scored."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation import EvaluateConfig, TestListConfig, evaluate
from kalle.evaluation.metrics import (
    RECORDING,
    Aggregate,
    DurationRatio,
    MelDistance,
    Metric,
    MetricError,
    ScoreItem,
    Value,
    bandwidth_hz,
    declared,
    end_silences,
    trimmed,
)
from kalle.evaluation.pool import BATCH_ITEMS, ScoringPool, columns_of, twin_rules, worker_count
from kalle.evaluation.report import unheard
from kalle.evaluation.word_errors import WER

RATE_HZ = 16000


class Lengths:
    """Scores the length, in batches whose sizes it remembers."""

    name = "length"
    needs: frozenset[str] = frozenset()
    aggregates = (Aggregate("length", "length", trimmed_too=True),)

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, item: ScoreItem) -> Mapping[str, Value]:
        raise AssertionError("asked one by one")

    def batch(self, items: Sequence[ScoreItem]) -> list[Mapping[str, Value] | MetricError]:
        self.batches.append(len(items))
        return [MetricError("too short") if len(item.audio) < 10 else {"length": float(len(item.audio))} for item in items]

    def describe(self) -> Mapping[str, object]:
        return {}


class Hallucinating:
    """Hears two words more in audio of two seconds."""

    calls = 0

    def __call__(self, audio: Audio, language: str) -> str:
        self.calls += 1
        return "text" if len(audio) < 2 * RATE_HZ else "text and noise"

    def describe(self) -> Mapping[str, object]:
        return {}


def item(audio: Audio, name: str = "x", **options: object) -> ScoreItem:
    return ScoreItem(name, audio, "text", **options)  # type: ignore[arg-type]


def test_a_batch_is_scored_at_once_and_a_failure_stays_with_its_item(speech: Callable[..., Audio]) -> None:
    metric = Lengths()
    good, short = columns_of([metric], [item(speech(1.0)), item(speech(1.0)[:5])])
    assert (good["length"], good["length_trimmed"]) == (16000, 16000)
    assert short["metric_errors"] == {"length": "too short"}
    assert "length" not in short
    assert metric.batches == [2], "nothing to trim, nothing to score again"


def test_silence_is_found_and_scored_without(speech: Callable[..., Audio]) -> None:
    metric, audio = Lengths(), speech(1.0)
    padded = np.concatenate([np.zeros(8000, np.float32), audio, np.zeros(32000, np.float32)])
    (row,) = columns_of([metric], [item(padded)])
    lead, tail = end_silences(audio)
    assert row["lead_silence_s"] == pytest.approx(0.5 + lead / RATE_HZ)
    assert row["tail_silence_s"] == pytest.approx(2.0 + tail / RATE_HZ, abs=0.03)
    cut, _, _ = trimmed(item(padded))
    assert (row["length"], row["length_trimmed"]) == (len(padded), len(cut.audio))
    assert len(cut.audio) <= len(audio) + RATE_HZ // 2
    silence = item(np.zeros(16000, np.float32))
    assert trimmed(silence)[0] is silence


def test_appended_silence_changes_what_is_found_and_not_what_is_trimmed(speech: Callable[..., Audio]) -> None:
    audio = speech(2.0)
    rows = columns_of(
        [DurationRatio()],
        [item(np.concatenate([audio, np.zeros(seconds * RATE_HZ, np.float32)]), recording=audio) for seconds in (1, 3)],
    )
    assert [row["duration_ratio"] for row in rows] == [1.5, 2.5]
    assert rows[0]["duration_ratio_trimmed"] == pytest.approx(rows[1]["duration_ratio_trimmed"])


def test_both_means_of_the_word_error_rate_have_trimmed_twins(speech: Callable[..., Audio]) -> None:
    """Of the first normaliser; the recogniser hears the shorter audio once, and what has nothing to trim not again."""
    transcriber = Hallucinating()
    metric = WER(transcriber, ["seed_tts", "kalle_authors"])
    padded = np.concatenate([speech(1.0), np.zeros(2 * RATE_HZ, np.float32)])
    long, short = columns_of([metric], [item(padded), item(speech(1.0))])
    assert (long["wer"], long["wer_trimmed"], short["wer"], short["wer_trimmed"]) == (2, 0, 0, 0)
    assert (long["wer_errors_trimmed"], long["wer_words_trimmed"]) == (0, 1)
    assert "wer_kalle_authors_trimmed" not in long
    assert transcriber.calls == 3
    assert [rule.name for rule in twin_rules(metric)] == ["wer_utt_mean_trimmed", "wer_corpus_trimmed"]


def test_bandwidth_is_where_the_filter_begins(speech: Callable[..., Audio]) -> None:
    from scipy.signal import butter, sosfiltfilt

    audio = speech(2.0) + 1e-3 * np.random.default_rng(0).standard_normal(32000).astype(np.float32)
    assert bandwidth_hz(audio) == pytest.approx(8000, abs=100)
    narrow = sosfiltfilt(butter(20, 3400, fs=RATE_HZ, output="sos"), audio).astype(np.float32)
    assert 3000 < bandwidth_hz(narrow) < 4500
    assert bandwidth_hz(audio[:100]) == 0


def test_the_report_says_what_a_metric_could_not_hear() -> None:
    class Sim:
        name = "sim"
        needs = frozenset({RECORDING})
        aggregates = (declared("sim"),)

    rows = [{"system": "wavs", "id": str(index), "sim": 1.0, "rate_hz": 8000, "band_hz": 3500.0} for index in range(2)]
    rows.append({"system": "wavs", "id": "wide", "sim": 1.0, "rate_hz": 24000, "band_hz": 8000.0})
    notes = unheard([Sim()], rows)  # type: ignore[list-item]
    assert notes == [
        "wavs: the audio of 2 of 3 items is stored at less than the 16000 Hz of sim",
        "wavs: the audio of 2 of 3 items holds no content up to the 8000 Hz of sim",
    ]


def test_a_missing_model_ends_the_evaluation_before_anything_is_scored(test_list: Path, tmp_path: Path) -> None:
    def build(languages: Sequence[str]) -> list[Metric]:
        raise UserError("no such model: get it with `hf download`")

    with pytest.raises(UserError, match="hf download"):
        evaluate(_config(test_list, tmp_path / "out", metrics=build))
    assert not (tmp_path / "out" / "progress").exists()


def test_how_many_workers() -> None:
    assert worker_count(3, 1) == 3
    assert worker_count(0, 10**6) == 0
    assert worker_count(None, 1) == 0
    with pytest.raises(UserError, match="workers"):
        worker_count(-1, 1)


def test_metrics_that_exist_cannot_move_to_workers(test_list: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="workers=0"):
        evaluate(_config(test_list, tmp_path / "out", metrics=[DurationRatio()], workers=2))


def plain_metrics(languages: Sequence[str]) -> list[Metric]:
    return [MelDistance(), DurationRatio()]


def _config(test_list: Path, out: Path, **options: object) -> EvaluateConfig:
    given = {"kind": "wavs", "wavs": test_list.parent, "metrics": plain_metrics, "aligned": True, "resamples": 20, "figure_items": 0}
    return EvaluateConfig(testset=TestListConfig(test_list), out=out, **{**given, **options})  # type: ignore[arg-type]


@pytest.fixture
def long_list(test_list: Path) -> Path:
    """Twenty items, each the name of one of three recordings."""
    rows = [json.loads(line) for line in test_list.read_text().splitlines()]
    for index in range(20):
        (test_list.parent / f"copy{index}.wav").write_bytes((test_list.parent / rows[index % 3]["audio"]).read_bytes())
    lines = [json.dumps(rows[index % 3] | {"id": f"copy{index}"}) for index in range(20)]
    test_list.write_text("\n".join(lines) + "\n")
    return test_list


def test_batches_have_a_fixed_size(long_list: Path, tmp_path: Path) -> None:
    metric = Lengths()
    result = evaluate(_config(long_list, tmp_path / "out", metrics=[metric], score_recordings=False))
    assert result is not None
    assert metric.batches == [BATCH_ITEMS, BATCH_ITEMS, 20 - 2 * BATCH_ITEMS]


@pytest.mark.slow
def test_workers_give_what_one_process_does(long_list: Path, tmp_path: Path) -> None:
    one = evaluate(_config(long_list, tmp_path / "one"))
    two = evaluate(_config(long_list, tmp_path / "two", workers=2))
    assert one is not None
    assert two is not None
    assert dataclasses.asdict(one) == dataclasses.asdict(two)
    for name in ("items.jsonl", "results.json", "report.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


@pytest.mark.slow
def test_a_worker_that_misses_something_says_so() -> None:
    with pytest.raises(UserError, match="hf download"), ScoringPool(_missing, workers=1):
        pass


def _missing() -> list[Metric]:
    raise UserError("no such model: get it with `hf download`")


@pytest.mark.slow
def test_a_killed_evaluation_continues_to_the_same_result(long_list: Path, tmp_path: Path) -> None:
    command = [
        "evaluate",
        "kind=wavs",
        f"wavs={long_list.parent}",
        f"testset={long_list}",
        "aligned=true",
        "figure_items=0",
        "~metrics.wer",
    ]
    command += ["~metrics.sim", "workers=2", "progress=false"]

    def run(out: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-m", "kalle", *command, f"out={tmp_path / out}"], start_new_session=True)

    killed = run("killed")
    journal = tmp_path / "killed" / "progress" / "rank-0.jsonl"
    while not journal.is_file() and killed.poll() is None:
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert run("killed").wait() == 0
    assert run("whole").wait() == 0
    for name in ("items.jsonl", "results.json", "report.md"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
