from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from speech_requests import request_of
from torch import Tensor

from kalle.gaussian import DiagGaussian
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.synthesis.generate import Frame, WatchConfig, Watcher
from kalle.synthesis.options import StopRule
from kalle.synthesis.speech import speak, watcher_of
from kalle.synthesis.stream import RequestStream

DIM, RATE_HZ, HOP = 16, 12.5, 80


def speaking(frames: int, seed: int) -> Tensor:
    """Means (T, D) that move by several standard deviations a frame, as those of speech do."""
    return 2.5 * torch.randn(frames, DIM, generator=torch.Generator().manual_seed(seed))


def loud(latents: Tensor) -> np.ndarray:
    """A decoder that always makes noise."""
    noise = np.random.default_rng(0).standard_normal((len(latents), HOP)).astype(np.float32)
    return (noise * np.float32(0.1)).reshape(-1)


def level_decoder(levels_db: Sequence[float]) -> Callable[[Tensor], np.ndarray]:
    """A decoder whose frame t sounds at levels_db[t]: the last dimension of a latent holds t."""

    def decode(latents: Tensor) -> np.ndarray:
        gains = np.array([10 ** (levels_db[round(float(row[-1]))] / 20) for row in latents])
        return np.repeat(gains, HOP).astype(np.float32)

    return decode


def watch(watcher: Watcher, means: Tensor, spread: float = 0.6, seed: int = 0) -> tuple[str | None, int]:
    """The verdict and the number of frames that were seen. The last dimension of z is the frame's index."""
    generator = torch.Generator().manual_seed(seed)
    for index, mean in enumerate(means):
        distribution = DiagGaussian(mean, torch.full_like(mean, float(np.log(spread))))
        z = distribution.sample(generator=generator)
        z[-1] = index
        verdict = watcher.see(Frame(z, distribution, 9.0), index)
        if verdict is not None:
            return verdict, index + 1
    return None, len(means)


