from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalle.cli.main import main
from kalle.errors import UserError
from kalle.evaluation.comparison import GateRules, Run, compare, gate, markdown, notes, paired_bootstrap, read_run, terminal

COLUMNS = {"wer_utt_mean": ["wer"], "wer_corpus": ["wer_errors", "wer_words"], "sim": ["sim"], "rate": ["rate"]}
LOWER = {"wer_utt_mean": True, "wer_corpus": True, "sim": False, "rate": None}
WER = {"model": "tiny.en", "weights_sha256": "0123", "normalisers": ["seed_tts"], "decoding": "protocol"}
Make = Callable[..., Path]


def scored(items: int = 60, seeds: Sequence[int] = (0,), draw: int = 0, worse: int = 0, similar: float = 0.8) -> list[dict[str, Any]]:
    """Rows of texts of 4 to 12 words with some errors, ``worse`` more in every second item, and similarities around ``similar``."""
    rows = []
    for index in range(items):
        words = 4 + index % 9
        for seed in seeds:
            # Of the item, the seed and the draw: runs differ in noise, and share what is hard.
            noise = np.random.default_rng([draw, index, seed])
            errors = int(index % 3 == 0) + int(noise.integers(2)) + worse * (index % 2)
            wer = {"wer": errors / words, "wer_errors": errors, "wer_words": words}
            sim = similar + 0.02 * float(noise.standard_normal())
            row = {"system": "synthesis", "id": f"item-{index}", "text": f"text {index}", "seed": seed, "sim": sim, "rate": 1.0}
            rows.append(row | wer)
    return rows


