"""The prompt of each sentence of a long text: one voice throughout, and what was said last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from numpy.typing import NDArray

from kalle.synthesis.length import LONGEST_SECONDS, cap_frames, cap_seconds, usual_seconds
from kalle.synthesis.request import check_voice_given
from kalle.synthesis.voice import FLOWVAE_ENCODER, GivenVoice, Voice
from kalle.text.prompt import BEFORE_SPEECH

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle


def expected_seconds(text: str) -> float:
    """How long ``text`` takes at the usual pace."""
    return usual_seconds(text)


def fits_one_request(text: str, longest_seconds: float | None = None) -> bool:
    """Whether the length cap that follows from ``text`` is below the longest one, so that slow speech is not cut off.

    And whether the text takes ``longest_seconds`` at most at the usual pace, where weights can keep up no more (`FolderConfig`).
    """
    return cap_seconds(text) < LONGEST_SECONDS and (longest_seconds is None or usual_seconds(text) <= longest_seconds)


def anchor_voice(kalle: Kalle, voice: GivenVoice, seed: int) -> Voice:
    """The voice of all sentences: ``voice``, else the weight folder's default, else (or for "random") the random voice of ``seed``."""
    check_voice_given(voice)
    if isinstance(voice, str):
        return kalle.random_voice(seed)
    voice = voice or kalle.default_voice
    return kalle.random_voice(seed) if voice is None else voice


def request_fits(kalle: Kalle, anchor: Voice, max_seconds: float | None) -> Callable[[str], bool]:
    """Whether a text, with the anchor before it and all that its cap allows behind it, fits one request to ``kalle``."""
    limit = positions_left(kalle, anchor)
    rate_hz = kalle.flowvae.config.frame_rate_hz

    @lru_cache(maxsize=4096)
    def fits(text: str) -> bool:
        # The text after the transcript may split into tokens otherwise than alone; a few positions cover that.
        needed = len(kalle.tokenizer.encode(text)) + 4 + cap_frames(text, rate_hz, max_seconds)
        return fits_one_request(text, kalle.config.longest_seconds) and needed <= limit

    return fits


def positions_left(kalle: Kalle, voice: Voice) -> int:
    """Positions of the language model that ``voice`` leaves for a text and its speech."""
    used = len(BEFORE_SPEECH) + (0 if voice.speaker_latent is None else 1)
    if voice.prompt_latents is not None:
        used += len(voice.prompt_latents) + len(kalle.tokenizer.encode(voice.text or ""))
    return int(kalle.lm.backbone.config.max_position_embeddings) - used


def rolling_voice(
    kalle: Kalle, anchor: Voice, latents: NDArray, said: str, text: str, max_prompt_s: float, max_seconds: float | None
) -> Voice:
    """``anchor`` followed by the sentence ``said``, whose frames are ``latents`` (T, D), as the prompt of ``text``.

    The anchor alone when both take more than ``max_prompt_s`` seconds, or leave no room for ``text`` and its speech.
    """
    frames = len(latents) + (0 if anchor.prompt_latents is None else len(anchor.prompt_latents))
    if not len(latents) or frames > max_prompt_s * kalle.flowvae.config.frame_rate_hz:
        return anchor
    last = torch.from_numpy(latents)
    prompt = last if anchor.prompt_latents is None else torch.cat([anchor.prompt_latents, last])
    words = said if anchor.prompt_latents is None else f"{(anchor.text or '').strip()} {said}"
    bound = {**anchor.bound_to, FLOWVAE_ENCODER: kalle.hashes[FLOWVAE_ENCODER]}
    rolled = replace(anchor, bound_to=bound, prompt_latents=prompt, text=words)
    return rolled if request_fits(kalle, rolled, max_seconds)(text) else anchor
