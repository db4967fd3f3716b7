"""Trying again after a bad ending, and which try to keep."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.quirks import ConvertedModels, ReleaseQuirks
from kalle.synthesis.seeds import derived_seed
from kalle.synthesis.speak import Request, speak
from kalle.synthesis.speech import Speech

LOGGER = logging.getLogger(__name__)
_BEST_FIRST = ("end", "silence", "repetition", "max_frames", "interrupted")
"""Silence usually follows the last word, a repetition its first round; at the cap there is no telling what was said."""


def speak_with_retries(
    lm: KalleLM, flowvae: FlowVAE, request: Request, retries: int = 1, converted: ConvertedModels | None = None
) -> Speech:
    """``speak``, and up to ``retries`` times again with another seed while the ending is bad.

    The result is ``keep_best`` of all tries. See ``allowed_retries`` for when there are none. ``converted`` is that of
    ``ReleaseQuirks.language_model``. UserError for a value the loop cannot use.
    """
    allowed = allowed_retries(request, retries)
    tries = [speak(lm, flowvae, request, converted)]
    while needs_retry(tries[-1]) and len(tries) <= allowed:
        again = retry_request(request, len(tries))
        log_retry(tries[-1], again, len(tries), allowed)
        tries.append(speak(lm, flowvae, again, converted))
    return keep_best(tries)


def allowed_retries(request: Request, retries: int) -> int:
    """``retries``, or 0 where another try makes no sense: quirks of the release, given noise or none (temperature 0), no stop but the cap.

    UserError unless it is an integer of at least 0.
    """
    if not hasattr(retries, "__index__") or retries < 0:
        raise UserError(f"bad retries: got {retries!r}, expected an integer of at least 0; 0 keeps the first try whatever its ending")
    reproduces = request.quirks != ReleaseQuirks() or request.noise is not None or request.temperature == 0
    return 0 if reproduces or request.stop.never else int(retries)


def log_retry(speech: Speech, again: Request, number: int, allowed: int) -> None:
    """Say that ``speech`` ended badly and that ``again`` is retry ``number`` of ``allowed``."""
    LOGGER.warning("%s; trying again with seed %d (%d of %d)", "; ".join(speech.warnings), again.seed, number, allowed)


def needs_retry(speech: Speech) -> bool:
    """Whether the ending is bad: not by the model itself, or before the first frame."""
    return speech.stop_reason not in ("end", "interrupted") or not speech.frames


def next_seed(seed: int, attempt: int) -> int:
    """The seed of try number ``attempt``, which is ``seed`` itself for 0 and else a number below 2**31 that both decide."""
    return seed if attempt == 0 else derived_seed(f"kalle retry {seed} {attempt}")


def retry_request(request: Request, attempt: int) -> Request:
    """``request`` as try number ``attempt``, counted from 0, speaks it."""
    return dataclasses.replace(request, seed=next_seed(request.seed, attempt))


def keep_best(tries: Sequence[Speech]) -> Speech:
    """The best of all ``tries`` of one request, in order: its ``attempts`` list every one, its ``seed`` is the request's.

    One that ended by itself wins, then silence, repetition, the length cap; speech wins over no speech at all, and otherwise the
    earlier try over the later one.
    """
    best = min(range(len(tries)), key=lambda i: (not tries[i].frames, _BEST_FIRST.index(tries[i].stop_reason)))
    attempts = tuple(dataclasses.replace(tries[i].attempts[0], kept=i == best) for i in range(len(tries)))
    warnings = tries[best].warnings
    if len(tries) > 1:
        warnings += (f"{len(tries)} attempts were made and number {best + 1} was kept",)
    return dataclasses.replace(tries[best], seed=tries[0].seed, attempts=attempts, warnings=warnings)
