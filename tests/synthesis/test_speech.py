from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from speech_requests import request_of

from kalle.audio import to_pcm16
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAEConfig
from kalle.models.flowvae.streaming import StreamingDecoder
from kalle.synthesis import ReleaseCompatibility, StopRule
from kalle.synthesis.generate import Request
from kalle.synthesis.release_compat import OURS
from kalle.synthesis.speech import Attempt, assemble, speak, speak_with_retries, truncate_to_int16
from kalle.synthesis.stream import RequestStream

NEVER = StopRule(threshold=0.0)
ENDS = StopRule(threshold=1e9, min_index=3)


def chain_request(golden, flowvae, compatibility: ReleaseCompatibility) -> Request:
    """The release's request: ids joined, prompt sampled with its noise; the frame the release drops is left to the habit."""
    with torch.no_grad():
        posterior = flowvae.encode(golden["prompt_wav"][0])
    kept = posterior[:, :-1].sample(golden["prompt_noise"])[0]
    prompt = torch.cat([kept, posterior.mean[0, -1:]])
    ids = torch.cat([golden["prompt_ids"], golden["target_ids"][1:], golden["special_ids"]])
    noise = golden["step_noise"].reshape(-1, flowvae.config.latent_dim)
    return request_of(
        ids,
        len(noise),
        seed=0,
        prompt_latents=prompt,
        stop=NEVER,
        compatibility=compatibility,
        noise=noise,
        decode_noise=golden["decode_noise"][0].T,
    )


def test_the_whole_chain_equals_the_release_to_the_int16(lm_tiny, flowvae_tiny, io) -> None:
    golden = io("chain_tiny")
    speech = speak(lm_tiny, flowvae_tiny, chain_request(golden, flowvae_tiny, ReleaseCompatibility.release()))
    assert speech.frames == 15
    assert speech.stop_reason == "max_frames"
    torch.testing.assert_close(torch.from_numpy(speech.log_std).T, golden["distributions"][0, 8:], rtol=1e-4, atol=1e-5)
    rounded = speak(
        lm_tiny,
        flowvae_tiny,
        chain_request(golden, flowvae_tiny, dataclasses.replace(ReleaseCompatibility.release(), truncate_int16=False)),
    )
    np.testing.assert_allclose(rounded.audio, golden["audio"][0, 0], rtol=1e-4, atol=2e-5)
    difference = np.abs(speech.pcm16().astype(int) - golden["audio_int16"].numpy().astype(int))
    # The decoder's fp32 rounding, about a third of a 16-bit step, moves samples that lie near the edge of one.
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.1


def test_truncation_equals_the_release_bit_for_bit(io) -> None:
    golden = io("chain_tiny")
    np.testing.assert_array_equal(to_pcm16(truncate_to_int16(golden["audio"][0, 0].numpy())), golden["audio_int16"].numpy())


def request(compatibility: ReleaseCompatibility = OURS, seed: int = 3, **options) -> Request:
    return request_of(torch.arange(5, 20), 6, seed, compatibility=compatibility, **{"stop": NEVER} | options)


def test_by_default_the_frames_that_were_fed_back_are_heard(lm_tiny, flowvae_tiny) -> None:
    speech = speak(lm_tiny, flowvae_tiny, request())
    with torch.no_grad():
        expected = flowvae_tiny.decode(torch.from_numpy(speech.latents)[None])[0]
    np.testing.assert_array_equal(speech.audio, expected)


def test_decode_choices_share_the_frames_and_differ_in_sound(lm_tiny, flowvae_tiny) -> None:
    sampled, resampled, mean = (
        speak(lm_tiny, flowvae_tiny, request(ReleaseCompatibility(decode=decode))) for decode in ("sampled", "resample", "mean")
    )
    np.testing.assert_array_equal(sampled.latents, resampled.latents)
    np.testing.assert_array_equal(sampled.latents, mean.latents)
    assert np.abs(sampled.audio - resampled.audio).max() > 1e-5
    assert np.abs(sampled.audio - mean.audio).max() > 1e-5
    cold = [
        speak(lm_tiny, flowvae_tiny, request(ReleaseCompatibility(decode=decode), temperature=0.0))
        for decode in ("sampled", "resample", "mean")
    ]
    np.testing.assert_array_equal(cold[0].audio, cold[1].audio)
    np.testing.assert_array_equal(cold[0].audio, cold[2].audio)


