from __future__ import annotations

import pytest
import torch

from kalle.synthesis import StopRule, generate
from kalle.synthesis.release_compat import UncachedLM


@pytest.mark.parametrize("speaker", [False, True])
@pytest.mark.parametrize("prompt", [0, 6])
@pytest.mark.parametrize("stop", [StopRule(threshold=0.0), StopRule(threshold=0.6, min_index=20)])
def test_free_running_frames_equal_those_with_a_cache(lm_tiny, prompt: int, speaker: bool, stop: StopRule) -> None:
    generator = torch.Generator().manual_seed(prompt)
    ids = torch.randint(0, 320, (11,), generator=generator)
    latents = torch.randn(1, prompt, 8, generator=generator) if prompt else None
    voice = torch.randn(1, 64, generator=generator) if speaker else None
    noise = torch.randn(60, 8, generator=generator)
    cached, uncached = (generate(lm, ids, latents, voice, noise=noise, stop=stop) for lm in (lm_tiny, UncachedLM(lm_tiny)))
    with_cache, without = list(cached), list(uncached)
    assert len(with_cache) == len(without)
    assert cached.stop_reason == uncached.stop_reason == ("max_frames" if stop.threshold == 0 else "end")
    torch.testing.assert_close(torch.stack([f.z for f in without]), torch.stack([f.z for f in with_cache]), rtol=0, atol=1e-4)
    torch.testing.assert_close([f.end_kl for f in without], [f.end_kl for f in with_cache], rtol=0, atol=1e-4)


def test_frames_equal_the_release(lm_tiny, io) -> None:
    golden = io("lm_tiny")
    frames = list(generate(UncachedLM(lm_tiny), golden["input_ids"], noise=golden["noise"].reshape(24, 8), stop=None))
    parameters = torch.stack([torch.cat([frame.distribution.mean, frame.distribution.log_std]) for frame in frames], dim=1)[None]
    torch.testing.assert_close(parameters[..., :23], golden["distributions_unprompted"], rtol=1e-4, atol=1e-5)


def test_nothing_but_the_frames_is_kept_between_steps(lm_tiny) -> None:
    _, first = UncachedLM(lm_tiny).prefill(torch.arange(5)[None])
    _, second = UncachedLM(lm_tiny).step(torch.zeros(1, 8), first)
    assert first.latents is None
    assert second.latents.shape == (1, 1, 8)
