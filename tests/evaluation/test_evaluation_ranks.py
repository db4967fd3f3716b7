from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest

from kalle.checkpoint import write_weights
from kalle.data.shared_work import OthersUnfinished, RankJournals, Share
from kalle.errors import UserError
from kalle.evaluation import (
    EvaluateConfig,
    Settings,
    TestListConfig,
    evaluate,
    evaluate_reconstruction,
    evaluate_synthesis,
    evaluate_wavs,
    run,
)
from kalle.evaluation.metrics import DurationRatio, MelDistance
from kalle.evaluation.run import audio_digest, weights_digest
from kalle.evaluation.test_list import TestItem
from kalle.extras import checkout_commit, cpu_name
from kalle.files import fingerprint, folder_lock
from kalle.models.flowvae import FlowVAE
from kalle.synthesis.kalle import Kalle

SETTINGS = Settings(resamples=50, figure_items=2)
NAMES = ("results.json", "items.jsonl", "report.md", "figure.png")


def score(kind: str, flowvae: FlowVAE, kalle: Kalle, items: list[TestItem], out: Path, share: Share, **options: Any) -> bool:
    """Whether the evaluation is complete after this rank."""
    metrics = [MelDistance(), DurationRatio()]
    with RankJournals(out, "mark", share, len(items), **options) as journal:
        try:
            if kind == "reconstruction":
                evaluate_reconstruction(flowvae, items, metrics, out, sample=True, settings=SETTINGS, journal=journal)
            elif kind == "synthesis":
                evaluate_synthesis(kalle, items, metrics, out, settings=SETTINGS, journal=journal)
            else:
                assert items[0].audio_path is not None
                evaluate_wavs(items[0].audio_path.parent, items, metrics, out, settings=SETTINGS, journal=journal)
        except OthersUnfinished:
            return False
    return True


@pytest.fixture
def named(items: list[TestItem]) -> list[TestItem]:
    """The items under the names of their files, so that a folder of wavs holds them."""
    import dataclasses

    return [dataclasses.replace(item, id=str(index)) for index, item in enumerate(items)]


def untimed(path: Path) -> Any:
    """A result's text without what differs between runs: seconds of synthesis."""
    if path.name == "items.jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [{key: value for key, value in row.items() if key != "synthesis_s"} for row in rows]
    return path.read_bytes()


@pytest.mark.parametrize("kind", ["reconstruction", "synthesis", "wavs"])
def test_ranks_leave_what_one_process_does(kind: str, flowvae: FlowVAE, kalle: Kalle, named: list[TestItem], tmp_path: Path) -> None:
    assert score(kind, flowvae, kalle, named, tmp_path / "one", Share())
    assert not score(kind, flowvae, kalle, named, tmp_path / "many", Share(1, 2))
    assert not any((tmp_path / "many" / name).exists() for name in NAMES), "nothing is summarised before all is there"
    assert score(kind, flowvae, kalle, named, tmp_path / "many", Share(0, 2))
    timed = ("results.json", "report.md") if kind == "synthesis" else ()
    for name in NAMES:
        if name not in timed:
            assert untimed(tmp_path / "many" / name) == untimed(tmp_path / "one" / name), name
    one, many = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("one", "many"))
    for summary in (one["summary"], many["summary"]):
        summary.get("synthesis", {}).pop("rtf", None)
    assert many["summary"] == one["summary"]
    assert many["counts"] == one["counts"]