@pytest.mark.parametrize("period", [1, 2, 5, 13, 25])
@pytest.mark.parametrize("jitter", [0.0, 0.3])
def test_a_loop_is_caught_and_its_first_round_is_kept(period: int, jitter: float) -> None:
    spoken, loop = speaking(30, 0), speaking(period, 1)
    means = torch.cat([spoken, *[loop] * (200 // period)])
    means += jitter * torch.randn(means.shape, generator=torch.Generator().manual_seed(2))
    watcher = Watcher(loud, RATE_HZ)
    verdict, seen = watch(watcher, means)
    assert verdict == "repetition"
    assert watcher.kept_frames == 30 + period
    assert seen <= 30 + period + max(38, 3 * period) + 6


@pytest.mark.parametrize("period", [1, 13, 25])
def test_a_loop_from_the_first_frame_is_judged_by_whole_rounds(period: int) -> None:
    watcher = Watcher(loud, RATE_HZ)
    verdict, seen = watch(watcher, torch.cat([speaking(period, 1)] * (200 // period)))
    assert (verdict, watcher.kept_frames) == ("repetition", period)
    assert seen == period + max(38, 3 * period)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), period=st.integers(1, 25), rounds=st.integers(1, 40))
def test_speech_that_repeats_itself_for_a_while_goes_on(seed: int, period: int, rounds: int) -> None:
    loop = speaking(period, seed + 1)
    repeats = min(rounds, (max(38, 3 * period) - 2) // period)
    means = torch.cat([speaking(40, seed), loop, *[loop] * repeats, speaking(60, seed + 2)])
    assert watch(Watcher(loud, RATE_HZ), means) == (None, len(means))


@pytest.mark.parametrize("noise_db", [-90.0, -65.0, -52.0])
def test_endless_silence_is_caught_and_a_pause_is_kept(noise_db: float) -> None:
    means = torch.cat([speaking(40, 0), speaking(1, 1).expand(200, DIM)])
    watcher = Watcher(level_decoder([-15.0] * 40 + [noise_db] * 200), RATE_HZ)
    verdict, seen = watch(watcher, means)
    assert verdict == "silence"
    assert watcher.kept_frames == 43, "three frames of silence stay"
    assert seen <= 40 + 39


def test_silence_from_the_start_keeps_nothing() -> None:
    watcher = Watcher(level_decoder([-90.0] * 200), RATE_HZ)
    assert watch(watcher, speaking(1, 1).expand(200, DIM))[0] == "silence"
    assert watcher.kept_frames == 0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**31), pause=st.integers(0, 24))
def test_pauses_of_less_than_two_seconds_are_speech(seed: int, pause: int) -> None:
    means = torch.cat([speaking(40, seed), speaking(1, seed + 1).expand(pause, DIM), speaking(60, seed + 2)])
    levels = [-15.0] * 40 + [-90.0] * pause + [-15.0] * 60
    assert watch(Watcher(level_decoder(levels), RATE_HZ), means) == (None, len(means))


def test_it_listens_only_when_the_predictions_hardly_change_and_then_seldom() -> None:
    heard: list[int] = []

    def decode(latents: Tensor) -> np.ndarray:
        heard.append(len(latents))
        return loud(latents)

    watch(Watcher(decode, RATE_HZ), speaking(300, 0))
    assert not heard
    slow = 0.465 / 2.5 * speaking(400, 1)  # above the distance of a repetition, below that of silence
    assert watch(Watcher(decode, RATE_HZ), slow) == (None, 400)
    assert heard
    assert len(heard) <= 400 // 30
    assert max(heard) <= 76


def test_windows_follow_the_frame_rate() -> None:
    means = torch.cat([speaking(60, 0), speaking(1, 1).expand(400, DIM)])
    assert watch(Watcher(loud, 50.0), means)[1] >= 60 + 149
    assert watch(Watcher(loud, 50.0, WatchConfig(seconds=1.0)), means)[1] <= 60 + 60


def test_broken_predictions_do_not_blind_it() -> None:
    broken = torch.full((5, DIM), float("nan"))
    means = torch.cat([speaking(30, 0), broken, speaking(30, 1), speaking(1, 2).expand(100, DIM)])
    assert watch(Watcher(loud, RATE_HZ), means)[0] == "repetition"


def test_frames_must_come_in_order() -> None:
    watcher = Watcher(loud, RATE_HZ)
    with pytest.raises(AssertionError, match="frame 1 after 0 frames"):
        watcher.see(Frame(torch.zeros(DIM), DiagGaussian(torch.zeros(DIM), torch.zeros(DIM)), 1.0), 1)


class ScriptedLM:
    """A language model whose predictions are given: speech, then a cycle, whatever it is fed."""

    def __init__(self, means: Tensor) -> None:
        self._means = means
        self.device = torch.device("cpu")
        self.config = type("Config", (), {"latent_dim": means.shape[1]})
        self.vocab_size, self.hidden_size = 320, 64

    def prefill(self, text_ids: Tensor, prompt: Tensor | None, speaker: Tensor | None) -> tuple[DiagGaussian, int]:
        return self._at(0), 0

    def step(self, z: Tensor, state: int) -> tuple[DiagGaussian, int]:
        return self._at(state + 1), state + 1

    def _at(self, index: int) -> DiagGaussian:
        mean = self._means[index % len(self._means)][None]
        return DiagGaussian(mean, torch.full_like(mean, -0.5))


def scripted(period: int) -> ScriptedLM:
    """30 frames of speech, then one cycle of ``period`` for ever."""
    generator = torch.Generator().manual_seed(period)
    spoken, loop = (3 * torch.randn(frames, 8, generator=generator) for frames in (30, period))
    return ScriptedLM(torch.cat([spoken, *[loop] * 60]))


@pytest.mark.parametrize("period", [1, 4])
def test_a_looping_model_is_stopped_and_told(flowvae_tiny, period: int) -> None:
    request = request_of(torch.arange(5), 90, seed=1)
    speech = speak(scripted(period), flowvae_tiny, request)  # type: ignore[arg-type]
    assert speech.stop_reason in ("repetition", "silence")
    assert speech.frames == 30 + period
    assert speech.audio.shape == (speech.frames * 1280,)
    assert speech.trimmed_seconds == pytest.approx(38 * 0.08, abs=0.25)
    assert (speech.attempts[0].frames, speech.stuck_seconds) == (speech.frames, 0.0)
    assert any(f"{speech.trimmed_seconds:.1f} s of it were cut" in warning for warning in speech.warnings)
    unwatched = speak(scripted(period), flowvae_tiny, request_of(torch.arange(5), 90, seed=1, watch=False))  # type: ignore[arg-type]
    assert (unwatched.stop_reason, unwatched.frames, unwatched.trimmed_seconds) == ("max_frames", 90, 0.0)
    np.testing.assert_array_equal(unwatched.latents[: speech.frames], speech.latents)


def test_no_watcher_where_nothing_shall_stop_or_the_release_is_reproduced(flowvae_tiny) -> None:
    from kalle.synthesis.release_compat import ReleaseCompatibility

    ids = torch.arange(5)
    assert watcher_of(flowvae_tiny, request_of(ids, 9, seed=0)) is not None
    assert watcher_of(flowvae_tiny, request_of(ids, 9, seed=0, stop=StopRule(0.0))) is None
    assert watcher_of(flowvae_tiny, request_of(ids, 9, seed=0, compatibility=ReleaseCompatibility.release())) is None
    assert watcher_of(flowvae_tiny, request_of(ids, 9, seed=0, watch=False)) is None


@pytest.mark.parametrize("period", [1, 4])
@pytest.mark.parametrize("chunk", [8, 50])
def test_a_stream_tells_how_much_of_the_loop_was_heard(flowvae_tiny, period: int, chunk: int) -> None:
    request, kept = request_of(torch.arange(5), 90, seed=1, chunk_frames=chunk), 30 + period
    whole = speak(scripted(period), flowvae_tiny, request)  # type: ignore[arg-type]
    generated = whole.frames + round(whole.trimmed_seconds * RATE_HZ)
    decoder = StreamingDecoder(flowvae_tiny)
    stream = RequestStream(scripted(period), flowvae_tiny, decoder, request)  # type: ignore[arg-type]
    pieces, speech = list(stream), stream.speech
    assert (speech.stop_reason, len(np.concatenate(pieces))) == (whole.stop_reason, len(speech.audio))
    # The first piece takes latency + 1 frames, and what is not yet due when the loop is noticed is left out.
    pushed = decoder.latency_frames + 1 + chunk * ((generated - decoder.latency_frames - 1) // chunk)
    yielded = max(kept, pushed - decoder.latency_frames)
    assert speech.frames == yielded
    assert len(speech.audio) == yielded * 1280
    assert speech.stuck_seconds == pytest.approx((yielded - kept) / RATE_HZ)
    assert speech.trimmed_seconds == pytest.approx((generated - yielded) / RATE_HZ)
    assert speech.attempts[0].frames == kept
    (warning,) = speech.warnings
    assert (f"after {kept / RATE_HZ:.1f} s; {speech.stuck_seconds:.1f} s of it were heard" in warning) == (yielded > kept)
    assert f"; {speech.trimmed_seconds:.1f} s of it were cut from the end" in warning
    np.testing.assert_allclose(
        speech.audio[: (kept - decoder.latency_frames) * 1280], whole.audio[: (kept - decoder.latency_frames) * 1280], atol=1e-4
    )
