"""The loop that turns text ids into latent frames, one Gaussian after another."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.synthesis.guidance import NO_GUIDANCE, guided
from kalle.synthesis.row import DEFAULT_MAX_FRAMES, Ending, Frame, FrameWatcher, RowSampler, StopReason, StopRule, check_stop

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM

_DEFAULT_STOP = StopRule()
__all__ = ["DEFAULT_MAX_FRAMES", "Frame", "Generation", "StopReason", "StopRule", "generate"]


class Generation(Iterator[Frame]):
    """Frames as they are made. Once exhausted, ``stop_reason`` says why: "end", "max_frames", or what a watcher said.

    The end frame is not speech and is not among the frames; ``end_frame`` keeps it.
    """

    def __init__(self, frames: Generator[Frame, None, Ending]) -> None:
        self._frames = frames
        self.stop_reason: StopReason | None = None
        self.end_frame: Frame | None = None

    def __next__(self) -> Frame:
        """The next frame of speech."""
        try:
            return next(self._frames)
        except StopIteration as stop:
            if stop.value is not None:
                self.stop_reason, self.end_frame = stop.value
            raise StopIteration from None

    def close(self) -> None:
        """End it now and free the model's state; ``stop_reason`` stays as it is."""
        self._frames.close()


def generate(
    lm: KalleLM,
    text_ids: Tensor,
    prompt_latents: Tensor | None = None,
    speaker_latent: Tensor | None = None,
    *,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
    stop: StopRule | None = _DEFAULT_STOP,
    max_frames: int | None = None,
    temperature: float = 1.0,
    guidance: float = NO_GUIDANCE,
    drop_last_frame_always: bool = False,
    watcher: FrameWatcher | None = None,
) -> Generation:
    """Yield frames of speech for ``text_ids`` (L,) int64, every special token included (see kalle.text.prompt_ids).

    ``prompt_latents`` (1, P, D) continue from a prompt, ``speaker_latent`` (1, H) goes in front. Frame t is
    mean + temperature * noise_t * std, with ``noise`` (max_frames, D) used in order or, without it, one fp32 draw of D
    values per frame from ``generator``, which must live on the CPU so that a seed means the same on every device;
    without either the sampling differs from call to call. ``stop=None`` never stops. ``max_frames`` defaults to the
    length of ``noise``, or to the 1000 steps of the release. ``guidance`` other than 1 moves each prediction away from what ``lm`` would
    predict without the words (`GuidedLM`), at twice the cost. With ``drop_last_frame_always`` the frame at the
    length cap is dropped too, as the release does. ``watcher`` sees every frame and may end the speech. UserError for a
    bad value, a stop rule that needs a head ``lm`` lacks, before the first frame, and at a frame that is not finite.
    """
    # Asked only where it matters, so that anything with ``prefill`` and ``step`` can be sampled from.
    if stop is not None and stop.probability is not None:
        check_stop(stop, lm.config.stop_head)
    check_context(lm, text_ids[None], prompt_latents, speaker_latent)
    row = RowSampler(
        lm.config.latent_dim,
        noise=noise,
        generator=generator,
        stop=stop,
        max_frames=max_frames,
        temperature=temperature,
        drop_last_frame_always=drop_last_frame_always,
        watcher=watcher,
    )
    return Generation(_frames(guided(lm, guidance), text_ids, prompt_latents, speaker_latent, row))


def check_context(lm: KalleLM, text_ids: Tensor, prompt_latents: Tensor | None, speaker_latent: Tensor | None) -> None:
    """UserError unless ``lm`` can read these: ``text_ids`` (1, L), ``prompt_latents`` (1, P, D), ``speaker_latent`` (1, H)."""
    if text_ids.ndim != 2 or not text_ids.numel() or text_ids.is_floating_point():
        raise UserError(
            f"bad text ids: got {text_ids.dtype} of shape {tuple(text_ids.shape[1:])}, expected int64 (L,) with at least one id"
        )
    lowest, highest = (int(end) for end in text_ids.aminmax())
    if lowest < 0 or highest >= lm.vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise UserError(f"bad text ids: got {wrong}, expected 0 to {lm.vocab_size - 1}; use the tokenizer of these weights")
    _check_shape("prompt latents", prompt_latents, ("P", lm.config.latent_dim))
    _check_shape("speaker latent", speaker_latent, (lm.hidden_size,))


def _check_shape(name: str, value: Tensor | None, expected: tuple[str | int, ...]) -> None:
    if value is None:
        return
    if value.ndim != len(expected) + 1 or value.shape[0] != 1 or value.shape[-1] != expected[-1]:
        wanted = ", ".join(str(size) for size in (1, *expected))
        raise UserError(f"bad {name}: got shape {tuple(value.shape)}, expected ({wanted}); make the voice with this model")


def _frames(
    lm: KalleLM, text_ids: Tensor, prompt_latents: Tensor | None, speaker_latent: Tensor | None, row: RowSampler
) -> Generator[Frame, None, Ending]:
    """The loop itself; returns how it ended."""
    device = lm.device
    prompt = None if prompt_latents is None else prompt_latents.to(device)
    speaker = None if speaker_latent is None else speaker_latent.to(device)
    with torch.no_grad():
        prediction, state = lm.prefill(text_ids.to(device)[None], prompt, speaker)
        step = row.advance(prediction[0])
    while True:
        if step.frame is not None:
            yield step.frame
        if step.ending is not None:
            return step.ending
        assert step.frame is not None
        with torch.no_grad():
            prediction, state = lm.step(step.frame.z[None], state)
            step = row.advance(prediction[0])
