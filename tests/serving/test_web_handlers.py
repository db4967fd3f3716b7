"""The page's reactions without a page."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from page_calls import HI, Gate, changed, pcm, ran

from kalle.audio import read_audio, to_pcm16
from kalle.errors import UserError
from kalle.serving.engine import Engine, EngineLimits
from kalle.serving.handlers import MODELS_OWN, UNEXPECTED, Handlers, choice_from, error_html, request_from_fields
from kalle.serving.server import WebOptions, growing, is_loopback, launch, require_gradio
from kalle.serving.sessions import MOST_SESSIONS, Backend, JobResult, PageJob, PageRequest, Sessions
from kalle.serving.voices import RANDOM, RECORDING, STORED, VoiceChoice
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions


def test_speech_comes_piece_by_piece_and_then_as_a_file(handlers: Handlers, kalle_toy: Kalle) -> None:
    begun, views = ran(handlers, HI)
    assert begun.busy
    assert "Starting" in begun.message
    *working, done = views
    assert all(view.busy and view.audio is None for view in working)
    assert not done.busy
    assert done.token == begun.token
    assert not done.message
    pieces, _ = handlers.backend.sessions.of("a").pieces(0)
    assert len(pieces) > 2, "the audio came all at once"
    np.testing.assert_allclose(read_audio(done.audio) * 32768, pcm(handlers), atol=1)
    offline = kalle_toy.synthesize(HI.text, seed=3, max_seconds=0.5, retries=0)
    np.testing.assert_allclose(pcm(handlers), to_pcm16(offline.audio), atol=1e-4 * 32768)
    for word in ("0.50 s (50 frames)", "RTF", "max_frames: cut at the length cap", "the model&#x27;s own", "<dd>3</dd>", "Confidence"):
        assert word in done.facts, word
    assert 'alt="' in done.figure
    assert "data:image/png;base64," in done.figure


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (PageRequest("  \n"), "The text is empty"),
        (PageRequest("x" * 201), "got 201 characters, expected at most 200"),
        (PageRequest("Hi", VoiceChoice(RECORDING)), "No recording"),
        (PageRequest("Hi", VoiceChoice(RECORDING, recording="me.wav", transcript="  ")), "A recording without its transcript"),
        (PageRequest("Hi", VoiceChoice(RANDOM)), "No seed for the random voice"),
    ],
)
def test_what_can_be_seen_wrong_is_said_at_once(handlers: Handlers, given: PageRequest, message: str) -> None:
    begun, views = ran(handlers, given)
    assert message in begun.message
    assert 'role="alert"' in begun.message
    assert not begun.busy
    assert not begun.token
    assert views == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (changed(HI, max_seconds=1e-6), "raise the longest length"),
        (replace(HI, voice=VoiceChoice(STORED, "nobody")), "The voice is gone: got &#x27;nobody&#x27;"),
    ],
)
def test_what_the_model_refuses_is_said_in_the_page(handlers: Handlers, given: PageRequest, message: str) -> None:
    _, views = ran(handlers, given)
    assert message in views[-1].message
    assert views[-1].audio is None
    assert not views[-1].busy
    assert len(pcm(handlers)) == 0


def test_a_bug_is_logged_and_the_page_stays_usable(handlers: Handlers, monkeypatch, caplog) -> None:
    monkeypatch.setattr(handlers.backend.engine, "submit", lambda *_, **__: 1 / 0)
    _, views = ran(handlers, HI)
    assert UNEXPECTED in views[-1].message
    assert not views[-1].busy
    assert "ZeroDivisionError" in caplog.text


def test_a_failure_of_the_engine_is_said_in_the_page(handlers: Handlers, kalle_toy: Kalle, monkeypatch) -> None:
    gate = Gate(kalle_toy, monkeypatch)
    gate.before = lambda number: 1 / 0
    _, views = ran(handlers, HI)
    assert "The server failed" in views[-1].message
    gate.before = lambda number: None
    _, views = ran(handlers, HI)
    assert views[-1].audio is not None


def test_stopped_on_the_way_what_was_made_is_kept(handlers: Handlers, kalle_toy: Kalle, monkeypatch) -> None:
    gate = Gate(kalle_toy, monkeypatch)
    gate.hold(40)
    handlers.begin("a", changed(HI, max_seconds=5.0))
    said: list[str] = []
    stopper = threading.Thread(target=lambda: (gate.held.wait(600), said.append(handlers.stop("a").message), gate.go_on.set()))
    stopper.start()
    *_, done = handlers.run("a")
    stopper.join()
    assert "Stopping" in said[0]
    assert "interrupted: stopped by you" in done.facts
    heard = pcm(handlers)
    assert 0 < len(heard) <= 40 * 160
    np.testing.assert_allclose(read_audio(done.audio) * 32768, heard, atol=1)
    assert handlers.stop("a") is None
    assert handlers.stop("nobody") is None


LONG = PageRequest(
    "It was a bright cold day. The clocks were striking thirteen.\n\n* * *\n\nNobody said a word.",
    VoiceChoice(RANDOM, seed=2),
    GenerationOptions(seed=4, max_seconds=0.4, by_sentences=True, max_gain_db=0, retries=0),
)


def test_a_longer_text_is_spoken_by_sentences(handlers: Handlers, kalle_toy: Kalle) -> None:
    _, views = ran(handlers, LONG)
    done = views[-1]
    whole = kalle_toy.synthesize(LONG.text, kalle_toy.random_voice(2), options=LONG.options)
    np.testing.assert_allclose(pcm(handlers), to_pcm16(whole.audio), atol=1e-4 * 32768)
    np.testing.assert_allclose(read_audio(done.audio) * 32768, pcm(handlers), atol=1)
    pieces, _ = handlers.backend.sessions.of("a").pieces(0)
    assert len(pieces) > 6, "each sentence comes in pieces"
    for words in (
        "<li value='2'>The clocks were striking thirteen.",
        "not spoken: ",
        "3 of 3 sentences did not end",
        "<dd>4</dd>",
    ):
        assert words in done.facts, words
    assert done.facts.count("cut at 0.4 s") == 3, "each warning stands at its sentence only"
    assert "the one with the lowest confidence" in done.figure


def test_a_longer_text_stops_inside_a_sentence(handlers: Handlers, kalle_toy: Kalle, monkeypatch) -> None:
    handlers.backend.voices.voice(LONG.voice)  # takes steps of its own
    gate = Gate(kalle_toy, monkeypatch)
    gate.hold(40 + 20)  # in the second sentence; the first has 40 frames
    job = handlers.backend.begin("a", LONG)
    stopper = threading.Thread(target=lambda: (gate.held.wait(600), job.stop(), gate.go_on.set()))
    stopper.start()
    *_, result = handlers.backend.speak(job)
    stopper.join()
    assert isinstance(result, JobResult)
    assert result.stopped
    assert [part.speech.text for part in result.speech.parts] == ["It was a bright cold day.", "The clocks were striking thirteen."]
    assert result.speech.parts[1].speech.frames < 40
    assert result.speech.stop_reason == "interrupted"


def test_the_result_of_a_page_that_closed_early_is_not_kept(handlers: Handlers) -> None:
    handlers.begin("a", HI)
    job = handlers.backend.sessions.of("a")
    steps = handlers.backend.speak(job)
    next(steps)
    next(steps)
    handlers.leave("a")
    list(steps)
    assert list(handlers.backend.temporary.glob("*.wav")) == []


def test_sessions_are_bounded() -> None:
    jobs = Sessions()
    for number in range(MOST_SESSIONS):
        jobs.begin(str(number), PageJob(HI))
    with pytest.raises(UserError, match="too many requests"):
        jobs.begin("another", PageJob(HI))
    first = jobs.of("0")
    first.finish()
    assert not jobs.begin("another", PageJob(HI)).finished
    assert jobs.of("0") is None
    assert first.abandoned


@pytest.mark.parametrize("value", [5, 1.5, True, [], {"a": 1}, ["x"]])
def test_fields_of_a_foreign_shape_are_refused_in_one_line(handlers: Handlers, value: object) -> None:
    with pytest.raises(UserError, match="load the page again"):
        request_from_fields(value, VoiceChoice(), None, 1.0, None)
    with pytest.raises(UserError, match="load the page again"):
        request_from_fields("Hi", VoiceChoice(), value, 1.0, None)
    with pytest.raises(UserError, match="load the page again"):
        choice_from(value, None, None, None, None)
    for source in (STORED, RECORDING, RANDOM):
        with pytest.raises(UserError, match="load the page again"):
            choice_from(source, value, value, value, value)
    assert "load the page again" in handlers.keep(VoiceChoice(RANDOM, seed=1), value, None).message
    with pytest.raises(UserError, match="bad temperature"):
        request_from_fields("Hi", VoiceChoice(), None, [value], None)


def test_stopped_while_waiting_nothing_is_made(handlers: Handlers) -> None:
    handlers.begin("a", HI)
    stopped = handlers.stop("a")
    assert "Stopped before it began" in stopped.message
    assert not stopped.busy
    assert list(handlers.run("a")) == []
    assert len(pcm(handlers)) == 0


def test_a_job_is_done_once(handlers: Handlers) -> None:
    handlers.begin("a", HI)
    assert list(handlers.run("a"))
    assert list(handlers.run("a")) == []


def test_a_new_request_and_a_closed_page_end_the_former_one(handlers: Handlers) -> None:
    handlers.begin("a", changed(HI, max_seconds=5.0))
    first = handlers.backend.sessions.of("a")
    run = handlers.run("a")
    next(run)
    handlers.begin("a", HI)
    assert first.stopped
    list(run)
    second = handlers.backend.sessions.of("a")
    handlers.leave("a")
    assert second.stopped
    assert handlers.backend.sessions.of("a") is None
    assert list(handlers.run("a")) == []


def test_sessions_wait_for_each_other_and_know_it(kalle_toy: Kalle, tmp_path: Path, monkeypatch) -> None:
    gate = Gate(kalle_toy, monkeypatch)
    gate.hold(1)
    with Engine(kalle_toy, EngineLimits(rows=1)) as engine, Backend(kalle_toy, tmp_path, engine=engine) as backend:
        jobs = [backend.begin(name, HI) for name in "abc"]
        runs = [threading.Thread(target=lambda job=job: list(backend.speak(job))) for job in jobs]
        for job, run in zip(jobs, runs, strict=True):
            run.start()
            while job.spoken is None:
                time.sleep(0.01)
        assert gate.held.wait(600)
        assert [backend.ahead(job) for job in jobs] == [0, 0, 1]
        gate.go_on.set()
        for run in runs:
            run.join()
        assert [backend.ahead(job) for job in jobs] == [0, 0, 0]
        assert all(job.path is not None for job in jobs)
        assert backend.sessions.find(jobs[2].token) is jobs[2]
        assert backend.sessions.find("guess") is None


def test_listeners_get_the_audio_while_it_is_made() -> None:
    job = Sessions().begin("a", PageJob(HI))
    heard: list[bytes] = []

    async def listen() -> None:
        async for piece in growing(job):
            heard.append(piece)

    async def make() -> None:
        listening = asyncio.create_task(listen())
        job.add(np.full(3, 0.5))
        await asyncio.sleep(0.1)
        assert heard == [job.pieces(0)[0][0]]
        job.add(np.full(2, -1.0))
        job.finish()
        await listening

    asyncio.run(make())
    assert np.frombuffer(b"".join(heard), "<i2").tolist() == [16384] * 3 + [-32767] * 2


def test_temporary_files_go_with_the_backend(kalle_toy: Kalle, tmp_path: Path) -> None:
    with Backend(kalle_toy, tmp_path) as backend:
        handlers = Handlers(backend)
        _, views = ran(handlers, HI)
        path = views[-1].audio
        assert path.is_file()
    assert not path.exists()
    assert not path.parent.exists()


def test_fields_become_a_request() -> None:
    choice = choice_from(RANDOM, "x", "me.wav", "words", " 7 ")
    assert choice == VoiceChoice(RANDOM, seed=7)
    assert choice_from(STORED, MODELS_OWN, "me.wav", "words", "x") == VoiceChoice(STORED)
    assert choice_from(RECORDING, "x", "me.wav", "words", "7") == VoiceChoice(RECORDING, recording="me.wav", transcript="words")
    assert request_from_fields(None, choice, None, None, None) == PageRequest("", choice)
    assert request_from_fields("Hi", choice, "", 0.5, " ") == PageRequest("Hi", choice, GenerationOptions(temperature=0.5))
    assert request_from_fields("Hi", choice, "9223372036854775807", 0.5, "2.5") == PageRequest(
        "Hi", choice, GenerationOptions(seed=2**63 - 1, temperature=0.5, max_seconds=2.5)
    )


@pytest.mark.parametrize(
    ("seed", "seconds", "message"),
    [
        ("1.5", "", "bad seed: got '1.5', expected a whole number"),
        ("", "two", "bad longest length: got 'two', expected a number"),
        ("", "nan", "bad longest length: got 'nan'"),
        ("", "-inf", "bad longest length: got '-inf'"),
        ("", "0", "bad max_seconds: got 0.0"),
        ("-1", "", "bad seed: got -1"),
    ],
)
def test_what_is_no_number_is_refused(seed: str, seconds: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        request_from_fields("Hi", VoiceChoice(), seed, 1.0, seconds)
    with pytest.raises(UserError, match="bad seed of the voice: got 'five'"):
        choice_from(RANDOM, None, None, None, "five")


def test_messages_cannot_smuggle_markup_and_name_fields() -> None:
    shown = error_html("bad <script>: give --prompt-text")
    assert "Bad &lt;script&gt;: give the transcript" in shown


def test_only_this_machine_is_loopback() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "localhost", "::1", "0.0.0.0", "192.168.1.2", "name")] == [True] * 3 + [False] * 3


def test_missing_gradio_is_one_line(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install .*\[serve\]"):
        require_gradio()


def test_a_taken_port_is_one_line(backend: Backend) -> None:
    pytest.importorskip("gradio")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"^cannot serve on 127\.0\.0\.1:{port}: the port is taken; choose another --port \(0 takes"):
            launch(backend, WebOptions(port=port))
        # Gradio looks on 127.0.0.1, whatever the host is.
        with pytest.raises(UserError, match=rf"^cannot serve on 127\.0\.0\.2:{port}: the port is taken"):
            launch(backend, WebOptions("127.0.0.2", port))


def test_the_page_has_labels_and_no_public_interface(handlers: Handlers) -> None:
    pytest.importorskip("gradio")
    from kalle.serving.page import build, look

    page = build(handlers)
    config = page.get_config_file()
    fields = [
        part["props"] for part in config["components"] if part["type"] in ("textbox", "number", "slider", "radio", "dropdown", "audio")
    ]
    assert len(fields) > 10
    assert all(props["label"] for props in fields)
    # Gradio's shows 0 where nothing was typed, rounds, and refuses in an exception's words.
    assert not [part for part in config["components"] if part["type"] == "number"]
    assert not page.analytics_enabled
    assert {fn.api_visibility for fn in page.fns.values()} <= {"private"} | {"undocumented"}
    assert "http" not in str(look()["theme"]._stylesheets) + look()["css"]