@pytest.fixture
def result(tmp_path: Path) -> Make:
    """Writes a run folder called ``name``."""

    def make(name: str, rows: list[dict[str, Any]], **changed: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        data = {"kind": "synthesis", "config": {"prompts": "none", "temperature": 0.6}, "metrics": {"wer": WER}, "rows": rows}
        summary = {"synthesis": {metric: {} for metric in COLUMNS}}
        (folder / "results.json").write_text(
            json.dumps(data | {"columns": COLUMNS, "lower_is_better": LOWER, "summary": summary} | changed), encoding="utf-8"
        )
        return folder

    return make


def test_a_run_is_equal_to_itself(result: Make) -> None:
    folder = result("a", scored(seeds=(0, 1)))
    (found,) = compare(folder, folder)
    assert [d.metric for d in found.differences] == list(COLUMNS)
    for difference in found.differences:
        assert (difference.difference, difference.interval, difference.p, difference.p_holm) == (0, (0, 0), 1, 1)
        assert (difference.verdict, difference.largest) == ("not shown", [])
    assert found.a != found.b
    assert all(check.passed for check in gate(found))


def test_a_constant_shift_is_found_whole(result: Make) -> None:
    rows = scored()
    (found,) = compare(result("a", rows), result("b", [row | {"sim": row["sim"] - 0.05} for row in rows]), resamples=2000)
    sim = found.difference("sim")
    assert sim.difference == pytest.approx(-0.05)
    assert sim.interval == pytest.approx((-0.05, -0.05))
    assert sim.p == pytest.approx(1 / 2001)
    assert (sim.verdict, found.difference("wer_corpus").verdict) == ("worse", "not shown")


def test_more_errors_are_found_and_named(result: Make) -> None:
    a, b = result("a", scored(draw=1)), result("b", scored(draw=2, worse=2))
    (found,) = compare(a, b, resamples=2000, largest=3)
    for name in ("wer_utt_mean", "wer_corpus"):
        difference = found.difference(name)
        assert difference.verdict == "worse"
        assert 0 < difference.interval[0] < difference.difference < difference.interval[1]
        sizes = [item.difference for item in difference.largest]
        assert len(sizes) == 3
        assert sizes == sorted(sizes, key=abs, reverse=True)
    rows = {row["id"]: row for row in scored(draw=2, worse=2)}
    first = found.difference("wer_corpus").largest[0]
    assert first.b == rows[first.id]["wer_errors"] / rows[first.id]["wer_words"]
    (reverse,) = compare(b, a, resamples=2000)
    assert reverse.difference("wer_corpus").verdict == "better"
    table = [line for line in terminal([found]).splitlines() if line.startswith(("metric", "wer", "sim"))]
    assert len(table) == 4
    assert max(map(len, table)) <= 80
    assert reverse.difference("wer_corpus").difference == -found.difference("wer_corpus").difference


def test_the_corpus_rate_is_errors_over_words(result: Make) -> None:
    rows_a, rows_b = scored(draw=1), scored(draw=2, worse=1)
    (found,) = compare(result("a", rows_a), result("b", rows_b), resamples=10)
    rates = [sum(row["wer_errors"] for row in rows) / sum(row["wer_words"] for row in rows) for rows in (rows_a, rows_b)]
    corpus = found.difference("wer_corpus")
    assert (corpus.a, corpus.b) == pytest.approx(rates)
    means = [np.mean([row["wer"] for row in rows]) for rows in (rows_a, rows_b)]
    assert (found.difference("wer_utt_mean").a, found.difference("wer_utt_mean").b) == pytest.approx(means)


def test_seeds_are_averaged_for_each_item(result: Make) -> None:
    two, one = scored(seeds=(0, 1)), scored(seeds=(0,))
    averaged = [row | {"sim": np.mean([other["sim"] for other in two if other["id"] == row["id"]])} for row in two if row["seed"] == 0]
    (found,) = compare(result("two", two), result("mean", averaged))
    assert found.difference("sim").difference == pytest.approx(0, abs=1e-12)
    assert (found.pairing.seeds_a, found.pairing.seeds_b, found.difference("sim").items) == (2, 1, 60)
    (other,) = compare(result("again", two), result("one", one))
    assert other.difference("sim").p < 1


def test_items_are_matched_by_id_and_the_rest_is_named(result: Make) -> None:
    rows = scored(items=10)
    broken = [row if row["id"] != "item-3" else {"system": "synthesis", "id": "item-3", "text": "text 3", "error": "no"} for row in rows]
    a, b = result("a", rows[:8]), result("b", list(reversed(broken[2:])))
    (found,) = compare(a, b)
    assert (found.pairing.only_a, found.pairing.only_b) == (["item-0", "item-1"], ["item-9", "item-8"])
    assert (found.pairing.failed_a, found.pairing.failed_b, found.pairing.matched) == ([], ["item-3"], 5)
    assert found.difference("sim").difference == 0
    said = markdown([found])
    for name in ("item-0", "item-9", "item-3"):
        assert name in said
    lost = gate(found)[0]
    assert not lost.passed
    assert "item-3" in lost.found


def test_a_metric_of_one_run_is_named(result: Make) -> None:
    rows = [{key: value for key, value in row.items() if key != "sim"} for row in scored()]
    (found,) = compare(result("a", scored()), result("b", rows))
    assert found.left_out == ["sim"]
    sim = next(check for check in gate(found) if "similarity" in check.rule)
    assert not sim.passed
    assert all(check.passed for check in gate(found, GateRules(sim_drop=None)))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"metrics": {"wer": WER | {"model": "base"}}}, "tiny.en, base"),
        ({"metrics": {"wer": WER | {"normalisers": ["whisper"]}}}, "normalisers"),
        ({"config": {"prompts": "list"}}, "prompts"),
        ({"kind": "reconstruction"}, "kind"),
        ({"rows": [row | {"text": "another"} for row in scored()]}, "the texts of 60 items"),
    ],
)
def test_what_is_not_comparable_is_refused_by_name(result: Make, changed: dict[str, Any], named: str) -> None:
    a, b = result("a", scored()), result("b", **{"rows": scored()} | changed)
    with pytest.raises(UserError, match=named):
        compare(a, b)
    (found,) = compare(a, b, force=True)
    assert named in markdown([found])
    assert main(["compare", str(a), str(b)]) == 2
    assert main(["compare", str(a), str(b), "--force"]) == 0


def test_temperature_voice_and_device_may_differ(result: Make) -> None:
    config = {"prompts": "none", "temperature": 1.0, "seeds": [0, 1], "voice_given": True}
    a, b = result("a", scored()), result("b", scored(), config=config, metrics={"wer": WER | {"device": "cuda"}}, kind="wavs")
    assert compare(a, b)[0].disagreements == []


def test_three_runs_are_compared_with_the_first(result: Make) -> None:
    folders = [result(name, scored(draw=index)) for index, name in enumerate("abc")]
    found = compare(*folders, resamples=50)
    assert [(each.a, each.b) for each in found] == [("a", "b"), ("a", "c")]


