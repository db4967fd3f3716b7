"""Listening tests: a blinded page in a real Chromium, and scores with known answers."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalle.audio import Audio, read_audio, rms_dbfs, write_audio
from kalle.cli.main import main
from kalle.errors import UserError
from kalle.evaluation.listening import COLUMNS, LEVEL_DBFS, SCALE, ListeningConfig, interval, make, normalised, resampled, score


@pytest.fixture
def systems(tmp_path: Path, speech: Callable[..., Audio]) -> dict[str, Path]:
    """Two systems of three items of 0.4 s at different levels, one item more in the second; an item lies in a folder."""
    for number, name in enumerate(("alpha", "omega")):
        for index, item in enumerate(["a", "b", "deep/c", "d"][: 3 + number]):
            write_audio(tmp_path / name / f"{item}.wav", speech(0.4, index) * (0.2 + number), 16000)
    return {"alpha": tmp_path / "alpha", "omega": tmp_path / "omega"}


def ratings(key: Mapping[str, Any], path: Path, given: Callable[[str, str, int], float], listeners: int = 4) -> list[Path]:
    """A CSV file a listener; ``given`` (system, item, listener) is the score."""
    paths = []
    for listener in range(listeners):
        paths.append(path / f"{listener}.csv")
        with paths[-1].open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for place, (stimulus, whose) in enumerate(key["stimuli"].items()):
                value = given(whose["system"], whose["item"], listener)
                writer.writerow([key["test"], "mos", f"listener {listener}", stimulus, f"{value:g}", place + 1, 1, "2026-01-01T00:00:00Z"])
    return paths


def test_the_page_is_blinded_and_complete(systems: dict[str, Path], tmp_path: Path) -> None:
    key = make(ListeningConfig(systems, tmp_path / "test", title="<b>Which?"))
    html = (tmp_path / "test" / "page" / "index.html").read_text()
    data = json.loads(re.search(r'<script id="data"[^>]*>(.*?)</script>', html, re.DOTALL)[1])
    assert key["items"] == ["a", "b", "deep/c"], "the item of one system alone is no comparison"
    assert {trial["stimulus"] for trial in data["trials"]} == set(key["stimuli"])
    assert len({trial["group"] for trial in data["trials"]}) == 3
    for secret in ("alpha", "omega", "deep"):
        assert secret not in html
        assert not any(secret in path.name for path in (tmp_path / "test" / "page").rglob("*"))
    assert "<b>Which" not in html
    for stimulus, whose in key["stimuli"].items():
        audio = read_audio(tmp_path / "test" / "page" / "audio" / f"{stimulus}.flac")
        source = read_audio(systems[whose["system"]] / f"{whose['item']}.wav")
        assert rms_dbfs(audio) == pytest.approx(LEVEL_DBFS, abs=0.05)
        assert np.corrcoef(audio, source)[0, 1] > 0.999


def test_the_same_seed_makes_the_same_test(systems: dict[str, Path], tmp_path: Path) -> None:
    one, same, other = (
        make(ListeningConfig(systems, tmp_path / name, items=2, seed=seed)) for name, seed in (("1", 0), ("2", 0), ("3", 5))
    )
    assert one == same
    assert not one["stimuli"].keys() & other["stimuli"].keys()
    assert len(one["items"]) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "smos"},
        {"references": "alpha"},
        {"items": 4},
        {"systems": {"x": "nowhere"}},
        {"kind": "cmos"},
    ],
)
def test_a_test_that_cannot_be_made(systems: dict[str, Path], tmp_path: Path, change: dict[str, Any]) -> None:
    values: dict[str, Any] = {"systems": systems, "out": tmp_path / "test"} | change
    if "references" in change:
        values["references"] = systems["alpha"]
    with pytest.raises(UserError):
        make(ListeningConfig(**values))
    assert not (tmp_path / "test").exists()


def test_a_test_is_never_overwritten(systems: dict[str, Path], tmp_path: Path) -> None:
    make(ListeningConfig(systems, tmp_path / "test"))
    with pytest.raises(UserError):
        make(ListeningConfig(systems, tmp_path / "test", seed=1))


def test_scores_are_those_that_were_given(systems: dict[str, Path], tmp_path: Path) -> None:
    key = make(ListeningConfig(systems, tmp_path / "test"))
    exact = score(key, ratings(key, tmp_path, lambda system, item, listener: 3.5 if system == "alpha" else 4.0))
    assert [(s.system, s.mean, s.interval, s.ratings) for s in exact.systems] == [
        ("alpha", 3.5, (3.5, 3.5), 12),
        ("omega", 4.0, (4.0, 4.0), 12),
    ]
    assert exact.differences[0]["difference"] == 0.5
    assert (exact.missing, exact.repeated, len(exact.listeners)) == (0, 0, 4)


def test_normalising_takes_away_who_is_strict(systems: dict[str, Path], tmp_path: Path) -> None:
    """Listeners who agree on the order and differ in level have wide intervals as rated and none once they are normalised."""
    key = make(ListeningConfig(systems, tmp_path / "test"))
    found = score(key, ratings(key, tmp_path, lambda system, item, listener: 1 + 0.5 * listener + (system == "omega")))
    alpha, omega = found.systems
    assert (alpha.mean, omega.mean) == (1.75, 2.75)
    assert alpha.interval[1] - alpha.interval[0] > 0.5
    assert alpha.normalised_interval == pytest.approx((alpha.normalised, alpha.normalised))
    assert omega.normalised > alpha.normalised
    assert found.differences[0]["interval"] == pytest.approx((1, 1)), "the same listeners judge both"


def test_normalised_ratings_have_the_mean_and_spread_of_all() -> None:
    table = np.random.default_rng(0).integers(2, 11, size=(3, 5, 7)) / 2
    table[0, 0, 0] = np.nan
    table[:, 4] = 3.0
    found = normalised(table)
    assert np.isnan(found[0, 0, 0])
    for listener in range(4):
        assert np.nanmean(found[:, listener]) == pytest.approx(np.nanmean(table))
        assert np.nanstd(found[:, listener]) == pytest.approx(np.nanstd(table))
    assert np.allclose(found[:, 4], np.nanmean(table)), "who gave one score alone"


def test_an_interval_covers_the_truth() -> None:
    """100 tests of 12 listeners and 12 items, both with levels of their own: 95% intervals hold the true mean in 87 to 100."""
    generator, covered = np.random.default_rng(5), 0
    for experiment in range(100):
        parts = [generator.normal(size=shape) * 0.5 for shape in ((1, 12, 1), (1, 1, 12), (1, 12, 12))]
        low, high = interval(resampled([3 + parts[0] + parts[1] + parts[2]], experiment, 300)[0][:, 0])
        covered += low <= 3 <= high
    assert 87 <= covered <= 100


def test_missing_and_repeated_ratings_are_counted(systems: dict[str, Path], tmp_path: Path) -> None:
    key = make(ListeningConfig(systems, tmp_path / "test"))
    paths = ratings(key, tmp_path, lambda system, item, listener: 3)
    lines = paths[0].read_text().splitlines()
    paths[0].write_text("\n".join(lines[:-1]) + "\n")
    later = tmp_path / "later.csv"
    later.write_text("\n".join([lines[0], lines[1].replace(",3,", ",4.5,").replace("2026-01-01", "2026-02-01")]) + "\n")
    found = score(key, [later, *paths])
    assert (found.missing, found.repeated) == (1, 1)
    assert sum(s.mean * s.ratings for s in found.systems) == pytest.approx(23 * 3 + 1.5)


def test_what_does_not_belong_is_refused(systems: dict[str, Path], tmp_path: Path) -> None:
    key = make(ListeningConfig(systems, tmp_path / "test"))
    (path,) = ratings(key, tmp_path, lambda system, item, listener: 3, listeners=1)
    text = path.read_text()
    for broken in (
        text.replace(key["test"], "another"),
        text.replace(next(iter(key["stimuli"])), "nothing"),
        text.replace(",3,", ",3.2,"),
        text.replace(",3,", ",,"),
        text.replace("stimulus", "name"),
        "",
    ):
        path.write_text(broken)
        with pytest.raises(UserError):
            score(key, [path])
    assert main(["listening", "score", str(tmp_path / "nowhere.json"), str(path)]) == 2


def test_the_command(systems: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    named = [f"{name}={folder}" for name, folder in systems.items()]
    out = tmp_path / "test"
    assert main(["listening", "make", *named, "--out", str(out), "--kind", "smos", "--references", str(systems["alpha"])]) == 0
    key = json.loads((out / "key.json").read_text())
    files = ratings(key, tmp_path, lambda system, item, listener: SCALE[listener])
    assert main(["listening", "score", str(out / "key.json"), *map(str, files), "--out", str(tmp_path / "scores")]) == 0
    assert "SMOS" in capsys.readouterr().out
    stored = json.loads((tmp_path / "scores" / "listening.json").read_text())
    assert [s["mean"] for s in stored["systems"]] == [1.75, 1.75]
    assert main(["listening", "make", "a", "--out", str(out)]) == 2


def hear(page: Any) -> None:
    """Play the sample to its end."""
    page.evaluate("document.querySelector('#sample').play()")
    page.wait_for_selector("#scores:not([disabled])")  # the page's policy forbids the evaluation of strings, and so wait_for_function


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
def test_in_a_browser(systems: dict[str, Path], tmp_path: Path, browser: Any, width: int, height: int) -> None:
    config = ListeningConfig(systems, tmp_path / "test", "smos", references=systems["alpha"])
    key = make(config)
    address = (tmp_path / "test" / "page" / "index.html").as_uri()
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True, accept_downloads=True)
    context.set_default_timeout(120_000)
    page = context.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(address)
    page.fill("#listener", 'Ann, "A"')
    page.click("text=Begin")
    assert page.is_disabled("#next")
    assert page.is_disabled("input[value='3']")
    orders = []
    for place in range(3):
        orders.append(page.evaluate("order.map(trial => trial.group)"))
        hear(page)
        page.check(f"input[value='{SCALE[place + 2]:g}']")
        page.click("#next")
    page.reload()
    assert page.input_value("#listener") == 'Ann, "A"'
    page.click("text=Begin")
    assert page.inner_text("#place") == "Sample 4 of 6"
    assert all(one != other for one, other in zip(orders[0], orders[0][1:], strict=False)), "one item twice in a row"
    page.click("#back")
    assert page.is_checked("input[value='3']")
    page.check("input[value='5']")
    page.click("#next")
    for _ in range(3):
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        hear(page)
        page.check("input[value='1.5']")
        page.click("#next")
    with page.expect_download() as saved:
        page.click("#save")
    saved.value.save_as(tmp_path / "ann.csv")
    with (tmp_path / "ann.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["score"] for row in rows] == ["2", "2.5", "5", "1.5", "1.5", "1.5"]
    assert {row["stimulus"] for row in rows} == set(key["stimuli"])
    found = score(key, [tmp_path / "ann.csv"])
    assert found.listeners == ['Ann, "A"']
    assert sum(s.mean * s.ratings for s in found.systems) == pytest.approx(14)
    other = context.new_page()
    other.goto(address)
    other.fill("#listener", "Bob")
    other.click("text=Begin")
    assert other.inner_text("#place") == "Sample 1 of 6", "every listener has ratings of their own"
    assert other.evaluate("order.map(trial => trial.stimulus)") != page.evaluate("order.map(trial => trial.stimulus)")
    assert not problems
    context.close()
