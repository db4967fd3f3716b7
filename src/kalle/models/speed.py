"""How a language model is computed: the attention's implementation, recomputed activations, compiled layers. None of it changes weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM

ATTENTION = {"sdpa": "sdpa", "eager": "eager", "flex": "flex_attention", "flash": "flash_attention_2"}
"""Our names and transformers'."""
_CUDA_ONLY = ("flex", "flash")


def set_attention(lm: KalleLM, attention: str, device: torch.device, half_precision: bool = False) -> None:
    """Choose the implementation of the backbone's attention; a UserError where it is not available.

    sdpa and eager run everywhere; flex and flash need CUDA, and flash half precision and a kernel for it.
    """
    if attention not in ATTENTION:
        raise UserError(f"attention: got '{attention}', expected {', '.join(ATTENTION)}; correct it")
    if not hasattr(lm.backbone, "set_attn_implementation"):
        raise UserError(
            f"attention={attention}: got a language model for synthesis, expected one for training; load it with for_training=True"
        )
    if attention in _CUDA_ONLY and device.type != "cuda":
        raise UserError(f"attention={attention} needs a CUDA device: the run is on '{device.type}'; use attention=sdpa")
    if attention == "flash" and not half_precision:
        raise UserError("attention=flash needs half precision; use precision=bf16-mixed or attention=sdpa")
    try:
        lm.backbone.set_attn_implementation(ATTENTION[attention])
    except Exception as error:  # transformers raises ImportError, ValueError or whatever fetching a kernel does
        raise UserError(f"attention={attention} is not available here: {' '.join(str(error).split())}; use attention=sdpa") from None


def recompute_activations(lm: KalleLM) -> None:
    """Keep only the input of every layer in training and compute the rest again on the way back: less memory, a third more work."""
    lm.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def compile_layers(lm: KalleLM) -> None:
    """Compile every layer of the backbone in place: names of weights stay, and all layers share one compilation."""
    for layer in lm.backbone.layers:
        layer.compile()
