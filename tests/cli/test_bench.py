from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kalle.cli.main import main
from kalle.evaluation.benchmark import PeakMemory

FAST = ["--size", "nano", "--threads", "1", "--device", "cpu"]


def test_every_step_is_measured_and_the_algorithms_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "synthesis", *FAST, "--seconds", "0.8", "--batch", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    rows = {row["step"]: row for row in found["rows"]}
    cached, uncached, decoding, stream, batch = rows.values()
    assert [row["step"] for row in found["rows"]][0:1] == ["frames, cached"]
    assert "release" in uncached["step"]
    assert cached["difference"] < 1e-4
    assert uncached["difference"] is None
    assert stream["difference"] < 1e-4
    assert 0 < stream["first_audio_seconds"] <= stream["wall_seconds"]
    assert batch["speech_seconds"] == pytest.approx(1.6)
    for row in rows.values():
        assert row["rtf"] == pytest.approx(row["wall_seconds"] / row["speech_seconds"])
        assert row["peak_bytes"] > 2**20
    assert decoding["speech_seconds"] == cached["speech_seconds"] == pytest.approx(0.8)
    assert found["machine"]["threads"] == 1
    assert "RTF = wall seconds / seconds of speech" in capsys.readouterr().out


def test_streaming_is_measured_against_decoding_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "streaming", *FAST, "--frames", "12", "--chunk", "2", "--chunk", "5", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["chunk_frames"] for row in rows] == [2, 5]
    for row in rows:
        assert row["max_error"] < 1e-5 < row["level"]
        assert row["flop_ratio"] == pytest.approx(1, abs=0.05)
    assert "ratios to decoding at once" in capsys.readouterr().out


def test_ways_to_train_are_measured_in_turn(toy_lm_config, toy_latents: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("kalle.cli.bench_train._configuration", lambda part, size: toy_lm_config)
    out = tmp_path / "bench.json"
    words = ["--data", str(toy_latents), "--positions", "400", "--steps", "1", "--rounds", "2", "--device", "cpu", "--threads", "1"]
    assert main(["bench", "train", "lm", *words, "--out", str(out)]) == 0
    padded, packed, half = json.loads(out.read_text())["rows"]
    assert padded["speedup"] == 1
    assert 0 == packed["padding_share"] <= padded["padding_share"]
    assert half["precision"] == "bf16-mixed"
    assert all(row["frames_per_second"] > 0 for row in (padded, packed, half))
    assert "loader alone (0 workers)" in capsys.readouterr().out
    assert main(["bench", "train", "opera"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither --model and --size"),
        (["--size", "nano", "--model", "x"], "both --model and --size"),
        (["--size", "nano", "--seconds", "0"], "bad --seconds"),
        (["--size", "nano", "--batch", "0"], "bad --batch"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "synthesis", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_peak_that_is_the_whole_processs_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kalle.evaluation.benchmark._RESET", tmp_path / "none" / "clear_refs")
    out = tmp_path / "bench.json"
    assert main(["bench", "synthesis", *FAST, "--seconds", "0.4", "--no-uncached", "--out", str(out)]) == 0
    assert capsys.readouterr().out.count("(peak since the process began)") == 3
    assert all(row["peak_since_start"] for row in json.loads(out.read_text())["rows"])


def test_the_peak_sees_what_was_held_and_let_go() -> None:
    cpu = torch.device("cpu")
    with PeakMemory(cpu) as idle:
        pass
    with PeakMemory(cpu) as busy:
        torch.ones(64 * 2**20).sum()
    if not busy.since_start:
        assert busy.bytes - idle.bytes > 150 * 2**20


def test_the_algorithm_without_a_cache_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalle.evaluation.benchmark.LONGEST_UNCACHED_S", 0.0)
    out = tmp_path / "bench.json"
    assert main(["bench", "synthesis", *FAST, "--seconds", "0.4", "--out", str(out)]) == 0
    cached, uncached = json.loads(out.read_text())["rows"][:2]
    assert "no cache" in uncached["step"]
    assert 0 < uncached["speech_seconds"] < cached["speech_seconds"]