def test_the_second_draw_goes_on_in_the_same_generator(lm_tiny, flowvae_tiny) -> None:
    generator = torch.Generator().manual_seed(3)
    noise = torch.stack([torch.randn(8, generator=generator) for _ in range(6)])
    again = torch.randn(6, 8, generator=generator)
    compatibility = ReleaseCompatibility(decode="resample")
    given = speak(lm_tiny, flowvae_tiny, request(compatibility, noise=noise, decode_noise=again))
    np.testing.assert_array_equal(speak(lm_tiny, flowvae_tiny, request(compatibility)).audio, given.audio)


def test_drop_last_prompt_frame(lm_tiny, flowvae_tiny) -> None:
    prompt = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    dropped = speak(lm_tiny, flowvae_tiny, request(ReleaseCompatibility(drop_last_prompt_frame=True), prompt_latents=prompt))
    np.testing.assert_array_equal(dropped.audio, speak(lm_tiny, flowvae_tiny, request(prompt_latents=prompt[:-1])).audio)
    assert np.abs(dropped.audio - speak(lm_tiny, flowvae_tiny, request(prompt_latents=prompt)).audio).max() > 1e-6
    single = speak(lm_tiny, flowvae_tiny, request(ReleaseCompatibility(drop_last_prompt_frame=True), prompt_latents=prompt[:1]))
    np.testing.assert_array_equal(single.audio, speak(lm_tiny, flowvae_tiny, request()).audio)


def test_drop_last_frame_always(lm_tiny, flowvae_tiny) -> None:
    assert speak(lm_tiny, flowvae_tiny, request(ReleaseCompatibility(drop_last_frame_always=True))).frames == 5
    assert speak(lm_tiny, flowvae_tiny, request()).frames == 6


def test_truncation_and_rounding(lm_tiny, flowvae_tiny) -> None:
    rounded = speak(lm_tiny, flowvae_tiny, request())
    truncated = speak(lm_tiny, flowvae_tiny, request(ReleaseCompatibility(truncate_int16=True)))
    np.testing.assert_array_equal(truncated.pcm16(), (rounded.audio * 32767).astype(np.int16))
    np.testing.assert_array_equal(rounded.pcm16(), np.rint(rounded.audio.astype(np.float64) * 32767).astype(np.int16))
    assert (truncated.pcm16() != rounded.pcm16()).mean() > 0.2


def test_an_end_before_the_first_frame_gives_empty_audio(lm_tiny, flowvae_tiny) -> None:
    speech = speak(lm_tiny, flowvae_tiny, request(stop=StopRule(threshold=1e9, min_index=-1)))
    assert speech.frames == 0
    assert speech.audio.shape == (0,)
    assert speech.stop_reason == "end"
    assert np.isnan(speech.confidence)


def test_release_turns_everything_on() -> None:
    release = ReleaseCompatibility.release()
    assert release.decode == "resample"
    assert all(getattr(release, field.name) != field.default for field in dataclasses.fields(ReleaseCompatibility))


def test_the_result_holds_what_the_model_thought(lm_tiny, flowvae_tiny) -> None:
    speech = speak(lm_tiny, flowvae_tiny, request(temperature=0.5))
    noise = (speech.latents - speech.means) / np.exp(speech.log_std) / 0.5
    generator = torch.Generator().manual_seed(3)
    np.testing.assert_allclose(noise, [torch.randn(8, generator=generator).numpy() for _ in range(6)], atol=1e-4)
    density = torch.distributions.Normal(torch.from_numpy(speech.means), torch.from_numpy(speech.log_std).exp())
    np.testing.assert_allclose(speech.log_likelihood, density.log_prob(torch.from_numpy(speech.latents)).mean(1), rtol=1e-4, atol=1e-5)
    assert speech.attempts == (Attempt(3, "max_frames", 6, kept=True),)
    assert (speech.trimmed_seconds, speech.stop) == (0.0, NEVER)
    assert speech.warnings == ("the speech did not end by itself and was cut at 0.5 s: words may be missing",)


