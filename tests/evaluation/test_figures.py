from __future__ import annotations

import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest

from kalle.errors import UserError
from kalle.evaluation.figures import save_speech_figure, speech_figure
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule
from kalle.synthesis.speech import Speech


@pytest.fixture(scope="module")
def spoken(kalle: Kalle) -> Speech:
    return kalle.synthesize("Hello.", seed=5, max_seconds=1.2, retries=0, stop=StopRule(0.01))


@pytest.fixture
def silent() -> Speech:
    nothing = np.zeros((0, 8), np.float32)
    return Speech(np.zeros(0, np.float32), 16000, "end", 1, nothing, nothing, np.zeros(0, np.float32), 10)


def pixels(figure) -> np.ndarray:
    import matplotlib.image

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    buffer.seek(0)
    return matplotlib.image.imread(buffer)


def test_every_panel_shows_its_values_on_one_time_axis(spoken: Speech) -> None:
    figure = speech_figure(spoken)
    wave, mel, spread, end = figure.axes
    assert pixels(figure).shape == (900, 1200, 4)
    assert {axis.get_xlim() for axis in figure.axes} == {(0.0, spoken.seconds)}
    np.testing.assert_array_equal(wave.lines[0].get_ydata(), spoken.audio)
    (image,) = mel.get_images()
    assert image.get_extent()[1] == pytest.approx(spoken.seconds, abs=0.03)
    np.testing.assert_allclose(spread.lines[0].get_ydata()[:-1], np.exp(spoken.log_std).mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(end.lines[0].get_ydata()[:-1], spoken.end_kl, rtol=1e-5)
    assert list(end.lines[1].get_ydata()) == [0.01, 0.01]
    assert end.get_ylim()[0] < 0.01
    title = figure.get_suptitle()
    for part in ("ended by: max_frames", "seed 5", f"confidence {spoken.confidence:.2f}", "1.20 s"):
        assert part in title


def test_nothing_spoken_and_a_rule_that_never_stops_are_drawn_too(spoken: Speech, silent: Speech) -> None:
    assert "nothing spoken" in speech_figure(silent, 400, 300).get_suptitle()
    assert pixels(speech_figure(silent, 400, 300)).shape[:2] == (300, 400)
    never = speech_figure(dataclasses.replace(spoken, stop=StopRule(0.0)))
    assert len(never.axes[3].lines) == 1
    pixels(never)


def test_the_frame_that_ended_the_speech_is_drawn_behind_the_last(spoken: Speech) -> None:
    ended = dataclasses.replace(spoken, stop_reason="end", end_frame_kl=0.004, end_frame_probability=0.75)
    axis = speech_figure(ended).axes[3]
    marker = axis.lines[2]
    assert (list(marker.get_xdata()), list(marker.get_ydata())) == ([spoken.seconds], [0.004])
    assert "probability 0.75" in marker.get_label()
    assert axis.get_ylim()[0] < 0.004
    assert len(speech_figure(spoken).axes[3].lines) == 2, "cut at the cap, no frame ended it"


@pytest.mark.parametrize("suffix", [".png", ".svg", ".PDF"])
def test_the_suffix_names_the_format(spoken: Speech, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"picture{suffix}"
    save_speech_figure(spoken, path)
    head = path.read_bytes()[:200]
    assert {".png": b"PNG", ".svg": b"<?xml", ".PDF": b"%PDF"}[suffix] in head
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_an_unknown_suffix_is_refused(spoken: Speech, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown image format: got '.*picture\.xyz', expected a name that ends in \.png"):
        save_speech_figure(spoken, tmp_path / "picture.xyz")
    assert not list(tmp_path.iterdir())


def test_without_matplotlib_it_says_what_to_install(spoken: Speech, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"needs matplotlib, which is not installed: run pip install .*\[serve\]"):
        save_speech_figure(spoken, tmp_path / "picture.png")
