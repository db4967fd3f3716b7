"""Classifier-free guidance: away from what the model would say without the text."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.models.lm import NextFrame
from kalle.models.lm_state import LMState
from kalle.synthesis.uncached import UncachedLM
from kalle.text.prompt import without_text

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM, KalleLMConfig

NO_GUIDANCE = 1.0


def guided(lm: KalleLM, guidance: float) -> KalleLM:
    """``lm`` for ``generate``, guided; at 1 it is ``lm`` itself. UserError for a value that is no guidance, or a model without a cache."""
    if not (hasattr(guidance, "__float__") and math.isfinite(guidance) and guidance >= 0):
        raise UserError(f"bad guidance: got {guidance!r}, expected a finite number of at least 0; 1 is the model's own prediction")
    if guidance == NO_GUIDANCE:
        return lm
    if isinstance(lm, UncachedLM):
        raise UserError(f"guidance needs the cache: got guidance {guidance:g} with the quirk no_cache, expected one of them; leave one out")
    return cast("KalleLM", GuidedLM(lm, guidance))


class GuidedLM:
    """A KalleLM that predicts from ``h_u + guidance * (h_c - h_u)`` (Ho and Salimans, arXiv 2207.12598; on the hidden state before the
    head as in CALM, arXiv 2509.06926).

    ``h_c`` (H,) is the hidden state after the whole context, ``h_u`` that after the same without the words of the text: ``without_text``,
    and speaker and latents as they are. The state holds both: first the B rows with, then the B without.
    """

    def __init__(self, lm: KalleLM, guidance: float) -> None:
        self._lm, self._guidance = lm, guidance

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
    ) -> tuple[NextFrame, LMState]:
        """Predict the first new frame; shapes as in ``KalleLM.prefill``."""
        texts = (text_ids, without_text(text_ids))
        hidden, states = zip(*(self._lm.read(ids, prompt_latents, speaker_latent) for ids in texts), strict=True)
        return self._predict(torch.cat(hidden)), LMState.join(states)

    def step(self, z: Tensor, state: LMState) -> tuple[NextFrame, LMState]:
        """Append the frame ``z`` (B, D) and predict the next."""
        hidden, state = self._lm.append(torch.cat([z, z]), state)
        return self._predict(hidden), state

    def _predict(self, hidden: Tensor) -> NextFrame:
        with_text, without = hidden.float().chunk(2)
        return self._lm.predict_from(without + self._guidance * (with_text - without))
