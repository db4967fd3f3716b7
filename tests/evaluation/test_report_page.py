"""The page of a result and of two systems, and what a real Chromium makes of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kalle.audio import Audio, write_audio
from kalle.cli.main import main
from kalle.evaluation.comparison import compare, gate, read_run
from kalle.evaluation.intelligibility import RULES, judge
from kalle.evaluation.report_page import PageOptions, page_html, runs_of, write_page
from kalle.evaluation.word_errors import corpus_style

EVIL = '<script>document.title="x"</script><img src=x onerror=alert(1)> & "quoted"'


@pytest.fixture
def made(tmp_path: Path, speech: Callable[..., Audio]) -> Callable[..., Path]:
    """Writes a run folder with three spoken items, one that failed, and the recordings' scores; texts are hostile."""

    def make(name: str, heard: str = "one two", **more: Any) -> Path:
        rows = []
        for index in range(3):
            wav = f"wavs/{index} #1.wav"
            write_audio(tmp_path / name / wav, speech(0.6 + 0.2 * index, index), 16000)
            text = f"one two three {' '.join(['more'] * 10 * index)} {EVIL}"
            row = {"system": "synthesis", "id": f"<i>{index}</i>", "text": text, "audio_s": 1.0, "seed": 0, "stop_reason": "end"}
            rows.append(row | {"transcript": heard, "wer": 0.5 + 0.1 * index, "sim": 0.7 + 0.01 * index, "wav": wav})
            rows.append({"system": "recording", "id": f"<i>{index}</i>", "text": text, "audio_s": 1.0, "transcript": text, "wer": 0.0})
        rows.append({"system": "synthesis", "id": "gone", "text": "gone", "error": f"no wav {EVIL}"})
        judge(rows, corpus_style)
        columns = {"wer_utt_mean": ["wer"], "sim": ["sim"]} | {rule.name: [rule.numerator] for rule in RULES[:3]}
        estimate = {"value": 0.6, "interval": [0.5, 0.7], "count": 3}
        data = {
            "kind": "synthesis",
            "config": {"left_out": {"fewer than 4 words": 2}, "model": EVIL},
            "versions": {"python": "3"},
            "metrics": {"wer": {"model": "echo", "normalisers": ["kalle_authors"]}},
            "rows": rows,
            "columns": columns,
            "lower_is_better": {"wer_utt_mean": True, "sim": False},
            "summary": {"synthesis": {"wer_utt_mean": estimate, "sim": estimate}, "recording": {"wer_utt_mean": estimate}},
            "units": {"sim": EVIL},
            "notes": [EVIL],
        }
        (tmp_path / name / "results.json").write_text(json.dumps(data | more))
        return tmp_path / name

    return make


def page_of(folder: Path, options: PageOptions | None = None) -> str:
    return page_html(runs_of(json.loads((folder / "results.json").read_text()), folder), options=options, folder=folder)


def test_nothing_of_a_text_becomes_markup(made: Callable[..., Path]) -> None:
    html = page_of(made("a"))
    assert "&lt;script&gt;" in html
    assert "<script" not in html
    assert "<img src=x" not in html
    assert "<i>" not in html
    assert not re.search(r'(?:src|href)="(?!data:)', html), "the page holds everything itself"


def test_what_the_page_shows(made: Callable[..., Path]) -> None:
    html = page_of(made("a"))
    counts = re.sub(r"<[^>]*>", " ", html[html.index('<table id="counts">') :].split("</table>")[0]).split()
    assert counts[counts.index("synthesis") :][:4] == ["synthesis", "3", "1", "2"], "evaluated, failed, left out"
    assert html.count('src="data:audio/mpeg;base64,') == 3
    assert html.count('src="data:image/jpeg;base64,') == 3
    assert "<del>three</del>" in html
    for section in ('id="summary"', 'id="charts"', 'id="curve"', 'id="words"', 'id="items"', 'id="facts"'):
        assert section in html
    assert html.index("gone") < html.index("&lt;i&gt;2"), "a failure comes before errors"


