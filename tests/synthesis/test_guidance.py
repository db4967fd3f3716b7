"""Classifier-free guidance: 1 is nothing at all, anything else is what two whole passes give, on every path that has it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from speech_requests import request_of

from kalle.errors import UserError
from kalle.models.lm import KalleLM
from kalle.synthesis import Frame, GenerationOptions, ReleaseCompatibility, SpeechRequest, StopRule, generate
from kalle.synthesis.batch import generate_batch
from kalle.synthesis.generate import GuidedLM, guided
from kalle.synthesis.kalle import Kalle
from kalle.text.tokenizer import without_text

NEVER = StopRule(0.0)
OPTIONS = {"seed": 3, "max_seconds": 0.8, "stop": NEVER, "retries": 0}
IDS = torch.arange(5, 17)


def spoken(lm: KalleLM, prompt: torch.Tensor | None = None, **options) -> list[Frame]:
    generator = torch.Generator().manual_seed(2)
    return list(generate(lm, IDS, prompt, generator=generator, stop=None, max_frames=12, options=GenerationOptions(**options)))


def latents(frames: list[Frame]) -> torch.Tensor:
    return torch.stack([frame.z for frame in frames])


def test_a_guidance_of_one_is_the_model_itself(lm_tiny: KalleLM, kalle_tiny: Kalle) -> None:
    assert guided(lm_tiny, 1.0) is lm_tiny
    assert torch.equal(latents(spoken(lm_tiny, guidance=1.0)), latents(spoken(lm_tiny)))
    plain, one = kalle_tiny.synthesize("Hello.", **OPTIONS), kalle_tiny.synthesize("Hello.", guidance=1.0, **OPTIONS)
    np.testing.assert_array_equal(plain.audio, one.audio)


def test_both_branches_alone_are_the_ends_of_the_line(lm_tiny: KalleLM) -> None:
    """The arithmetic at 1, which `guided` leaves out, and at 0, which must be the model that never saw the words."""
    options = {"generator": torch.Generator().manual_seed(2), "stop": None, "max_frames": 12}
    one = list(generate(GuidedLM(lm_tiny, 1.0), IDS, **options))
    torch.testing.assert_close(latents(one), latents(spoken(lm_tiny)), atol=1e-4, rtol=0)
    unheard = list(generate(lm_tiny, without_text(IDS), **options | {"generator": torch.Generator().manual_seed(2)}))
    torch.testing.assert_close(latents(spoken(lm_tiny, guidance=0.0)), latents(unheard), atol=1e-4, rtol=0)


@pytest.mark.parametrize("prompt", [0, 4])
def test_frames_are_those_of_two_whole_passes(lm_tiny: KalleLM, prompt: int) -> None:
    """h_u + w (h_c - h_u) in the hidden state is the same in mean and log std, for the head is linear."""
    heard = torch.randn(1, prompt, 8, generator=torch.Generator().manual_seed(7)) if prompt else None
    frames = spoken(lm_tiny, heard, guidance=2.5)
    assert not torch.allclose(latents(frames), latents(spoken(lm_tiny, heard)), atol=1e-2), "guidance must do something"
    for index, frame in enumerate(frames):
        before = [part for part in (heard, latents(frames[:index])[None] if index else None) if part is not None]
        past = torch.cat(before, dim=1) if before else None
        with torch.no_grad():
            with_text, without = (lm_tiny.predict(ids[None], past) for ids in (IDS, without_text(IDS)))
        for name in ("mean", "log_std"):
            c, u = getattr(with_text, name)[0], getattr(without, name)[0]
            torch.testing.assert_close(getattr(frame.distribution, name), u + 2.5 * (c - u), atol=1e-3, rtol=1e-3)


def test_a_seed_means_the_same_alone_streamed_and_among_others(kalle_tiny: Kalle) -> None:
    speech, again = (kalle_tiny.synthesize("Hello.", guidance=2.0, **OPTIONS) for _ in range(2))
    np.testing.assert_array_equal(speech.latents, again.latents)
    plain = kalle_tiny.synthesize("Hello.", **OPTIONS)
    assert np.abs(speech.latents - plain.latents).max() > 1e-2
    stream = kalle_tiny.stream("Hello.", seed=3, max_seconds=0.8, stop=NEVER, guidance=2.0)
    pieces = list(stream)
    np.testing.assert_array_equal(stream.speech.latents, speech.latents)
    np.testing.assert_allclose(np.concatenate(pieces), speech.audio, atol=1e-4)
    requests = [SpeechRequest("Hello.", guidance=guidance, **OPTIONS) for guidance in (1.0, 2.0)]
    unguided, one = kalle_tiny.synthesize_batch(requests)
    np.testing.assert_array_equal(one.latents, speech.latents)
    np.testing.assert_allclose(unguided.latents, plain.latents, atol=1e-4)


@pytest.mark.parametrize("guidance", [-1.0, float("nan"), float("inf")])
def test_no_guidance_is_refused(lm_tiny: KalleLM, kalle_tiny: Kalle, guidance: float) -> None:
    for speak in (
        lambda: generate(lm_tiny, IDS, options=GenerationOptions(guidance=guidance)),
        lambda: kalle_tiny.synthesize("Hi.", guidance=guidance),
    ):
        with pytest.raises(UserError, match=r"bad guidance: got .*, expected a finite number of at least 0"):
            speak()
    with pytest.raises(UserError, match="bad guidance: got 'much', expected a finite number"):
        SpeechRequest("Hi.", guidance="much")


def test_what_cannot_be_guided_says_so(lm_tiny: KalleLM, kalle_tiny: Kalle) -> None:
    with pytest.raises(UserError, match=r"a batch is not guided: got a request with guidance 2\.0, expected 1"):
        generate_batch(lm_tiny, [request_of(IDS, 9, 1, guidance=2.0)])
    with pytest.raises(UserError, match="guidance 2 with no_cache"):
        kalle_tiny.synthesize("Hi.", guidance=2.0, compatibility=ReleaseCompatibility(no_cache=True))
