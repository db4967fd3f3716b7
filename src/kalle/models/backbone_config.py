"""Which Llama configurations `Backbone` computes itself, and the numbers it needs of them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_WITHOUT_EFFECT = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "dtype", "eos_token_id", "initializer_range", "model_type", "pad_token_id",
    "pretraining_tp", "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Keys that change nothing in a trained backbone that returns hidden states."""
_ONLY_KNOWN = {"hidden_act": "silu", "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False, "model_type": "llama"}
"""Keys of which only one value is computed here."""


@dataclass(frozen=True)
class Llama3Scaling:
    """The rotary frequencies of Llama 3.1 and later, stretched for long contexts (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class BackboneConfig:
    """Sizes of a Llama network, in the names of its published config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    scaling: Llama3Scaling | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> BackboneConfig | None:
        """The configuration that ``values`` (of a Llama config.json) describe; None when they hold anything unknown here."""
        rest = {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT or key in _ONLY_KNOWN}
        if any(rest.pop(key, only) != only for key, only in _ONLY_KNOWN.items()):
            return None
        rope = _rope(rest)
        sizes = {key: rest.pop(key, None) for key in _SIZES}
        heads, hidden = sizes["num_attention_heads"], sizes["hidden_size"]
        if rope is None or not all(_is_size(size) for size in sizes.values()) or hidden % heads:
            return None
        sizes["num_key_value_heads"] = rest.pop("num_key_value_heads", None) or heads
        sizes["head_dim"] = rest.pop("head_dim", None) or hidden // heads
        sizes["max_position_embeddings"] = rest.pop("max_position_embeddings", cls.max_position_embeddings)
        epsilon = rest.pop("rms_norm_eps", cls.rms_norm_eps)
        fits = all(_is_size(size) for size in sizes.values()) and isinstance(epsilon, float) and 0 < epsilon < 1
        if rest or not fits or heads % sizes["num_key_value_heads"] or sizes["head_dim"] % 2:
            return None
        return cls(**sizes, rms_norm_eps=epsilon, **rope)

    def inverse_frequencies(self) -> Tensor:
        """Angle a position of each pair of a head's dimensions, (head_dim / 2,) fp32 radians (RoFormer, arXiv 2104.09864, eq. 15)."""
        steps = torch.arange(0, self.head_dim, 2, dtype=torch.int64).float() / self.head_dim
        frequencies = 1.0 / (self.rope_theta**steps)
        if self.scaling is None:
            return frequencies
        scaling = self.scaling
        # Turns within the original context: slow pairs are stretched by the factor, fast ones stay, between them it blends.
        turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
        blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * frequencies / scaling.factor + blend * frequencies


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value > 0


def _rope(values: dict[str, Any]) -> dict[str, Any] | None:
    """Take the rotary keys out of ``values``; None when they mean something else than the plain or Llama 3's frequencies."""
    given = values.pop("rope_scaling", None) or values.pop("rope_parameters", None) or {}
    values.pop("rope_parameters", None)
    if not isinstance(given, Mapping):
        return None
    given = dict(given)
    theta = given.pop("rope_theta", values.pop("rope_theta", BackboneConfig.rope_theta))
    values.pop("rope_theta", None)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    if not _is_positive(theta):
        return None
    if kind == "default" and not given:
        return {"rope_theta": float(theta)}
    known = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
    if kind != "llama3" or set(given) != known or not all(map(_is_positive, given.values())):
        return None
    if given["low_freq_factor"] >= given["high_freq_factor"]:
        return None
    return {"rope_theta": float(theta), "scaling": Llama3Scaling(**given)}
