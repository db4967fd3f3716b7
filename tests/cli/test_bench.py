from __future__ import annotations

import dataclasses
import importlib.util
import json
import mmap
from pathlib import Path

import pytest
import torch

from kalle.cli.bench_common import Size, configuration, warn_of_load
from kalle.cli.bench_train import Variant, _flowvae_variants, _turn
from kalle.cli.main import main
from kalle.evaluation.benchmark import PeakMemory
from kalle.evaluation.limits import cached_flop, counted_flop
from kalle.models.flowvae import BigVGANConfig
from kalle.models.flowvae.bigvgan import AntiAliasedSnake
from kalle.models.lm import KalleLM

HAS_INT8 = all(map(importlib.util.find_spec, ("onnx", "onnxruntime")))
FAST = ["--size", "nano", "--threads", "1", "--device", "cpu"]


def test_every_step_is_measured_and_the_engines_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    engines = ["--engine", "float32", "--engine", "bfloat16", *(["--engine", "int8"] if HAS_INT8 else [])]
    assert main(["bench", "synthesis", *FAST, *engines, "--seconds", "0.8", "--batch", "2", "--out", str(out)]) == 0
    found = json.loads(out.read_text())
    rows = {row["step"]: row for row in found["rows"]}
    uncached, cached, stream = rows["frames, the release's algorithm"], rows["frames, float32"], rows["stream, float32"]
    assert cached["difference"] < 1e-4
    assert stream["difference"] < 1e-3
    assert 0 < stream["first_audio_seconds"] <= stream["wall_seconds"]
    assert cached["ratios"]["the release's algorithm"] == pytest.approx(uncached["rtf"] / cached["rtf"])
    batch, half = rows["batch of 2, bfloat16"], rows["frames, bfloat16"]
    assert batch["speech_seconds"] == pytest.approx(1.6)
    assert batch["ratios"]["one row"] == pytest.approx(half["rtf"] / batch["rtf"])
    assert 0 < half["divergence_mean"] <= half["divergence_99"] < 0.1
    if HAS_INT8:
        assert 0 < rows["frames, int8"]["divergence_mean"] < 0.1
        assert rows["frames, int8"]["library"].startswith("onnxruntime")
        assert rows["frames, int8"]["limit_seconds"] < cached["limit_seconds"]
    whole, decoding = rows["speaking, float32 + trained form"], rows["decoding, trained form"]
    assert whole["wall_seconds"] == pytest.approx(cached["wall_seconds"] + decoding["wall_seconds"])
    assert whole["ratios"]["the release's algorithm"] == pytest.approx(
        (uncached["wall_seconds"] + decoding["wall_seconds"]) / whole["wall_seconds"]
    )
    for row in rows.values():
        assert row["rtf"] == pytest.approx(row["wall_seconds"] / row["speech_seconds"])
        assert row["limit_seconds"] > 0
        assert row["limited_by"] in ("memory", "compute")
        assert row["peak_bytes"] > 2**20
    assert found["machine"]["threads"] == 1
    assert found["machine"]["read_bytes_per_second"] > 1e8
    table = out.with_suffix(".md").read_text()
    assert all(step in table for step in rows)
    assert "RTF = wall seconds / seconds of speech" in capsys.readouterr().out


@pytest.mark.parametrize(("load", "told"), [(0.2, False), (2.0, True), (None, False)])
def test_a_machine_that_is_not_quiet_is_told(load: float | None, told: bool, capsys: pytest.CaptureFixture[str]) -> None:
    warn_of_load(load)
    assert ("not quiet" in capsys.readouterr().err) == told


def test_what_the_time_is_too_short_for_is_left_out_and_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "bench.json"
    assert main(["bench", "synthesis", *FAST, "--engine", "float32", "--seconds", "0.8", "--minutes", "0", "--out", str(out)]) == 0
    assert json.loads(out.read_text())["rows"] == []
    assert "left out after 0 minutes: frames, float32" in capsys.readouterr().out


def test_the_paper_s_table_is_counted(tmp_path: Path) -> None:
    """Table 4 of the paper: 7,663 G for the language model and 228 to 249 G for the decoder, by how transposed convolutions are counted."""
    assert main(["bench", "compute", "--size", "full", "--out", str(tmp_path / "compute.json")]) == 0
    paper, true = json.loads((tmp_path / "compute.json").read_text())["rows"]
    assert round(paper["lm"] / 1e9) == 7663
    assert 228 <= paper["decoder"] / 1e9 <= 249
    assert true["decoder"] == pytest.approx(2 * paper["decoder"], rel=1e-6)
    assert 2 * 157 * 0.973 <= true["lm"] / 1e9 <= 2 * 157 * 0.973 * 1.05  # two a product, 32 + 125 positions, and attention


@torch.no_grad()
def test_the_cache_s_arithmetic_is_that_of_every_step() -> None:
    config = configuration("lm", Size.nano)
    with torch.device("meta"):  # where attention is counted, which it is not on the CPU
        lm = KalleLM(config).eval()

    def speak() -> None:
        _, state = lm.prefill(torch.zeros(1, 7, dtype=torch.int64, device="meta"))
        for _ in range(5):
            _, state = lm.step(torch.zeros(1, config.latent_dim, device="meta"), state)

    assert cached_flop(config, frames=5, text_positions=7) == counted_flop(speak)


