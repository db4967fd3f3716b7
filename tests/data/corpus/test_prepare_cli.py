from __future__ import annotations

import json
import re
import resource
from pathlib import Path

import corpus_layouts as layouts
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from kalle.cli.main import main
from kalle.cli.prepare import app
from kalle.data.corpus import prepare
from kalle.data.corpus.cuts import load_cuts
from kalle.errors import UserError


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture
def recordings(tmp_path: Path) -> Path:
    folder = tmp_path / "in"
    folder.mkdir()
    for i in range(6):
        noise = (0.1 * np.random.default_rng(i).standard_normal(16000)).clip(-0.9, 0.9)
        soundfile.write(folder / f"{i}.wav", noise, 16000)
        (folder / f"{i}.txt").write_text(f"prompt {i}")
    (folder / "list.jsonl").write_text("".join(json.dumps({"audio": f"{i}.wav", "text": f"prompt {i}"}) + "\n" for i in range(6)))
    (folder / "list.csv").write_text("".join(f"{i}.wav|prompt {i}\n" for i in range(6)))
    return folder


@pytest.mark.parametrize("kind", ["folder", "jsonl", "csv"])
def test_each_source_gives_the_same_cuts(recordings: Path, tmp_path: Path, kind: str) -> None:
    source = recordings if kind == "folder" else recordings / f"list.{kind}"
    common = [kind, source, "--out", tmp_path / "out", "--language", "en", "--speaker", "ann"]
    output = run(*common, "--test-share", 0.25, "--valid-share", 0.25)
    assert "6 of 6 items kept, 0.1 minutes" in output
    found = {split: [cut.supervisions[0].text for cut in load_cuts(tmp_path / "out", split)] for split in ("train", "valid", "test")}
    assert found == {"train": [f"prompt {i}" for i in (0, 2, 3, 4)], "valid": ["prompt 5"], "test": ["prompt 1"]}
    assert "no items in" not in output
    again = run(*common, "--test-share", 0.25, "--valid-share", 0.25)
    assert "unchanged" in again
    other = run(*common, "--test-share", 0, "--valid-share", 0)
    assert "unchanged" not in other
    assert len(load_cuts(tmp_path / "out", "train")) == 6


def test_a_name_may_look_like_markup(recordings: Path, tmp_path: Path) -> None:
    names = ["[/b]", "[red]", "[unk]", "a[", "]", "[/]"]
    rows = [{"audio": f"{i}.wav", "text": f"prompt {i}", "speaker": name, "language": name} for i, name in enumerate(names)]
    (recordings / "names.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    output = run("jsonl", recordings / "names.jsonl", "--out", tmp_path / "out")
    assert all(name in output for name in names)


def test_report_lists_rejected_items(recordings: Path, tmp_path: Path) -> None:
    (recordings / "5.wav").write_bytes(b"broken")
    (recordings / "4.txt").unlink()
    output = run("folder", recordings, "--out", tmp_path / "out")
    assert "4 of 6 items kept" in output
    assert "unreadable" in output
    assert "no text" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {row["id"]: row["reason"] for row in report["rejected_items"]} == {"4": "no text", "5": "unreadable"}


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        *[("ljspeech", "2 of 5"), ("libritts", "6 of 7"), ("librispeech", "7 of 9"), ("aishell3", "3 of 4"), ("vctk", "4 of 6")],
        *[("commonvoice", "8 of 10"), ("esd", "5 of 7"), ("emilia", "3 of 5"), ("kaldi", "3 of 8")],
    ],
)
def test_published_corpora_by_one_command_each(tmp_path: Path, name: str, kept: str) -> None:
    make = {"commonvoice": layouts.common_voice, "emilia": layouts.emilia_tar}.get(name) or getattr(layouts, name)
    source = make(tmp_path / "in")
    output = run(name, source, "--out", tmp_path / "out", "--valid-share", 0, "--test-share", 0, "--headers-only")
    assert f"{kept} items kept" in output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert sum(report["rejected_by_reason"].values()) == report["rejected"]
    cut = load_cuts(tmp_path / "out", "train")[0]
    assert cut.load_audio().shape == (1, cut.num_samples)
    assert "unchanged" in run(name, source, "--out", tmp_path / "out", "--valid-share", 0, "--test-share", 0, "--headers-only")


def test_a_part_that_a_corpus_holds_out_is_not_added_to(tmp_path: Path) -> None:
    run("aishell3", layouts.aishell3(tmp_path / "in"), "--out", tmp_path / "out", "--test-share", 0.9, "--valid-share", 0)
    assert [len(load_cuts(tmp_path / "out", split)) for split in ("train", "valid", "test")] == [2, 0, 1]
    assert "No such option: --speaker" in CliRunner().invoke(app, ["esd", "x", "--out", "y", "--speaker", "ann"]).output


def test_embedded_is_found_without_being_told(tmp_path: Path) -> None:
    output = run("embedded", "--out", tmp_path / "out")
    assert "551 of 569 items kept, 24.3 minutes" in output
    assert [len(load_cuts(tmp_path / "out", split)) for split in ("train", "valid", "test")] == [453, 26, 72]


def test_an_interrupt_says_how_to_go_on_and_the_next_run_does(
    recordings: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real, seen = prepare.check_item, []

    def interrupted(item, options, out):
        if len(seen) == 4:
            raise KeyboardInterrupt
        seen.append(item.id)
        return real(item, options, out)

    monkeypatch.setattr(prepare, "check_item", interrupted)
    capfd.readouterr()
    assert main(["prepare", "folder", str(recordings), "--out", str(tmp_path / "out")]) == 130
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: interrupted: .*run the same command again.*\n", err)
    monkeypatch.undo()
    output = run("folder", recordings, "--out", tmp_path / "out")
    assert "continued: 4 items" in output
    assert "6 of 6 items kept" in output


def test_a_full_disk_is_one_line(recordings: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))
    try:
        assert main(["prepare", "folder", str(recordings), "--out", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"error: cannot write '.*': File too large, .*make room on the disk.*\n", err)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["folder", "gone"], "folder not found: got 'gone'"),
        (["jsonl", "gone.jsonl"], "file not found"),
        (["embedded", "--corpus", "gone"], "with --corpus"),
        (["embedded", "--min-seconds", "5", "--max-seconds", "1"], "0 <= --min-seconds < --max-seconds"),
        (["vctk", "gone", "--mic", "3"], "got '3', expected mic1 or mic2"),
        (["hf", "/nowhere/at/all"], "no dataset in '/nowhere/at/all'"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path / "out")])
    assert isinstance(result.exception, UserError)
    assert message in str(result.exception)
    assert "\n" not in str(result.exception)
    assert not (tmp_path / "out").exists()
