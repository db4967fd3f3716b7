from __future__ import annotations

import gc
import itertools

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.models.flowvae.streaming import DecoderState
from kalle.models.lm_state import LMState
from kalle.synthesis import StopRule
from kalle.synthesis.kalle import Kalle

NEVER = StopRule(threshold=0.0)
HOP = 1280


def offline(kalle: Kalle, seconds: float, seed: int = 3) -> np.ndarray:
    return kalle.synthesize("Hello there.", seed=seed, max_seconds=seconds, stop=NEVER, retries=0).audio


def joined(pieces: list[np.ndarray]) -> np.ndarray:
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.float32)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(1, 30), chunk=st.integers(1, 12), latency=st.sampled_from([None, 9, 12]), seed=st.integers(0, 2**31))
def test_a_stream_equals_the_whole(kalle_tiny: Kalle, frames: int, chunk: int, latency: int | None, seed: int) -> None:
    stream = kalle_tiny.stream("Hello there.", seed=seed, max_seconds=frames * 0.08, stop=NEVER, latency_frames=latency, chunk_frames=chunk)
    pieces = list(stream)
    wanted = offline(kalle_tiny, frames * 0.08, seed)
    assert all(piece.dtype == np.float32 and len(piece) for piece in pieces)
    assert len(joined(pieces)) == len(wanted) == frames * HOP
    np.testing.assert_allclose(joined(pieces), wanted, atol=1e-4)


def test_the_result_of_a_stream_is_that_of_the_whole(kalle_tiny: Kalle) -> None:
    stream = kalle_tiny.stream("Hello there.", seed=3, max_seconds=1.6, stop=NEVER)
    pieces = list(stream)
    speech, whole = stream.speech, kalle_tiny.synthesize("Hello there.", seed=3, max_seconds=1.6, stop=NEVER, retries=0)
    np.testing.assert_array_equal(speech.audio, joined(pieces))
    for name in ("latents", "log_std", "end_kl"):
        np.testing.assert_array_equal(getattr(speech, name), getattr(whole, name))
    assert (speech.stop_reason, speech.seed, speech.frames) == (whole.stop_reason, 3, 20)


def test_audio_comes_before_the_frames_are_all_there(kalle_tiny: Kalle) -> None:
    stream = kalle_tiny.stream("Hello there.", seed=3, max_seconds=4.0, stop=NEVER, chunk_frames=4)
    first = next(stream)
    assert len(first) == HOP
    assert len(next(stream)) == 4 * HOP
    assert stream.speech.frames == 5
    assert stream.speech.stop_reason == "interrupted"


def test_a_closed_stream_keeps_what_was_heard(kalle_tiny: Kalle) -> None:
    stream = kalle_tiny.stream("Hello there.", seed=3, max_seconds=4.0, stop=NEVER, chunk_frames=4)
    heard = list(itertools.islice(stream, 3))
    stream.close()
    assert list(stream) == []
    assert (stream.speech.stop_reason, stream.speech.frames) == ("interrupted", 9)
    np.testing.assert_array_equal(stream.speech.audio, joined(heard))
    np.testing.assert_allclose(joined(heard), offline(kalle_tiny, 4.0)[: 9 * HOP], atol=1e-4)


def test_two_streams_at_once_do_not_mix(kalle_tiny: Kalle) -> None:
    streams = [kalle_tiny.stream("Hello there.", seed=seed, max_seconds=1.6, stop=NEVER, chunk_frames=2) for seed in (3, 4)]
    pieces: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for pair in itertools.zip_longest(*streams):
        for kept, piece in zip(pieces, pair, strict=True):
            kept.append(piece)
    for seed, kept in zip((3, 4), pieces, strict=True):
        np.testing.assert_allclose(joined(kept), offline(kalle_tiny, 1.6, seed), atol=1e-4)