@pytest.mark.skipif(not HAS_INT8, reason="the extra 'fast' is not installed")
def test_the_gain_of_8_bits_is_measured_by_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "crossover.json"
    assert main(["bench", "crossover", "--hidden", "64", "--hidden", "128", "--rows", "2", "--steps", "2", "--out", str(out)]) == 0
    small, large = json.loads(out.read_text())["rows"]
    assert small["layer_parameters"] < large["layer_parameters"]
    assert all(row["rows"] == 2 and row["fp32_seconds"] > 0 and row["int8_seconds"] > 0 for row in (small, large))
    assert capsys.readouterr().out.count("\n") == 3
    assert main(["bench", "crossover", "--hidden", "100"]) == 2


@pytest.mark.parametrize("engine", ["int4", "graph"])
def test_an_engine_that_cannot_run_here_is_refused(engine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "synthesis", *FAST, "--engine", engine]) == 2
    assert "expected float32" in capsys.readouterr().err


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
    assert all(row["frames_per_second"] > 0 and 0 < row["flop_utilisation"] < 1 for row in (padded, packed, half))
    assert "loader alone (0 workers)" in capsys.readouterr().out
    assert main(["bench", "train", "opera"]) == 2


def test_training_that_takes_too_long_ends(toy_lm_config, toy_latents: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """However many steps are asked for, a turn ends with the one in which its time is over."""
    monkeypatch.setattr("kalle.cli.bench_train._configuration", lambda part, size: toy_lm_config)
    out = tmp_path / "bench.json"
    words = ["--data", str(toy_latents), "--positions", "400", "--steps", "1000000", "--rounds", "1", "--device", "cpu", "--threads", "1"]
    assert main(["bench", "train", "lm", *words, "--minutes", "0", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["frames_per_second"] for row in rows] == [None] * len(rows)
    assert capsys.readouterr().out.count("--minutes") == len(rows)


@pytest.mark.parametrize(("decoder", "fused"), [(True, ["fp32, numba", "bf16, numba"]), (False, [])])
def test_fused_activations_are_measured_where_the_decoder_has_them(
    decoder: bool, fused: list[str], toy_flowvae_config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("numba")
    paper = BigVGANConfig(initial_channels=8, strides=(10, 16), block_kernel_sizes=(3,), block_dilations=(1,))
    config = dataclasses.replace(toy_flowvae_config, decoder=paper) if decoder else toy_flowvae_config
    monkeypatch.setattr("kalle.cli.bench_train._configuration", lambda part, size: config)
    variants = _flowvae_variants("nano", tmp_path, tmp_path, 1, 6, 0, True, torch.device("cpu"))
    assert [variant.name for variant in variants if "numba" in variant.name] == fused
    assert {"fp32", "bf16", "bf16, compiled"} <= {variant.name for variant in variants}
    for variant in variants[: 1 + len(fused)]:
        ways = {part.way for part in variant.module().modules() if isinstance(part, AntiAliasedSnake)}
        assert ways == ({"numba" if "numba" in variant.name else "none"} if decoder else set())


def test_a_kernel_that_fails_costs_its_own_row_alone(tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("no kernel\nimage")

    new, known = (Variant(name, "32-true", broken, list, len) for name in ("fp32, triton", "fp32"))
    _turn(new, torch.device("cpu"), 1, 0.0)
    assert new.problem == "failed: no kernel image"
    with pytest.raises(RuntimeError, match="no kernel"):
        _turn(known, torch.device("cpu"), 1, 0.0)


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
    words = ["--engine", "float32", "--seconds", "0.4", "--no-uncached", "--out", str(out)]
    assert main(["bench", "synthesis", *FAST, *words]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert capsys.readouterr().out.count("peak since the process began") == len(rows) > 0
    assert all(row["peak_since_start"] for row in rows)


def test_the_peak_sees_what_was_held_and_let_go() -> None:
    cpu = torch.device("cpu")
    with PeakMemory(cpu) as idle:
        pass
    # Not from malloc, which may have kept so much from another test (`kalle.evaluation.asr.keep_freed_memory`).
    with PeakMemory(cpu) as busy, mmap.mmap(-1, 256 * 2**20) as held:
        held[:: mmap.PAGESIZE] = bytes(len(held) // mmap.PAGESIZE)
    if not busy.since_start:
        assert busy.bytes - idle.bytes > 150 * 2**20


def test_the_algorithm_without_a_cache_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kalle.evaluation.benchmark.LONGEST_UNCACHED_S", 0.0)
    out = tmp_path / "bench.json"
    assert main(["bench", "synthesis", *FAST, "--engine", "float32", "--seconds", "0.4", "--out", str(out)]) == 0
    uncached, cached = json.loads(out.read_text())["rows"][:2]
    assert 0 < uncached["speech_seconds"] < cached["speech_seconds"]
