"""Release compatibility: what the public KALL-E release does differently, each habit an option of its own."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.models.int8 import Int8Backbone

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM, KalleLMConfig, NextFrame

Decode = Literal["sampled", "resample", "mean"]
ConvertedModels: TypeAlias = "dict[tuple[KalleLM, torch.dtype], KalleLM]"
"""Models in another precision, by the one they were made from, which it keeps in memory; weights changed later are not noticed."""
RELEASED_STEPS = 1000
"""The release's length cap in frames."""
RELEASED_THRESHOLD, RELEASED_MIN_INDEX = 0.5, 3
"""The release's stop rule."""


@dataclass(frozen=True)
class ReleaseCompatibility:
    """Habits of the KALL-E release that change its output; all off by default, ``release()`` turns all on.

    The release also puts fp16 autocast around exp(log_std). That needs no option: autocast leaves exp in fp32, on the CPU and on CUDA.
    """

    decode: Decode = "sampled"
    """The input of the decoder: "sampled", the very frames that were fed back; "resample", a second draw from each
    frame's distribution (the release); "mean", the means."""
    drop_last_frame_always: bool = False
    """Drop the last frame at the length cap too, where it is speech; the end frame is dropped in any case."""
    drop_last_prompt_frame: bool = False
    """Leave out the last latent frame of the prompt."""
    tokenise_separately: bool = False
    """Tokenise prompt and text each on its own and join the ids with no space between."""
    truncate_int16: bool = False
    """Cut samples towards zero to 16 bits instead of rounding."""
    hard_coded_stop: bool = False
    """Where the caller gives no stop rule, stop below 0.5 after index 3, not by the rule that was calibrated for the weights."""
    thousand_steps: bool = False
    """Where the caller gives no length, the cap is 1000 steps for any text."""
    config_dtype: bool = False
    """Run the backbone in the dtype that its configuration names, which is fp16 in the released one, and fp32 where it names none. The
    two linear layers stay fp32. The weights must be loaded in fp32, or in that dtype."""
    no_cache: bool = False
    """Compute the whole prefix again for every frame; the cache gives the same but for rounding."""

    def __post_init__(self) -> None:
        if self.decode not in get_args(Decode):
            raise UserError(f"bad decode: got {self.decode!r}, expected one of {', '.join(get_args(Decode))}; correct it")

    @classmethod
    def release(cls) -> ReleaseCompatibility:
        """Every habit of the release at once."""
        switches = {field.name: True for field in fields(cls) if field.name != "decode"}
        return cls(decode="resample", **switches)

    @property
    def changes_model(self) -> bool:
        """Whether ``language_model`` returns another model, which no other request can share a batch with."""
        return self.config_dtype or self.no_cache

    def language_model(self, lm: KalleLM, converted: ConvertedModels | None = None) -> KalleLM | UncachedLM:
        """``lm`` as the release would run it; weights that stay as they are are shared.

        A backbone in another precision is looked up in ``converted`` and kept there for the next request.
        UserError when ``lm`` was loaded in a dtype from which the release's cannot be had.
        """
        if self.config_dtype:
            lm = _kept(lm, configured_dtype(lm), {} if converted is None else converted)
        return UncachedLM(lm) if self.no_cache else lm


OURS = ReleaseCompatibility()
"""None of the release's habits."""


@dataclass(frozen=True)
class Prefix:
    """Everything said so far: what ``UncachedLM.step`` needs of the past. Shapes as in ``KalleLM.prefill``."""

    text_ids: Tensor
    latents: Tensor | None
    speaker_latent: Tensor | None


class UncachedLM:
    """A `FrameModel` that keeps no keys and values, the release's algorithm: T frames cost O(T²) positions instead of O(T).

    The cache is tested against it.
    """

    def __init__(self, lm: KalleLM) -> None:
        self._lm = lm
        self.config: KalleLMConfig = lm.config
        self.device, self.hidden_size, self.vocab_size = lm.device, lm.hidden_size, lm.vocab_size

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


def configured_dtype(lm: KalleLM) -> torch.dtype:
    """The dtype that the configuration of the backbone names, fp32 when none; a UserError for an unknown one."""
    values = lm.config.backbone
    name = str(values.get("dtype") or values.get("torch_dtype") or "float32").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise UserError(f"bad dtype in the configuration of the backbone: got {name!r}, expected float32, float16 or bfloat16; correct it")
    return dtype


def _kept(lm: KalleLM, dtype: torch.dtype, converted: ConvertedModels) -> KalleLM:
    if (lm, dtype) not in converted:
        other = in_dtype(lm, dtype)
        if other is lm:
            return lm
        converted[lm, dtype] = other
    return converted[lm, dtype]


def in_dtype(lm: KalleLM, dtype: torch.dtype) -> KalleLM:
    """``lm`` with a backbone in ``dtype``; what has no weights, such as the rotary frequencies, keeps its own."""
    if isinstance(lm.backbone, Int8Backbone):
        raise UserError(f"the release runs this backbone in {_name(dtype)}: got 8-bit weights; load the model without quantize")
    loaded = lm.backbone.dtype
    if loaded == dtype:
        return lm
    if loaded != torch.float32:
        raise UserError(f"the release runs this backbone in {_name(dtype)}: got weights loaded in {_name(loaded)}; load them in float32")
    weights = {id(weight): torch.nn.Parameter(weight.detach().to(dtype), requires_grad=False) for weight in lm.backbone.parameters()}
    other = copy.copy(lm)
    # The copy takes what the memo holds in place of the weights; everything outside the backbone is shared.
    other._modules = {**lm._modules, "backbone": copy.deepcopy(lm.backbone, weights)}
    return other


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