def test_corrected_p_values_are_those_of_holm(result: Make) -> None:
    a, b = result("a", scored(draw=1)), result("b", scored(draw=2, similar=0.805))
    (found,) = compare(a, b, resamples=500)
    order = sorted(found.differences, key=lambda d: d.p)
    expected = np.maximum.accumulate([min(1, d.p * (len(order) - rank)) for rank, d in enumerate(order)])
    assert [d.p_holm for d in order] == pytest.approx(list(expected))
    assert 0 < order[0].p < order[-1].p


@pytest.mark.parametrize("quotient", [False, True])
def test_an_interval_covers_the_truth_as_often_as_it_says(quotient: bool) -> None:
    """200 experiments of 80 items with a known difference: 95% intervals miss it in 1 to 10%, where 5% are expected."""
    generator, covered, experiments, truth = np.random.default_rng(7), 0, 200, 0.1
    for experiment in range(experiments):
        shared = generator.normal(size=80)
        words = generator.integers(4, 20, size=80).astype(float)
        a = shared + generator.normal(size=80) * 0.3
        b = shared + generator.normal(size=80) * 0.3 + truth
        tables = [np.stack([side * words, words], axis=1) if quotient else side[:, None] for side in (a, b)]
        interval, _ = paired_bootstrap(*tables, resamples=400, seed=experiment)
        covered += interval[0] <= truth <= interval[1]
    assert 0.90 <= covered / experiments <= 0.99


def test_p_values_of_equal_systems_are_spread_evenly() -> None:
    """Of 400 comparisons without a difference about 5% come out below 0.05, and half below 0.5."""
    generator = np.random.default_rng(3)
    values = generator.normal(size=(400, 2, 60, 1))
    p = np.array([paired_bootstrap(a, b, 300, seed)[1] for seed, (a, b) in enumerate(values)])
    assert 0.02 <= np.mean(p < 0.05) <= 0.09
    assert 0.42 <= np.mean(p < 0.5) <= 0.58


def test_one_item_has_no_interval(result: Make) -> None:
    (found,) = compare(result("a", scored(1)), result("b", scored(1, worse=1)))
    assert (found.difference("sim").interval, found.difference("sim").p) == (None, None)
    assert [check.rule for check in gate(found) if not check.passed] == ["WER is not shown to be worse"]


def test_the_gate(result: Make, tmp_path: Path) -> None:
    old, new = result("old", scored(draw=1)), result("new", scored(draw=2))
    bad, unlike = result("bad", scored(draw=2, worse=2)), result("unlike", scored(draw=2, similar=0.78))
    quick = ["--resamples", "300", "--gate"]
    assert main(["compare", str(old), str(new), *quick, "--out", str(tmp_path / "out")]) == 0
    stored = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert stored["gate"]["passed"] is True
    assert "Gate: passed" in (tmp_path / "out" / "compare.md").read_text()
    assert main(["compare", str(old), str(bad), *quick]) == 1
    assert main(["compare", str(old), str(unlike), *quick]) == 1
    assert main(["compare", str(old), str(unlike), *quick, "--sim-drop", "0.05"]) == 0
    assert main(["compare", str(old), str(unlike), *quick, "--no-sim"]) == 0
    assert main(["compare", str(old), str(new), *quick, "--veto", str(old), str(new)]) == 0
    assert main(["compare", str(old), str(new), *quick, "--veto", str(old), str(bad)]) == 1
    assert main(["compare", str(old), str(new), *quick, "--wer-margin", "0"]) == 1
    assert main(["compare", str(old), str(new), *quick, "--wer-margin", "0.2"]) == 0


