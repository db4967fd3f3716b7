"""Many texts at once: each as alone, fairly, within bounds, and whatever happens to one does not touch the others."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from page_calls import Gate

from kalle.errors import UserError
from kalle.serving.engine import ClosedError, Engine, EngineError, EngineLimits, Job, OverdueError, QueueFullError
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions, SpeechRequest, StopRule

LONG = "It was a bright cold day. The clocks were striking thirteen. Nobody said a word."
SHORT = GenerationOptions(seed=3, max_seconds=0.5)


@pytest.fixture
def engine(kalle_toy: Kalle) -> Iterator[Engine]:
    with Engine(kalle_toy) as made:
        yield made


def heard(job: Job) -> np.ndarray:
    return np.concatenate([np.zeros(0, np.float32), *job.pieces()])


def test_together_each_is_as_alone(engine: Engine, kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(kalle_toy, monkeypatch)
    voice = kalle_toy.random_voice(7)
    ends = StopRule(threshold=50.0, min_index=20)  # ends "by itself", here after 21 frames
    requests = [
        SpeechRequest("Hi there.", seed=3, max_seconds=0.5),
        SpeechRequest("A second, longer one.", seed=4, max_seconds=1.1, stop=ends),
        SpeechRequest("In another voice.", voice, seed=5, max_seconds=0.8, temperature=0.7),
        SpeechRequest(LONG, voice, seed=6, max_seconds=0.4, by_sentences=True),
        SpeechRequest("Hi there.", seed=8, max_seconds=0.35),
    ]
    gate.hold(gate.steps + 1)  # until all are there
    jobs = [(request, streamed, engine.submit(request, streamed)) for request in requests for streamed in (False, True)]
    gate.go_on.set()
    for job in jobs:
        job[-1].result()
    state = engine.state
    assert gate.most_rows == len(jobs), "they were not batched"
    assert (state.waiting, state.rows) == (0, 0)
    for request, streamed, job in jobs:
        plain = {"retries": 0, "max_gain_db": 0.0} if streamed else {}
        alone = kalle_toy.speak(SpeechRequest(request.text, request.voice, request.options.changed(**plain)))
        pieces = list(job.pieces())
        assert (len(pieces) > 1) == streamed
        np.testing.assert_allclose(np.concatenate(pieces), alone.audio, atol=1e-4)
        np.testing.assert_array_equal(job.speech.audio, np.concatenate(pieces))
        np.testing.assert_allclose(job.speech.latents, alone.latents, atol=1e-4)
        assert (job.speech.stop_reason, job.speech.seed, job.seed) == (alone.stop_reason, alone.seed, alone.seed)
        assert [part.sentence for part in job.speech.parts] == [part.sentence for part in alone.parts]
        assert [each.seed for each in job.speech.attempts] == [each.seed for each in alone.attempts]


def test_a_request_without_a_seed_tells_the_one_it_drew(engine: Engine, kalle_toy: Kalle) -> None:
    first, second = (engine.submit(SpeechRequest("Hi there.", max_seconds=0.4)) for _ in range(2))
    assert first.seed != second.seed
    np.testing.assert_allclose(first.result().audio, kalle_toy.synthesize("Hi there.", seed=first.seed, max_seconds=0.4).audio, atol=1e-4)


def test_a_long_text_does_not_starve_short_ones(kalle_toy: Kalle) -> None:
    ended: list[str] = []
    with Engine(kalle_toy, EngineLimits(rows=1)) as engine:
        long = engine.submit(SpeechRequest(LONG, seed=1, max_seconds=0.5, by_sentences=True))
        shorts = [engine.submit(SpeechRequest("Hi.", options=SHORT)) for _ in range(2)]
        for name, job in (("long", long), ("short", shorts[0]), ("short", shorts[1])):
            job.listen(lambda name=name, job=job: ended.append(name) if job.finished else None)
        assert len(long.result().parts) == 3
    assert ended == ["short", "short", "long"]


def test_a_cancelled_request_frees_its_place_at_the_next_frame(kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(kalle_toy, monkeypatch)
    gate.hold(3)
    with Engine(kalle_toy, EngineLimits(rows=1)) as engine:
        first = engine.submit(SpeechRequest("Hi there.", seed=1, max_seconds=30.0), streamed=True)
        second = engine.submit(SpeechRequest("Hi there.", options=SHORT))
        third = engine.submit(SpeechRequest("Hi there.", options=SHORT))
        assert gate.held.wait(600)
        assert [engine.ahead(job) for job in (first, second, third)] == [0, 0, 1]
        first.cancel()
        third.cancel()
        gate.go_on.set()
        assert second.result().frames == 50
        assert gate.steps == 3 + 49, "the cancelled one went on"
        assert (first.finished, third.finished) == (True, True)
        assert first.speech.stop_reason == "interrupted"
        assert list(third.pieces()) == []
        assert engine.state.endings == {"cancelled": 2, "max_frames": 1}


def test_the_queue_is_bounded_and_says_when_to_come_back(kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(kalle_toy, monkeypatch)
    gate.hold(1)
    with Engine(kalle_toy, EngineLimits(rows=1, queue=2)) as engine:
        jobs = [engine.submit(SpeechRequest("Hi there.", options=SHORT))]
        assert gate.held.wait(600)
        jobs += [engine.submit(SpeechRequest("Hi there.", options=SHORT)) for _ in range(2)]
        with pytest.raises(QueueFullError) as full:
            engine.submit(SpeechRequest("Hi there.", options=SHORT))
        assert full.value.retry_after_s >= 1
        gate.go_on.set()
        assert [job.result().frames for job in jobs] == [50] * 3


def test_a_request_has_its_time(kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(kalle_toy, EngineLimits(seconds=0.3)) as engine:
        job = engine.submit(SpeechRequest("Hi there.", seed=1, max_seconds=60.0), streamed=True)
        with pytest.raises(OverdueError, match=r"took longer than 0\.3 s"):
            heard(job)
        assert engine.state.rows == 0


def test_a_failure_of_the_model_ends_its_requests_and_the_next_is_served(
    kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = Gate(kalle_toy, monkeypatch)

    def fail(number: int) -> None:
        if number == 20:
            raise RuntimeError("out of luck")

    gate.before = fail
    with Engine(kalle_toy, EngineLimits(rows=2)) as engine:
        jobs = [engine.submit(SpeechRequest("Hi there.", options=SHORT), streamed) for streamed in (False, True)]
        waiting = engine.submit(SpeechRequest("Hi there.", options=SHORT))
        for job in jobs:
            with pytest.raises(EngineError, match="RuntimeError"):
                heard(job)
        assert waiting.result().frames == 50
        assert engine.submit(SpeechRequest("Hi there.", options=SHORT)).result().frames == 50
        assert engine.alive
    assert "out of luck" in caplog.text


def test_an_error_of_one_request_does_not_touch_the_others(engine: Engine, kalle_toy: Kalle) -> None:
    hot = engine.submit(SpeechRequest("Hi there.", options=SHORT.changed(temperature=3.4e38)))
    fine = engine.submit(SpeechRequest("Hi there.", options=SHORT))
    with pytest.raises(UserError, match="lower the temperature"):
        hot.result()
    np.testing.assert_allclose(fine.result().audio, kalle_toy.synthesize("Hi there.", options=SHORT).audio, atol=1e-4)


def test_a_decoder_that_fails_ends_one_request(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    push, calls = type(engine._whole_decoder).push, []

    def failing(*given: Any) -> Any:
        calls.append(given)
        if len(calls) == 1:
            raise MemoryError
        return push(*given)

    monkeypatch.setattr(type(engine._whole_decoder), "push", failing)
    jobs = [engine.submit(SpeechRequest("Hi there.", options=SHORT)) for _ in range(2)]
    with pytest.raises(EngineError):
        jobs[0].result()
    assert jobs[1].result().frames == 50


def test_a_decoder_that_is_late_makes_the_same_pieces(engine: Engine, kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    push, held, go_on, sizes = type(engine._whole_decoder).push, threading.Event(), threading.Event(), list[int]()

    def late(decoder: Any, z: Any, state: Any) -> Any:
        sizes.append(z.shape[1])
        held.set()
        assert go_on.wait(600)
        return push(decoder, z, state)

    monkeypatch.setattr(type(engine._whole_decoder), "push", late)
    job = engine.submit(SpeechRequest("Hi there.", options=SHORT), streamed=True)
    assert held.wait(600)
    while engine.state.rows:  # the language model goes on to the end of the speech
        time.sleep(0.01)
    assert (engine.state.frames, job.finished, list(job.take())) == (50, False, [[], False])
    go_on.set()
    pieces = list(job.pieces())
    monkeypatch.undo()
    alone = list(kalle_toy.stream("Hi there.", options=SHORT))
    assert [len(piece) for piece in pieces] == [len(piece) for piece in alone]
    np.testing.assert_allclose(np.concatenate(pieces), np.concatenate(alone), atol=1e-4)
    assert sum(sizes) == 50


def test_a_stream_that_got_stuck_is_as_alone(engine: Engine, kalle_toy: Kalle) -> None:
    text = "It was a bright cold day in April, and the clocks were striking thirteen."
    stop = StopRule(threshold=1e9, min_index=499)
    alone = kalle_toy.stream(text, seed=3, stop=stop)
    audio = np.concatenate(list(alone))
    assert alone.speech.stop_reason == "repetition"
    assert alone.speech.stuck_seconds > 0
    jobs = [engine.submit(SpeechRequest(text, seed=3, stop=stop), streamed=True) for _ in range(4)]
    for job in jobs:
        got = heard(job)
        assert len(got) == len(audio)
        np.testing.assert_allclose(got, audio, atol=1e-4)
        assert job.speech.stuck_seconds == alone.speech.stuck_seconds


def test_audio_that_clients_leave_untaken_is_bounded(kalle_toy: Kalle) -> None:
    with Engine(kalle_toy, EngineLimits(unread_seconds=0.4)) as engine:
        job = engine.submit(SpeechRequest("Hi there.", options=SHORT), streamed=True)
        job.result()
        with pytest.raises(QueueFullError, match="wait for clients"):
            engine.submit(SpeechRequest("Hi there.", options=SHORT))
        assert len(heard(job)) == 8000
        assert engine.submit(SpeechRequest("Hi there.", options=SHORT)).result().frames == 50


@pytest.mark.parametrize("streamed", [False, True])
def test_what_cannot_be_spoken_is_refused_at_once(engine: Engine, streamed: bool) -> None:
    for request, message in (
        (SpeechRequest("  "), "text is empty"),
        (SpeechRequest("Hi.", max_seconds=1e-6), "max_seconds"),
        (SpeechRequest("Hi.", guidance=2.0), "guidance"),
    ):
        with pytest.raises(UserError, match=message):
            engine.submit(request, streamed)
    with pytest.raises(UserError, match="rows 0"):
        EngineLimits(rows=0)


def test_closing_lets_those_that_are_there_end(kalle_toy: Kalle) -> None:
    engine = Engine(kalle_toy)
    job = engine.submit(SpeechRequest("Hi there.", options=SHORT))
    engine.close(grace_s=900)
    assert job.result().frames == 50
    with pytest.raises(ClosedError):
        engine.submit(SpeechRequest("Hi there.", options=SHORT))
    engine = Engine(kalle_toy)
    job = engine.submit(SpeechRequest("Hi there.", seed=1, max_seconds=60.0), streamed=True)
    engine.close()
    with pytest.raises(ClosedError):
        heard(job)


def test_adapted_voices_are_spoken_beside_the_others(engine: Engine, kalle_toy: Kalle, monkeypatch: pytest.MonkeyPatch) -> None:
    from kalle.adaptation.adapt import AdaptOptions, adapt

    tone = 0.3 * np.sin(np.arange(8000) / 10).astype(np.float32)
    learnt = adapt(kalle_toy, tone, "four", options=AdaptOptions(steps=2, lr=2e-2)).voice
    plain = replace(learnt, adapter=None)
    gate = Gate(kalle_toy, monkeypatch)
    gate.hold(1)
    jobs = [(voice, engine.submit(SpeechRequest("Hi there.", voice, options=SHORT))) for voice in (learnt, plain, learnt)]
    gate.go_on.set()
    for voice, job in jobs:
        np.testing.assert_allclose(job.result().audio, kalle_toy.synthesize("Hi there.", voice, options=SHORT).audio, atol=1e-4)
    assert gate.most_rows == 2, "those of one adapter were not batched"
