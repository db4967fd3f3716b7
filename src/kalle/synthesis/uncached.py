"""Generation that computes the whole prefix again for every frame: the release's algorithm, and what the cache is held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kalle.models.lm import KalleLM, KalleLMConfig, NextFrame


@dataclass(frozen=True)
class Prefix:
    """Everything said so far: what ``UncachedLM.step`` needs of the past. Shapes as in ``KalleLM.prefill``."""

    text_ids: Tensor
    latents: Tensor | None
    speaker_latent: Tensor | None


class UncachedLM:
    """A KalleLM for ``generate`` that keeps no keys and values: same numbers, T frames cost O(T²) positions instead of O(T)."""

    def __init__(self, lm: KalleLM) -> None:
        self._lm = lm

    @property
    def config(self) -> KalleLMConfig:
        """What the model is built from."""
        return self._lm.config

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._lm.device

    @property
    def hidden_size(self) -> int:
        """Width of the backbone."""
        return self._lm.hidden_size

    @property
    def vocab_size(self) -> int:
        """Number of text ids."""
        return self._lm.vocab_size

    def prefill(
        self, text_ids: Tensor, prompt_latents: Tensor | None = None, speaker_latent: Tensor | None = None
    ) -> tuple[NextFrame, Prefix]:
        """Predict the first new frame, as ``KalleLM.prefill`` does."""
        return self._predict(Prefix(text_ids, prompt_latents, speaker_latent))

    def step(self, z: Tensor, state: Prefix) -> tuple[NextFrame, Prefix]:
        """Append the frame ``z`` (B, D) and predict the next: the distribution (B, D) and the new state; ``state`` is unchanged."""
        latents = z[:, None] if state.latents is None else torch.cat([state.latents.to(z), z[:, None]], dim=1)
        return self._predict(Prefix(state.text_ids, latents, state.speaker_latent))

    def _predict(self, prefix: Prefix) -> tuple[NextFrame, Prefix]:
        return self._lm.predict(prefix.text_ids, prefix.latents, prefix.speaker_latent), prefix