def test_a_stream_that_ends_at_once_is_empty(kalle_tiny: Kalle) -> None:
    stream = kalle_tiny.stream("Hello there.", seed=3, stop=StopRule(threshold=1e9, min_index=-1))
    assert list(stream) == []
    assert (stream.speech.stop_reason, stream.speech.frames, len(stream.speech.audio)) == ("end", 0, 0)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"chunk_frames": 0}, "bad chunk_frames"),
        ({"chunk_frames": 2.5}, "bad chunk_frames: got 2.5, expected an integer"),
        ({"latency_frames": -1}, "latency"),
        ({"latency_frames": 9.5}, "bad latency_frames: got 9.5"),
    ],
)
def test_bad_values_are_refused_before_anything_is_generated(kalle_tiny: Kalle, option: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kalle_tiny.stream("Hello there.", **option)


@pytest.mark.parametrize("raised", [KeyboardInterrupt, RuntimeError])
def test_an_exception_ends_the_stream_and_what_was_heard_stays(kalle_tiny: Kalle, monkeypatch, raised: type[BaseException]) -> None:
    stream = kalle_tiny.stream("Hello there.", seed=3, max_seconds=4.0, stop=NEVER, chunk_frames=4)
    heard = [next(stream), next(stream)]
    with monkeypatch.context() as broken:
        broken.setattr(type(kalle_tiny.lm), "step", lambda *_: (_ for _ in ()).throw(raised()))
        with pytest.raises(raised):
            next(stream)
    assert list(itertools.islice(stream, 1)) == []
    assert (stream.speech.stop_reason, stream.speech.frames) == ("interrupted", 5)
    np.testing.assert_array_equal(stream.speech.audio, joined(heard))
    stream.close()


def remembered() -> int:
    """Living states of a model or a decoder."""
    gc.collect()
    return sum(type(thing) in (LMState, DecoderState) for thing in gc.get_objects())


@pytest.mark.parametrize("pieces", [0, 2, None])
def test_an_ended_stream_that_is_kept_frees_what_the_model_remembers(kalle_tiny: Kalle, pieces: int | None) -> None:
    before = remembered()
    stream = kalle_tiny.stream("Hello there.", seed=3, max_seconds=2.0, stop=NEVER, chunk_frames=4)
    heard = list(itertools.islice(stream, pieces))
    assert pieces is None or remembered() > before
    if pieces is not None:
        stream.close()
    assert remembered() == before
    assert len(stream.speech.audio) == sum(map(len, heard))


def test_a_stream_closed_while_its_next_is_at_work_ends_after_it(kalle_tiny: Kalle, monkeypatch) -> None:
    before = remembered()
    stream = kalle_tiny.stream("Hello there.", seed=3, max_seconds=4.0, stop=NEVER, chunk_frames=4)
    step = type(kalle_tiny.lm).step

    def closing(*args):
        stream.close()
        return step(*args)

    monkeypatch.setattr(type(kalle_tiny.lm), "step", closing)
    assert [len(piece) for piece in stream] == [HOP]
    assert remembered() == before
    assert stream.speech.stop_reason == "interrupted"


LONG = "The first sentence is here. The second one follows it.\n\nHere is a new paragraph."
SENTENCES = {"seed": 3, "max_seconds": 1.6, "stop": NEVER, "by_sentences": True, "chunk_frames": 4}


@pytest.mark.parametrize("rolling", [False, True])
def test_a_long_text_is_streamed_as_it_is_synthesized_but_for_the_level(kalle_tiny: Kalle, rolling: bool) -> None:
    whole = kalle_tiny.synthesize(LONG, rolling=rolling, **SENTENCES)
    stream = kalle_tiny.stream(LONG, rolling=rolling, **SENTENCES)
    heard, speech = joined(list(stream)), stream.speech
    np.testing.assert_array_equal(speech.audio, heard)
    assert len(heard) == len(whole.audio)
    assert (speech.stop_reason, speech.seed, speech.text) == (whole.stop_reason, 3, LONG)
    assert [part.rolled for part in speech.parts] == [part.rolled for part in whole.parts]
    for got, wanted in zip(speech.parts, whole.parts, strict=True):
        np.testing.assert_array_equal(got.speech.latents, wanted.speech.latents)
        np.testing.assert_allclose(got.audio * 10 ** (wanted.gain_db / 20), wanted.audio, atol=2e-4)
        assert (got.start_sample, got.pause_samples) == (wanted.start_sample, wanted.pause_samples)


def test_a_long_stream_that_is_closed_keeps_what_was_heard(kalle_tiny: Kalle) -> None:
    stream = kalle_tiny.stream(LONG, **SENTENCES)
    assert len(stream.speech.audio) == 0
    heard = list(itertools.islice(stream, 9))
    stream.close()
    assert list(stream) == []
    assert stream.speech.stop_reason == "interrupted"
    assert 1 <= len(stream.speech.parts) <= 3
    np.testing.assert_array_equal(stream.speech.audio, joined(heard))


def test_one_sentence_is_the_same_at_once_and_by_sentences(kalle_tiny: Kalle) -> None:
    voice = kalle_tiny.random_voice(1)
    options = {"seed": 3, "max_seconds": 0.8, "stop": NEVER}
    once, alone = (kalle_tiny.synthesize("Hello there.", voice, by_sentences=choice, **options) for choice in (None, True))
    np.testing.assert_array_equal(once.latents, alone.latents)
