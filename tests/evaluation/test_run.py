"""``evaluate(config)`` without the command line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from kalle.audio import rms_dbfs
from kalle.cli.evaluate import filled_config
from kalle.cli.hydra_entry import compose
from kalle.errors import UserError
from kalle.evaluation import EvaluateConfig, ReconstructionConfig, SpeakingConfig, TestListConfig, evaluate
from kalle.evaluation.metrics import Aggregate, DurationRatio, MelDistance, ScoreItem
from kalle.synthesis.options import GenerationOptions


def config(test_list: Path, out: Path, **options: object) -> EvaluateConfig:
    given = {
        "kind": "wavs",
        "wavs": test_list.parent,
        "metrics": [MelDistance(), DurationRatio()],
        "aligned": True,
        "resamples": 20,
    } | options
    return EvaluateConfig(testset=TestListConfig(test_list, limit=2), out=out, figure_items=0, **given)  # type: ignore[arg-type]


@pytest.fixture
def named_list(test_list: Path) -> Path:
    """The list under ids that are the names of its recordings."""
    rows = [json.loads(line) for line in test_list.read_text().splitlines()]
    test_list.write_text("".join(json.dumps(row | {"id": row["id"].removeprefix("a/")}) + "\n" for row in rows))
    return test_list


def test_a_configuration_becomes_a_result(named_list: Path, tmp_path: Path) -> None:
    result = evaluate(config(named_list, tmp_path / "out"))
    assert result is not None
    assert (result.value("wavs", "mel_l1"), result.value("wavs", "duration_ratio")) == (0, 1)
    assert json.loads((tmp_path / "out" / "results.json").read_text())["columns"]["mel_l1"] == ["mel_l1"]
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["config"]
    assert (stored["testset"], stored["limit"], stored["left_out"]) == (str(named_list), 2, {"beyond the limit": 1})


def test_ranks_share_the_work_and_the_last_reports(named_list: Path, tmp_path: Path) -> None:
    assert evaluate(config(named_list, tmp_path / "out", rank=1, world_size=2)) is None
    result = evaluate(config(named_list, tmp_path / "out", rank=0, world_size=2))
    assert result is not None
    assert [row["id"] for row in result.rows if row["system"] == "wavs"] == ["0", "1"]


def test_other_settings_score_anew_and_summary_settings_do_not(named_list: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    evaluate(config(named_list, tmp_path / "out"))
    evaluate(config(named_list, tmp_path / "out", resamples=30))
    assert "2 of 2 items were scored before" in caplog.text
    evaluate(config(named_list, tmp_path / "out", aligned=False))
    assert "starting anew" in caplog.text


class Loudness:
    """Decibels of the audio; counts what it heard."""

    name = "loudness"
    needs: frozenset[str] = frozenset()
    aggregates = (Aggregate("loudness", "loudness"),)

    def __init__(self, model: str = "rms") -> None:
        self.model, self.heard = model, 0

    def __call__(self, item: ScoreItem) -> dict[str, float]:
        self.heard += 1
        return {"loudness": rms_dbfs(item.audio)}

    def describe(self) -> dict[str, str]:
        return {"model": self.model}


def test_recordings_that_are_known_are_not_scored_again(named_list: Path, tmp_path: Path) -> None:
    first, again, other = Loudness(), Loudness(), Loudness("peak")
    before = evaluate(config(named_list, tmp_path / "first", metrics=[first]))
    known = evaluate(config(named_list, tmp_path / "again", metrics=[again], recordings=tmp_path / "first"))
    assert before is not None
    assert known is not None
    assert (first.heard, again.heard) == (4, 2), "the wavs alone"
    assert list(known.rows) == list(before.rows)
    assert known.summary == before.summary
    with pytest.raises(UserError, match=r"scored otherwise.*peak"):
        evaluate(config(named_list, tmp_path / "other", metrics=[other], recordings=tmp_path / "first"))
    older = json.loads((tmp_path / "first" / "results.json").read_text())
    (tmp_path / "older.json").write_text(json.dumps(older | {"columns": {}}))
    with pytest.raises(UserError, match=r"numbers that it lacks \(loudness\)"):
        evaluate(config(named_list, tmp_path / "lacking", metrics=[Loudness()], recordings=tmp_path / "older.json"))
    rows = [json.loads(line) for line in named_list.read_text().splitlines()]
    named_list.write_text("".join(json.dumps(row | {"text": f"{row['text']} more"} if row["id"] == "0" else row) + "\n" for row in rows))
    evaluate(config(named_list, tmp_path / "changed", metrics=[again := Loudness()], recordings=tmp_path / "first"))
    assert again.heard == 3, "another text is scored"


def test_metrics_learn_the_languages_of_the_list(named_list: Path, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    evaluate(config(named_list, tmp_path / "out", metrics=lambda languages: asked.append(languages) or [DurationRatio()]))
    assert asked == [["en"]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "codec"}, "kind: got 'codec', expected one of reconstruction, synthesis, wavs"),
        ({"wavs": None}, "kind=wavs: got no wavs"),
        ({"kind": "synthesis"}, "kind=synthesis: got no model"),
        ({"resume": "always"}, "resume: got 'always', expected one of auto, never"),
    ],
)
def test_a_bad_configuration_is_refused_when_it_is_made(test_list: Path, tmp_path: Path, options: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        config(test_list, tmp_path, **options)


def test_the_defaults_of_the_command_are_those_of_the_dataclass() -> None:
    composed = filled_config(compose("evaluate", ["kind=synthesis", "model=m", "out=o", "testset.path=t"]))
    plain = EvaluateConfig(
        kind="synthesis", model="m", out="o", testset=TestListConfig("t"), progress=True, workers=None, metrics=composed.metrics
    )
    assert composed == plain
    known = {field.name for field in (*dataclasses.fields(SpeakingConfig), *dataclasses.fields(GenerationOptions))}
    assert set(compose("evaluate", []).synthesis) <= known
    more = ["+synthesis.guidance=2", "synthesis.temperature=0.5"]
    given = filled_config(compose("evaluate", ["kind=synthesis", "model=m", "out=o", "testset.path=t", *more])).synthesis.options
    assert given == GenerationOptions(guidance=2, temperature=0.5)
    assert {field.name for field in dataclasses.fields(ReconstructionConfig)} == set(compose("evaluate", []).reconstruction)