def test_sounds_heard_for_sounds(made: Callable[..., Path]) -> None:
    pytest.importorskip("hibari")
    html = page_of(made("a", heard="one two three more"))
    title = html.index("Sounds heard for sounds (synthesis)")
    cells = re.sub(r"<[^>]*>", " ", html[title:].split("</table>")[0])
    assert re.search(r"nasal \(\d+\)", cells)
    assert "nothing" in cells


def test_emotions_that_are_meant_and_heard(tmp_path: Path) -> None:
    scores = {"happy": {"happy": 0.75, "sad": 0.25}, "sad": {"happy": 0.5, "sad": 0.5}}
    rows = [
        {"system": "s", "id": f"{name}_1", "text": "a", "audio_s": 1.0} | {f"emotion_{heard}": score for heard, score in own.items()}
        for name, own in scores.items()
    ]
    html = page_html(runs_of({"kind": "synthesis", "rows": rows, "columns": {}, "summary": {}, "metrics": {}}, tmp_path))
    tables = [re.sub(r"<[^>]*>", " ", part.split("</table>")[0]).split() for part in html.split('class="confusion"')[1:]]
    assert len(tables) == 2
    assert tables[0][-6:] == ["happy", "0.75", "0.5", "sad", "0.25", "0.5"]
    assert tables[1][-6:] == ["happy", "1", "1", "sad", "0", "0"]


def test_audio_ends_at_its_cap_and_may_be_linked(made: Callable[..., Path]) -> None:
    folder = made("a")
    capped = page_of(folder, PageOptions(audio_cap_mb=0.004))
    assert capped.count("data:audio") < 3
    assert f"{3 - capped.count('data:audio')} recordings came after" in capped
    linked = page_of(folder, PageOptions(link_audio=True))
    assert "data:audio" not in linked
    assert re.findall(r'audio [^>]*src="([^"]*)"', linked) == [f"wavs/{n}%20%231.wav" for n in (2, 1, 0)]
    assert page_of(folder, PageOptions(items=1)).count("<section") == 1


def test_two_systems_side_by_side(made: Callable[..., Path], tmp_path: Path) -> None:
    a, b = made("a"), made("b", heard="one two three")
    assert main(["compare", str(a), str(b), "--html", str(tmp_path / "ab.html"), "--gate"]) == 0
    html = (tmp_path / "ab.html").read_text(encoding="utf-8")
    assert html.count("data:audio") == 6
    assert 'class="comparison"' in html
    assert "Gate: passed" in html
    assert html.count("<section") == 4


def test_a_result_without_words_has_a_page(tmp_path: Path) -> None:
    rows = [{"system": "wavs", "id": str(n), "text": "a", "audio_s": 1.0, "mel_l1": n / 9} for n in range(5)]
    data = {"kind": "wavs", "rows": rows, "columns": {"mel_l1": ["mel_l1"]}, "summary": {"wavs": {}}, "metrics": {}}
    html = page_html(runs_of(data, tmp_path))
    assert "<svg" in html
    assert 'id="words"' not in html


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)])
@pytest.mark.parametrize("link_audio", [False, True])
def test_in_a_browser(made: Callable[..., Path], tmp_path: Path, browser: Any, width: int, height: int, link_audio: bool) -> None:
    a, b = read_run(made("a")), read_run(made("b", heard="one two three"))
    comparisons = compare(a, b)
    write_page(tmp_path / "page.html", [a, b], comparisons, gate(comparisons[0]), PageOptions(link_audio=link_audio))
    context = browser.new_context(viewport={"width": width, "height": height}, offline=True)
    page = context.new_page()
    asked: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto((tmp_path / "page.html").as_uri())
    assert page.title() == "a and b compared"
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    seconds = page.evaluate(
        """async () => { const found = [];
        for (const audio of document.querySelectorAll('audio')) {
            audio.preload = 'auto'; audio.load();
            await new Promise((done, failed) => { audio.onloadedmetadata = done; audio.onerror = () => failed(audio.error); });
            found.push(audio.duration);
        } return found; }"""
    )
    assert len(seconds) == 6
    assert np.allclose(sorted(seconds), sorted([0.6, 0.8, 1.0] * 2), atol=0.15)
    assert page.evaluate("[...document.querySelectorAll('img')].every(image => image.complete && image.naturalWidth > 20)")
    assert page.locator("svg").count() >= 2
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
    assert not problems
    context.close()
