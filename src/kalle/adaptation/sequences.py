"""Training material of an adapter: recordings as the sequences that synthesis builds from a prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import Direction, directed_kl
from kalle.models.lm import KalleLM
from kalle.synthesis.generate import Request
from kalle.synthesis.options import GenerationOptions, SpeechRequest
from kalle.synthesis.release_compat import OURS, ReleaseCompatibility
from kalle.synthesis.voice import Voice
from kalle.synthesis.voicing import prompt_posterior, prompt_samples, voice_of_samples
from kalle.text.tokenizer import prompt_ids

if TYPE_CHECKING:
    from kalle.synthesis.kalle import Kalle


@dataclass(frozen=True, eq=False)
class Recording:
    """One utterance of the speaker and its transcript. S samples, T frames of D dimensions."""

    audio: Audio
    """(S,) at the model's rate."""
    posterior: DiagGaussian
    """(T, D), the Flow-VAE's."""
    voice: Voice
    """The voice that ``Kalle.voice`` makes of it."""


@dataclass(frozen=True, eq=False)
class PromptSequence:
    """The input and the targets of the language model for a recording: L ids, T frames of D dimensions, width H."""

    text_ids: Tensor
    """(L,) int64"""
    posterior: DiagGaussian
    """(T, D): the frames that the model reads of the prompt."""
    speaker_latent: Tensor | None
    """(H,)"""

    def loss(self, lm: KalleLM, noise: Tensor, direction: Direction) -> Tensor:
        """Mean KL over the prompt's frames, in nats per dimension; the end that the model predicts after them has no part in it.

        ``noise`` (T, D) draws the frames that the model reads. ``lm`` may carry gradients.
        """
        device = lm.device
        posterior = self.posterior.to(device)
        z = posterior.sample(noise)
        speaker = None if self.speaker_latent is None else self.speaker_latent.to(device)[None]
        prediction = lm.predict_all(self.text_ids.to(device)[None], z[None], speaker)
        return directed_kl(prediction[0, :-1], posterior, direction).mean()

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that ``loss`` wants."""
        return tuple(self.posterior.mean.shape)


def read_recording(
    kalle: Kalle, audio: str | Path | NDArray[np.floating], text: str, seed: int, language: str | None = None, rate_hz: int | None = None
) -> Recording:
    """Read ``audio`` with its transcript ``text`` as ``Kalle.voice`` does, doubts in the log included; UserError as there."""
    if not isinstance(text, str):
        raise UserError("a recording without its transcript: got no text, expected the words that are spoken in it; give --text")
    samples = prompt_samples(kalle, audio, text, rate_hz)
    voice = voice_of_samples(kalle, samples, text, seed=seed, language=language)
    return Recording(samples, prompt_posterior(kalle, torch.from_numpy(samples)), voice)


def prompt_sequence(
    kalle: Kalle, recording: Recording, target_text: str | None = None, compatibility: ReleaseCompatibility = OURS
) -> PromptSequence:
    """The sequence of a request in which ``recording`` prompts ``target_text``; without one, the transcript is all there is to read.

    The ids, the speaker latent and the choice of the frames that are read come from the code that resolves requests, ``compatibility``
    (tokenise_separately, drop_last_prompt_frame) included. UserError for what could not be spoken, or no frame to learn from.
    """
    voice, options = recording.voice, GenerationOptions(seed=0, by_sentences=False, compatibility=compatibility)
    if target_text is not None:
        request = kalle.resolve(SpeechRequest(target_text, voice, options))
    else:
        assert voice.text is not None
        ids = prompt_ids(kalle.tokenizer, kalle.config.transcript(voice.text), tokenise_separately=compatibility.tokenise_separately)
        request = Request(ids, 1, options, voice.prompt_latents, voice.speaker_latent)
    heard = request.context[1]
    frames = 0 if heard is None else heard.shape[1]
    used, limit = len(request.text_ids) + frames + 1, int(kalle.lm.backbone.config.max_position_embeddings)
    if not frames:
        raise UserError("nothing to learn from: the recording has no frame besides the one that is left out; give a longer one")
    if used > limit:
        raise UserError(f"the recording is too long: with its text it takes {used} positions, the model reads {limit}; cut it")
    return PromptSequence(request.text_ids, recording.posterior[:frames], request.speaker_latent)


def fixed_noise(sequence: PromptSequence, draws: int, seed: int) -> list[Tensor]:
    """``draws`` times standard normal noise (T, D), the same for the same seed: what two models are compared with."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(sequence.noise_shape, generator=generator) for _ in range(draws)]


@torch.no_grad()
def mean_kl(lm: KalleLM, sequences: Sequence[PromptSequence], draws: int, seed: int, direction: Direction) -> float:
    """KL in nats per dimension, the mean over the frames of all ``sequences``, each read with ``draws`` fixed noises."""
    total, frames = 0.0, 0
    for sequence in sequences:
        losses = [float(sequence.loss(lm, noise, direction)) for noise in fixed_noise(sequence, draws, seed)]
        total += sum(losses) / draws * sequence.noise_shape[0]
        frames += sequence.noise_shape[0]
    return total / frames


Reporter = Callable[[int, int, float, float], None]
"""Told after every step: how many are made, of how many, the loss in nats per dimension, the seconds since the first began."""