def test_mistakes_end_with_2(result: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, c = (result(name, scored(3)) for name in "abc")
    (tmp_path / "old.json").write_text('{"rows": []}')
    (tmp_path / "bad.json").write_text("{")
    other = result("other", [row | {"id": "x" + row["id"]} for row in scored(3)])
    for words in (
        [a],
        [a, tmp_path / "nowhere"],
        [a, tmp_path / "old.json"],
        [a, tmp_path / "bad.json"],
        [a, other],
        [a, b, "--system", "recording"],
        [a, b, c, "--gate"],
        [a, b, "--veto", a, b],
    ):
        assert main(["compare", *map(str, words)]) == 2, words
    assert "Traceback" not in capsys.readouterr().err


def test_names_tell_runs_apart(result: Make, tmp_path: Path) -> None:
    a = result("a", scored(3))
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a").symlink_to(a)
    assert read_run(a).name == "a"
    (found,) = compare(a, Run("a", a, "synthesis", read_run(a).rows, read_run(a).data))
    assert found.a != found.b


def test_names_of_items_do_not_break_the_table(result: Make) -> None:
    rows = [row | {"id": f"{row['id']}|<b>\n"} for row in scored(20, draw=1)]
    (found,) = compare(result("a", rows), result("b", [row | {"wer_errors": 4} for row in rows]), resamples=10)
    table = [line for line in markdown([found]).splitlines() if line.startswith("| item-")]
    assert len(table) == 10
    assert all(line.count("|") - line.count("\\|") == 6 and "<b>" not in line for line in table)


def test_numbers_that_are_not_finite_are_left_out_and_named(result: Make) -> None:
    odd = [row | {"sim": (float("nan"), float("inf"), 10**400, "0.8", None)[index]} for index, row in enumerate(scored(5))]
    (found,) = compare(result("a", scored()), result("b", odd + scored()[5:]), resamples=200)
    sim = found.difference("sim")
    assert (sim.items, len(sim.only_a), sim.only_b) == (55, 5, [])
    assert np.isfinite([sim.a, sim.b, *sim.interval, sim.p]).all()
    assert any("5 items have sim in a alone: item-0" in note for note in notes(found))
    assert [check.passed for check in gate(found) if check.rule == "every item is scored"] == [False]
    assert all(check.passed for check in gate(found, GateRules(sim_drop=None)))


def test_seeds_that_failed_are_named_and_close_the_gate(result: Make) -> None:
    a = scored(seeds=(0, 1, 2))
    b = [
        {key: row[key] for key in ("system", "id", "text", "seed")} | {"error": "x"} if index in (1, 2) else row
        for index, row in enumerate(a)
    ]
    (found,) = compare(result("a", a), result("b", b), resamples=200)
    assert (found.pairing.failed_b, found.pairing.failed_seeds_b, found.pairing.failed_seeds_a) == ([], ["item-0"], [])
    assert found.pairing.matched == 60
    assert [check.rule for check in gate(found) if not check.passed] == ["every item is scored"]
    (back,) = compare(result("c", b), result("d", a), resamples=200)
    assert all(check.passed for check in gate(back)), "what failed before may be there now"


def test_items_that_a_run_holds_twice_are_refused(result: Make) -> None:
    rows = scored(seeds=(0, 1))
    with pytest.raises(UserError, match="item-3"):
        read_run(result("a", [*rows, rows[6]]))
    unseeded = [{key: value for key, value in row.items() if key != "seed"} for row in scored()]
    with pytest.raises(UserError, match="score it again"):
        read_run(result("b", [*unseeded, unseeded[0]]))


def test_lists_that_overlap_are_compared_where_they_do(result: Make) -> None:
    rows = scored(seeds=(0, 1))
    (found,) = compare(result("a", rows[:80]), result("b", [row for row in rows[40:] if row["seed"] == 0]), resamples=200)
    assert (found.pairing.matched, len(found.pairing.only_a), len(found.pairing.only_b)) == (20, 20, 20)
    assert (found.pairing.seeds_a, found.pairing.seeds_b) == (2, 1)
    assert {d.items for d in found.differences} == {20}
    assert not gate(found)[0].passed


def test_no_resample_with_words_is_no_interval() -> None:
    a = np.array([[0.0, 0.0], [1.0, 4.0]])
    found = {paired_bootstrap(a, a, resamples=1, seed=seed) for seed in range(20)}
    assert (None, None) in found
    assert ((0.0, 0.0), 1.0) in found


def test_what_one_recogniser_does_not_tell_is_a_difference(result: Make) -> None:
    told = {"wer": WER | {"behind the audio": "silence"}}
    a, b = result("a", scored()), result("b", scored(), metrics=told)
    with pytest.raises(UserError, match=r"behind the audio \(not told, silence\)"):
        compare(a, b)
    (found,) = compare(a, b, force=True)
    assert len(found.disagreements) == 1
