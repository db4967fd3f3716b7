"""Every fabricated fault is found under its own name, and nothing clean is flagged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kalle.audio import write_audio
from kalle.cli.data import app
from kalle.cli.main import main
from kalle.data.corpus import measures
from kalle.data.corpus.cuts import load_cuts
from kalle.data.corpus.diagnosis import Diagnosis, diagnose
from kalle.data.corpus.quality import CHECKS, REMOVED_BY_DEFAULT, QualityLimits
from kalle.errors import UserError


def run(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["doctor", *[str(argument) for argument in arguments]], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result.output


def untracked(items, total):
    return items


@pytest.fixture(scope="session")
def report_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("report") / "out"


@pytest.fixture(scope="session")
def diagnosis(sick, report_folder: Path) -> Diagnosis:
    return diagnose(sick.folder, report_folder, QualityLimits(), 1, untracked)


def test_every_fault_is_found_under_its_name_and_nothing_else_is(sick, diagnosis: Diagnosis) -> None:
    flagged: dict[str, set[str]] = {name: set() for name in sick.expected}
    for finding in diagnosis.findings:
        for flag in finding.flags:
            flagged[flag.id].add(finding.check)
    assert flagged == sick.expected
    assert set().union(*sick.expected.values()) == set(CHECKS) - {"speakers"}


def test_the_report_holds_verdicts_thresholds_and_every_flagged_item(sick, diagnosis: Diagnosis, report_folder: Path) -> None:
    report = json.loads((report_folder / "report.json").read_text())
    assert report["verdict"] == "bad"
    assert report["items"] == len(sick.expected)
    assert set(report["checks"]) == set(CHECKS)
    assert report["checks"]["leakage"]["verdict"] == "bad"
    assert report["checks"]["clipping"]["verdict"] == "look"
    assert all(check["threshold"] for check in report["checks"].values())
    assert all(check["remedy"] for check in report["checks"].values() if check["verdict"] == "bad")
    rows = [json.loads(line) for line in (report_folder / "items.jsonl").read_text().splitlines()]
    assert {row["id"]: set(row["reasons"]) for row in rows} == {name: checks for name, checks in sick.expected.items() if checks}
    assert "nothing above 4.0" in next(row for row in rows if row["id"] == "upsampled")["reasons"]["bandwidth"]
    assert "with another text" in next(row for row in rows if row["id"] == "copied_audio")["reasons"]["duplicate_audio"]
    text = (report_folder / "report.md").read_text()
    for name in ("overview.png", *[line.split("](")[1].rstrip(")") for line in text.splitlines() if line.startswith("![")]):
        assert (report_folder / name).read_bytes().startswith(b"\x89PNG")


def test_a_healthy_corpus_is_good(healthy: Path, tmp_path: Path) -> None:
    output = run(healthy, "--out", tmp_path / "out", "--no-pictures")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {name: check["verdict"] for name, check in report["checks"].items()} == dict.fromkeys(CHECKS, "good")
    assert report["flagged_items"] == 0
    assert "good: 36 items" in output


def test_a_filtered_copy_has_the_rest_and_counts_what_went(sick, diagnosis: Diagnosis, report_folder: Path, tmp_path: Path) -> None:
    output = run(sick.folder, "--out", report_folder, "--filter", tmp_path / "fine", "--no-pictures")
    assert f"{len(sick.expected)} items were measured by an earlier run" in output
    gone = {name for name, checks in sick.expected.items() if checks & set(REMOVED_BY_DEFAULT)}
    left = {cut.id: cut for split in ("train", "valid", "test") for cut in load_cuts(tmp_path / "fine", split)}
    assert set(left) == set(sick.expected) - gone
    assert all(left[name].load_audio().shape[1] == left[name].num_samples for name in ("clean00", "clean35", "quiet"))
    report = json.loads((tmp_path / "fine" / "report.json").read_text())
    assert report["removed"] == len(gone)
    assert report["removed_by_check"]["leakage"] == 2
    assert report["checks"]["leakage"]["verdict"] == "good"
    assert {json.loads(line)["id"] for line in (tmp_path / "fine" / "items.jsonl").read_text().splitlines()} == gone
    run(sick.folder, "--out", report_folder, "--filter", tmp_path / "fine", "--no-pictures", "--remove", "clipping", code=1)
    assert {cut.id for cut in load_cuts(tmp_path / "fine", "train")} >= gone - {"clipped", "clipped_then_lowered"}
    assert run(tmp_path / "fine", "--out", report_folder.parent / "fine", "--no-pictures", code=1)


def test_an_interrupted_run_goes_on_and_changed_audio_is_measured_again(
    healthy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, seen = measures.measure, []

    def interrupted(cut):
        if len(seen) == 10:
            raise KeyboardInterrupt
        seen.append(cut.id)
        return real(cut)

    monkeypatch.setattr(measures, "measure", interrupted)
    assert main(["data", "doctor", str(healthy), "--out", str(tmp_path / "out"), "--no-pictures"]) == 130
    assert "run the same command again" in capfd.readouterr().err
    monkeypatch.undo()
    assert "10 items were measured" in run(healthy, "--out", tmp_path / "out", "--no-pictures")
    assert "36 items were measured" in run(healthy, "--out", tmp_path / "out", "--no-pictures")
    again = load_cuts(healthy, "train")[0]
    path = Path(again.recording.sources[0].source)
    before = path.read_bytes()
    try:
        write_audio(path, 0.5 * again.load_audio()[0], 16000)
        assert "35 items were measured" in run(healthy, "--out", tmp_path / "out", "--no-pictures")
    finally:
        path.write_bytes(before)


@pytest.mark.slow
def test_several_processes_measure_the_same(sick, diagnosis: Diagnosis, tmp_path: Path) -> None:
    assert diagnose(sick.folder, tmp_path / "out", QualityLimits(), 2, untracked, pictures=False).items == diagnosis.items


def test_mistakes_are_one_line_and_harm_nothing(healthy: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    cases = [
        ([tmp_path / "gone"], "not a prepared corpus"),
        ([healthy, "--out", healthy], "is the corpus itself"),
        ([healthy, "--out", tmp_path / "mine"], "holds something else"),
        ([healthy, "--filter", tmp_path / "mine", "--out", tmp_path / "r"], "holds something else"),
        ([healthy, "--remove", "speakers", "--filter", tmp_path / "x"], "correct --remove"),
        ([healthy, "--limit", "loudness=3"], "unknown limit: got 'loudness=3'"),
        ([healthy, "--limit", "max_seconds=long"], "bad limit: got 'max_seconds=long'"),
        (
            [healthy, "--limit", "max_seconds=0.1", "--remove", "duration", "--filter", tmp_path / "x", "--out", tmp_path / "r"],
            "nothing would be left",
        ),
        ([healthy, "--jobs", "0", "--out", tmp_path / "other"], "--jobs: got 0"),
    ]
    for arguments, message in cases:
        result = CliRunner().invoke(app, ["doctor", "--no-pictures", *map(str, arguments)])
        assert isinstance(result.exception, UserError), (arguments, result.output)
        assert message in str(result.exception)
        assert "\n" not in str(result.exception)
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]
    assert not (tmp_path / "gone").exists()
    assert not (tmp_path / "x").exists()
