"""Several texts on the page, without a page."""

from __future__ import annotations

import asyncio
import csv
import io
import threading
import zipfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from page_calls import HI, Gate

from kalle.audio import read_audio
from kalle.serving import several
from kalle.serving.engine import QueueFullError
from kalle.serving.handlers import Handlers, SeveralView
from kalle.serving.server import text_route
from kalle.serving.several import MOST_TEXTS, SeveralJob
from kalle.serving.voices import RANDOM, RECORDING, STORED, VoiceChoice
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions

OWN = VoiceChoice()
BRIEF = GenerationOptions(seed=3, max_seconds=0.3, retries=0)
LINES = "Hi there.\n\n  One, two. \nThree."
TEXTS = ["Hi there.", "One, two.", "Three."]


def spoken(handlers: Handlers, lines: object = LINES, voice: VoiceChoice = OWN) -> tuple[SeveralView, list[SeveralView], SeveralJob]:
    begun = handlers.begin_several("a", lines, voice, BRIEF)
    views = list(handlers.run_several("a"))
    job = handlers.backend.sessions.of("a")
    assert isinstance(job, SeveralJob)
    return begun, views, job


def test_only_line_feeds_part_texts(handlers: Handlers) -> None:
    _, _, job = spoken(handlers, "One\u2028two\x85three.\r\nFour.")
    assert list(job.texts) == ["One\u2028two\x85three.", "Four."]


def test_every_line_is_spoken_as_it_would_be_alone(handlers: Handlers, kalle_toy: Kalle) -> None:
    begun, views, job = spoken(handlers)
    assert begun.busy
    assert "Starting" in begun.message
    *working, done = views
    assert [f"{number} of 3 spoken" in view.message for number, view in enumerate(working, 1)] == [True] * 3
    assert (done.busy, done.message) == (False, "")
    with zipfile.ZipFile(done.archive) as archive:
        assert archive.namelist() == ["001.wav", "002.wav", "003.wav", "list.csv"]
        rows = list(csv.DictReader(io.StringIO(archive.read("list.csv").decode())))
    assert [(row["file"], row["text"], row["seed"], row["ended by"]) for row in rows] == [
        (f"00{number}.wav", text, "3", "max_frames") for number, text in enumerate(TEXTS, 1)
    ]
    for each, text in zip(job.spoken_texts, TEXTS, strict=True):
        alone = kalle_toy.synthesize(text, options=BRIEF)
        np.testing.assert_allclose(read_audio(each.path), alone.audio, atol=1e-3)
        assert f"<li value='{each.number}'>{text}" in done.table
        assert f'src="kalle/text/{job.token}/{each.number}"' in done.table


def test_markup_in_a_text_is_shown_as_typed(handlers: Handlers) -> None:
    _, views, _ = spoken(handlers, "<img src=x onerror=alert(1)>")
    assert "<img" not in views[-1].table
    assert "&lt;img" in views[-1].table


@pytest.mark.parametrize(
    ("lines", "voice", "message"),
    [
        (" \n\n", OWN, "Only empty lines"),
        (None, OWN, "Only empty lines"),
        (["Hi"], OWN, "Got a list, expected text"),
        ("Hi\n" * (MOST_TEXTS + 1), OWN, f"Got {MOST_TEXTS + 1} lines, expected at most {MOST_TEXTS}"),
        ("Hi\n" + "x" * 201, OWN, "Text 2: the text is too long"),
        ("Hi", VoiceChoice(RECORDING), "No recording"),
        ("Hi", VoiceChoice(RANDOM), "No seed for the random voice"),
    ],
)
def test_what_can_be_seen_wrong_is_said_at_once(handlers: Handlers, lines: object, voice: VoiceChoice, message: str) -> None:
    view = handlers.begin_several("a", lines, voice, BRIEF)
    assert message.lower() in view.message.lower()
    assert 'role="alert"' in view.message
    assert not view.busy
    assert list(handlers.run_several("a")) == []


def test_a_voice_that_is_gone_is_said(handlers: Handlers) -> None:
    handlers.begin_several("a", LINES, VoiceChoice(STORED, "nobody"), BRIEF)
    (view,) = handlers.run_several("a")
    assert "The voice is gone" in view.message
    assert view.archive is None