def test_the_journal_adds_nothing_to_a_result(flowvae: FlowVAE, kalle: Kalle, named: list[TestItem], tmp_path: Path) -> None:
    assert score("reconstruction", flowvae, kalle, named, tmp_path / "a", Share())
    evaluate_reconstruction(flowvae, named, [MelDistance(), DurationRatio()], tmp_path / "b", sample=True, settings=SETTINGS)
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_an_interrupted_evaluation_continues(
    flowvae: FlowVAE, kalle: Kalle, named: list[TestItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert score("reconstruction", flowvae, kalle, named, tmp_path / "one", Share())
    decoded: list[int] = []
    plain = FlowVAE.decode

    def dying(self: FlowVAE, z: Any) -> Any:
        decoded.append(1)
        if len(decoded) == 3:
            raise KeyboardInterrupt
        return plain(self, z)

    monkeypatch.setattr(FlowVAE, "decode", dying)
    with pytest.raises(KeyboardInterrupt):
        score("reconstruction", flowvae, kalle, named, tmp_path / "out", Share())
    journal = tmp_path / "out" / "progress" / "rank-0.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"index": 1, "rows": [{"torn')
    decoded[:] = [1, 1, 1]
    with caplog.at_level(logging.INFO):
        assert score("reconstruction", flowvae, kalle, named, tmp_path / "out", Share())
    assert len(decoded) == 3 + 4, "two systems of the two items that were left"
    assert "1 of 3 items were scored before" in caplog.text
    for name in NAMES:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_never_scores_again(flowvae: FlowVAE, kalle: Kalle, named: list[TestItem], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert score("reconstruction", flowvae, kalle, named, tmp_path, Share())
    encoded: list[int] = []
    plain = FlowVAE.encode
    monkeypatch.setattr(FlowVAE, "encode", lambda self, wav: encoded.append(1) or plain(self, wav))
    decoded: list[int] = []
    decode = FlowVAE.decode
    monkeypatch.setattr(FlowVAE, "decode", lambda self, z: decoded.append(1) or decode(self, z))
    assert score("reconstruction", flowvae, kalle, named, tmp_path, Share())
    assert (len(encoded), len(decoded)) == (3, 0), "encoded for the latent health alone"
    assert score("reconstruction", flowvae, kalle, named, tmp_path, Share(), resume=False)
    assert len(decoded) == 6


def test_failed_items_are_tried_once_more(flowvae: FlowVAE, kalle: Kalle, named: list[TestItem], tmp_path: Path) -> None:
    path = named[1].audio_path
    assert path is not None
    away = path.rename(path.with_suffix(".away"))
    assert score("reconstruction", flowvae, kalle, named, tmp_path / "out", Share())
    assert json.loads((tmp_path / "out" / "results.json").read_text())["counts"]["reconstruction"]["errors"] == 1
    away.rename(path)
    assert score("reconstruction", flowvae, kalle, named, tmp_path / "out", Share())
    assert json.loads((tmp_path / "out" / "results.json").read_text())["counts"]["reconstruction"]["errors"] == 0


def test_rows_of_another_evaluation_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with RankJournals(tmp_path, "a", Share(), 2) as journal:
        journal.keep(0, [{"system": "x", "id": "0", "text": "", "audio_s": 1.0}])
    with RankJournals(tmp_path, "a", Share(), 2) as journal:
        assert journal.pending() == [1]
    with caplog.at_level(logging.INFO), RankJournals(tmp_path, "b", Share(), 2) as journal:
        assert journal.pending() == [0, 1]
    assert "starting anew" in caplog.text


def test_two_processes_of_one_rank_are_refused(tmp_path: Path) -> None:
    with folder_lock(tmp_path, "rank-1", wait=False), pytest.raises(UserError, match="rank 1 of 2 already evaluates into"):
        RankJournals(tmp_path, "a", Share(1, 2), 2).__enter__()


def test_the_fingerprint_follows_settings_and_files(tmp_path: Path) -> None:
    assert fingerprint({"a": 1, "b": Path("x")}) == fingerprint({"b": Path("x"), "a": 1}) != fingerprint({"a": 2, "b": Path("x")})
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.WAV").write_bytes(b"1")
    before = audio_digest(tmp_path)
    (tmp_path / "README.md").write_bytes(b"of these recordings")
    assert audio_digest(tmp_path) == before
    (tmp_path / "sub" / "a.WAV").write_bytes(b"2")
    assert audio_digest(tmp_path) != before


@pytest.fixture
def weights(kalle: Kalle, tmp_path: Path) -> Path:
    """A weight folder with a default voice, another one, and what lies beside them."""
    folder = tmp_path / "weights"
    kalle.flowvae.save_pretrained(folder / "flowvae")
    kalle.lm.save_pretrained(folder / "lm")
    kalle.tokenizer.save(folder / "tokenizer")
    (folder / "voices").mkdir()
    for name in ("voices/mine.safetensors", "voices/other.safetensors", "voices/NOTES.md", "README.md", "LICENSE", "lm/int8.safetensors"):
        (folder / name).write_text(name)
    (folder / "config.json").write_text(json.dumps({"format_version": 1, "voice": "mine"}))
    return folder


@pytest.mark.parametrize("name", ["voices/other.safetensors", "voices/NOTES.md", "README.md", "LICENSE", "lm/int8.safetensors", "new.txt"])
def test_files_that_speech_does_not_depend_on_leave_the_digest(weights: Path, name: str) -> None:
    before = weights_digest(weights)
    (weights / name).write_text("other")
    assert weights_digest(weights) == before


@pytest.mark.parametrize(
    "name",
    [
        "config.json", "flowvae/config.json", "flowvae/model.safetensors", "lm/config.json", "lm/model.safetensors",
        "tokenizer/tokenizer.json", "tokenizer/phonemes.json", "voices/mine.safetensors",
    ],
)  # fmt: skip
def test_files_that_speech_depends_on_change_the_digest(weights: Path, name: str) -> None:
    before = weights_digest(weights)
    content = (weights / name).read_bytes() if (weights / name).is_file() else b"{}"
    (weights / name).write_bytes(content + b" ")
    assert weights_digest(weights) != before


def test_a_folder_without_weights_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "flowvae.pt").write_bytes(b"not converted yet")
    with pytest.raises(UserError, match="not a weight folder"):
        weights_digest(tmp_path)


def test_a_flowvae_alone_and_shards_have_a_digest(weights: Path, kalle: Kalle) -> None:
    whole, alone = weights_digest(weights), weights_digest(weights / "flowvae")
    assert whole != alone
    (weights / "lm" / "model.safetensors").unlink()
    write_weights(weights / "lm", kalle.lm.state_dict(), max_bytes=60_000)
    sharded = weights_digest(weights)
    assert sharded != whole
    (weights / "lm" / "model-00099-of-00099.safetensors").write_bytes(b"of no index")
    assert weights_digest(weights) == sharded


def test_a_report_names_weights_and_machine_and_another_machine_continues(
    weights: Path, test_list: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    given = EvaluateConfig(
        kind="reconstruction", model=weights, testset=TestListConfig(test_list), out=weights.parent / "out", metrics=[MelDistance()],
        figure_items=0, resamples=10,
    )  # fmt: skip
    result = evaluate(given)
    assert result is not None
    assert result.config["weights_sha256"] == weights_digest(weights)[:16]
    machine = {"cpu": cpu_name(), "cpus": os.cpu_count(), "commit": checkout_commit()}
    assert {name: result.config[name] for name in machine} == machine
    assert f"cpu {cpu_name()}" in (weights.parent / "out" / "report.md").read_text()
    monkeypatch.setattr(run, "cpu_name", lambda: "another processor")
    continued = evaluate(given)
    assert continued is not None
    assert continued.config["cpu"] == "another processor"
    assert "3 of 3 items were scored before" in caplog.text


def test_a_read_me_beside_the_weights_costs_no_score(weights: Path, test_list: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    given = EvaluateConfig(
        kind="reconstruction", model=weights, testset=TestListConfig(test_list), out=weights.parent / "out", metrics=[MelDistance()],
        figure_items=0, resamples=10,
    )  # fmt: skip
    evaluate(given)
    (weights / "README.md").write_text("corrected")
    evaluate(given)
    assert "3 of 3 items were scored before" in caplog.text
