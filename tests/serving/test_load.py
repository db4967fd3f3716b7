"""The load bench: it finds what is lost, cut or mixed up, and says what a run cost."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("av")
from test_http import Served

from kalle.audio import to_pcm16
from kalle.checkpoint import read_json, write_json
from kalle.cli.bench_load import page, summary
from kalle.cli.main import main
from kalle.errors import UserError
from kalle.serving.encoding import FORMATS, AudioEncoder, encode
from kalle.serving.load import LOSSLESS, Answer, Case, LoadBench, LoadPlan, check_loopback, compared
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule

RATE = 16000
QUICK = LoadPlan(clients=4, seconds=0.5, alone_seconds=0.3, rate_hz=10.0, rate_seconds=0.3, requests=18)


def noise(seed: int, seconds: float = 1.5) -> np.ndarray:
    """Something between speech and noise, which every codec keeps."""
    white = np.random.default_rng(seed).normal(size=int(seconds * RATE))
    return (0.2 * np.convolve(white, np.hanning(32) / 16, "same")).astype(np.float32)


@pytest.mark.parametrize("form", FORMATS)
def test_an_answer_is_the_speech_that_was_asked_for_or_it_is_found_out(form: str) -> None:
    alone, other = noise(1), noise(2)
    encoder = AudioEncoder(form, RATE)
    streamed = encoder.push(alone[:9000]) + encoder.push(alone[9000:]) + encoder.finish()
    case = Case("Hi.", "random", 1, form, "whole")
    for content in (encode(alone, form, RATE), streamed):
        problem, difference = compared(Answer(case, content), alone, RATE)
        assert problem is None
        assert difference == (0.0 if form in LOSSLESS else None)
    mixed_up = compared(Answer(case, encode(other, form, RATE)), alone, RATE)[0]
    assert mixed_up is not None
    assert ("are others" if form in LOSSLESS else "other speech") in mixed_up
    for damaged in (encode(alone[: len(alone) // 2], form, RATE), encode(alone, form, RATE)[: len(streamed) // 2], b""):
        assert compared(Answer(case, damaged), alone, RATE)[0] is not None
    slightly = compared(Answer(case, encode(alone + np.float32(2e-4), form, RATE)), alone, RATE)[0]
    assert slightly == (f"samples as {form} that differ by more than the tolerance" if form in LOSSLESS else None)
    assert compared(Answer(case, encode(to_pcm16(alone) / np.float32(32767), form, RATE)), alone, RATE)[0] is None


@pytest.mark.slow
def test_a_server_is_loaded_and_every_answer_compared(kalle_toy: Kalle, tmp_path: Path) -> None:
    config = replace(kalle_toy.config, stop=StopRule(threshold=1e9, min_index=39))
    brief = Kalle(kalle_toy.flowvae, kalle_toy.lm, kalle_toy.tokenizer, config)
    served = Served(brief, tmp_path)
    try:
        report = LoadBench(served.url, brief, QUICK).run()
        # The same server, compared with weights that speak otherwise: a bench that cannot fail would find nothing here, too.
        longer = Kalle(brief.flowvae, brief.lm, brief.tokenizer, replace(config, stop=StopRule(threshold=1e9, min_index=44)))
        wrong = LoadBench(served.url, longer, QUICK).run()
    finally:
        served.close()
    assert not report.problems
    lossless = [answer for phase in wrong.phases for answer in phase.answers if answer.case.form in LOSSLESS]
    assert lossless
    assert {answer.problem for answer in lossless} <= {f"another length as {form}" for form in LOSSLESS}
    alone, load, at_rate = (phase.row() for phase in report.phases)
    assert load["answers"] >= QUICK.clients
    assert alone["mean_rows"] <= 1 <= load["mean_rows"]
    assert 0 < load["compared"] < load["answers"]
    assert load["max_difference"] <= 1e-4
    assert at_rate["first_audio_seconds"]["p95"] >= at_rate["first_audio_seconds"]["p50"] > 0
    assert {answer.case.way for answer in report.phases[2].answers} == {"audio", "sse"}
    assert report.samples[0].resident_bytes is None or report.samples[0].resident_bytes > 2**20
    facts = dict.fromkeys(("command", "kalle", "commit", "torch", "device", "threads", "load"), "x")
    told = page({"machine": facts, **json.loads(json.dumps(summary(report)))})
    assert f"lost, cut or mixed up: 0 of {sum(len(phase.answers) for phase in report.phases)}" in told


def test_what_cannot_be_loaded_is_refused(kalle_toy: Kalle, served_nothing: str) -> None:
    with pytest.raises(UserError, match="no server of speech"):
        LoadBench(served_nothing, kalle_toy, QUICK).run()
    for url in ("http://192.0.2.1:8000", "http://example.org"):
        with pytest.raises(UserError, match="another machine"):
            check_loopback(url)
    for url in ("nothing", "127.0.0.1:8000", "http://[::1"):
        with pytest.raises(UserError, match="no address of a server"):
            check_loopback(url)
    with pytest.raises(UserError, match="clients of the load"):
        LoadPlan(clients=0)


@pytest.fixture
def served_nothing() -> str:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.mark.slow
def test_the_command_starts_its_own_server_and_writes_its_report(toy_weights: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "toy", tmp_path / "load.json"
    shutil.copytree(toy_weights, folder)
    write_json(folder / "config.json", {**read_json(folder / "config.json"), "stop": {"threshold": 1e9, "min_index": 39}})
    parts = ["--clients", "4", "--seconds", "1", "--alone-seconds", "1", "--rate-seconds", "1", "--requests", "18"]
    assert main(["bench", "load", "--model", str(folder), *parts, "--out", str(out)]) == 0
    found = read_json(out)
    assert found["problems"] == {}
    assert found["frames_ratio"] == found["rows"][1]["frames_per_second"] / found["rows"][0]["frames_per_second"]
    assert "mixed up: 0 of" in out.with_suffix(".md").read_text()