def test_one_bad_text_stops_no_other(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    submit = handlers.backend.engine.submit
    monkeypatch.setattr(handlers.backend.engine, "submit", lambda request: submit(changed(request) if "One" in request.text else request))

    def changed(request):
        return replace(request, options=request.options.changed(max_seconds=1e-6))

    _, views, job = spoken(handlers)
    assert [bool(each.error) for each in job.spoken_texts] == [False, True, False]
    assert "kalle-warning" in views[-1].table
    with zipfile.ZipFile(views[-1].archive) as archive:
        assert archive.namelist() == ["001.wav", "003.wav", "list.csv"]


def test_a_full_queue_is_waited_for(handlers: Handlers, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, refused = handlers.backend.engine.submit, iter([True, True, False, True])

    def sometimes(request):
        if next(refused, False):
            raise QueueFullError("64 are waiting", 1)
        return submit(request)

    monkeypatch.setattr(handlers.backend.engine, "submit", sometimes)
    monkeypatch.setattr(several, "_RETRY_SECONDS", 0.01)
    _, _, job = spoken(handlers)
    assert [each.text for each in job.spoken_texts] == TEXTS
    assert all(each.path for each in job.spoken_texts)


def test_stopped_what_was_spoken_stays(handlers: Handlers, kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(several, "AT_ONCE", 1)
    gate = Gate(kalle_toy, monkeypatch)
    gate.hold(30 + 10)  # in the second text
    handlers.begin_several("a", LINES, OWN, BRIEF)
    job = handlers.backend.sessions.of("a")
    stopper = threading.Thread(target=lambda: (gate.held.wait(600), handlers.stop("a"), gate.go_on.set()))
    stopper.start()
    *_, done = handlers.run_several("a")
    stopper.join()
    assert "Stopped: 1 of 3 spoken" in done.message
    assert [each.text for each in job.spoken_texts] == TEXTS[:1]
    with zipfile.ZipFile(done.archive) as archive:
        assert archive.namelist() == ["001.wav", "list.csv"]


@pytest.mark.parametrize("end", [lambda handlers: handlers.leave("a"), lambda handlers: handlers.begin_several("a", "Hi.", OWN, BRIEF)])
def test_files_go_with_the_page_or_the_next_request(handlers: Handlers, end: Callable[[Handlers], object]) -> None:
    _, _, job = spoken(handlers)
    assert job.folder.is_dir()
    end(handlers)
    assert not job.folder.exists()


def test_a_recording_is_found_by_its_token_alone(handlers: Handlers) -> None:
    _, _, job = spoken(handlers)
    route = text_route(handlers.backend.sessions)

    class Asked:
        def __init__(self, token: str, number: int) -> None:
            self.path_params = {"token": token, "number": number}

    assert asyncio.run(route(Asked(job.token, 2))).path == job.spoken_texts[1].path
    for token, number in (("guess", 1), (job.token, 4), (job.token, 0)):
        assert asyncio.run(route(Asked(token, number))).status_code == 404


def test_stopped_before_it_began_the_page_is_free_again(handlers: Handlers) -> None:
    handlers.begin_several("a", LINES, OWN, BRIEF)
    stopped = handlers.stop("a")
    assert (stopped.busy, stopped.token) == (False, "")
    (view,) = handlers.run_several("a")
    assert (view.busy, view.table, view.archive) == (False, "", None)
    assert "Stopped" in view.message


@pytest.mark.parametrize("leave", [False, True])
def test_another_request_or_a_closed_page_ends_it(
    handlers: Handlers, kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, leave: bool
) -> None:
    monkeypatch.setattr(several, "AT_ONCE", 1)
    gate = Gate(kalle_toy, monkeypatch)
    gate.hold(30 + 10)  # in the second text
    handlers.begin_several("a", LINES, OWN, BRIEF)
    job = handlers.backend.sessions.of("a")

    def end() -> None:
        gate.held.wait(600)
        handlers.leave("a") if leave else handlers.begin("a", HI)
        gate.go_on.set()

    ending = threading.Thread(target=end)
    ending.start()
    *_, last = handlers.run_several("a")
    ending.join()
    assert last.replaced
    assert (last.table, last.archive) == ("", None)
    assert not job.folder.exists()
    assert not caplog.records, "it was taken for a mistake of ours"


def test_what_is_done_is_let_go(handlers: Handlers) -> None:
    _, _, job = spoken(handlers)
    assert job.at_work == [], "every result stays in memory"