def test_every_bad_ending_has_a_warning_and_a_good_one_none(lm_tiny) -> None:
    for ending in ("max_frames", "repetition", "silence", "interrupted"):
        assert len(assemble([], np.ones(16000, np.float32), ending, request(), FlowVAEConfig(latent_dim=8)).warnings) == 1
    assert assemble([], np.ones(16000, np.float32), "end", request(), FlowVAEConfig(latent_dim=8)).warnings == ()
    assert assemble([], np.zeros(0, np.float32), "end", request(), FlowVAEConfig(latent_dim=8)).warnings == ("nothing was spoken",)
    trimmed = assemble([], np.ones(16000, np.float32), "silence", request(), FlowVAEConfig(latent_dim=8), trimmed_frames=50)
    assert trimmed.trimmed_seconds == 4.0
    assert trimmed.warnings == (
        "the speech fell silent after 1.0 s without an end; 4.0 s of it were cut from the end: words may be missing",
    )


def test_speech_far_too_short_for_its_text_is_a_bad_ending_of_its_own(lm_tiny, flowvae_tiny) -> None:
    text, at_once = "The children like to go to school.", StopRule(threshold=1e9, min_index=3)
    short = speak(lm_tiny, flowvae_tiny, request(stop=at_once, text=text))
    assert (short.frames, short.stop_reason) == (4, "too_short")
    assert "ended after 0.3 s, where its text usually takes 2.2 s: words are missing" in short.warnings[0]
    for fine in ({"text": "Four frames."}, {"text": "." * 60}, {"text": text, "watch": False}):
        assert speak(lm_tiny, flowvae_tiny, request(stop=at_once, **fine)).stop_reason == "end"
    twice = speak_with_retries(lm_tiny, flowvae_tiny, request(stop=at_once, text=text, retries=1))
    assert [attempt.stop_reason for attempt in twice.attempts] == ["too_short", "too_short"]


def test_speech_of_a_low_confidence_is_tried_again_and_told(lm_tiny, flowvae_tiny) -> None:
    plain = speak(lm_tiny, flowvae_tiny, request())
    assert not plain.doubtful
    low, fine = (speak_with_retries(lm_tiny, flowvae_tiny, request(low_confidence=limit, stop=ENDS, retries=1)) for limit in (0.999, 1e-3))
    assert low.doubtful
    assert len(low.attempts) == 2
    assert "the confidence is low (0." in low.warnings[0]
    assert (fine.doubtful, len(fine.attempts), fine.warnings) == (False, 1, ())


def test_sound_that_is_not_finite_never_leaves(lm_tiny, flowvae_tiny) -> None:
    broken = copy.deepcopy(flowvae_tiny)
    with torch.no_grad():
        next(parameter for name, parameter in broken.decoder.named_parameters() if name.endswith("bias")).fill_(float("nan"))
    with pytest.raises(UserError, match=r"the Flow-VAE gives \d+ of \d+ samples that are not finite"):
        speak(lm_tiny, broken, request())
    with pytest.raises(UserError, match="samples that are not finite"):
        list(RequestStream(lm_tiny, broken, StreamingDecoder(broken), request()))


def test_the_frame_that_ended_the_speech_is_told(lm_tiny, flowvae_tiny) -> None:
    ended = speak(lm_tiny, flowvae_tiny, request(stop=ENDS))
    assert ended.stop_reason == "end"
    assert ended.end_frame_kl == pytest.approx(float(ended.end_kl.max()), rel=5)
    stream = RequestStream(lm_tiny, flowvae_tiny, StreamingDecoder(flowvae_tiny), request(stop=ENDS))
    list(stream)
    assert stream.speech.end_frame_kl == pytest.approx(ended.end_frame_kl)
    assert speak(lm_tiny, flowvae_tiny, request()).end_frame_kl is None
