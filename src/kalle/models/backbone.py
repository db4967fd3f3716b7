"""A Llama decoder: the network, and the names of its weights, that transformers' LlamaModel has.

Speaking needs few operations on one position at a time, and a command that starts at once: importing transformers' network takes seconds
and 190 MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalle.models.lm_state import KVCache

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

    @property
    def layer_parameters(self) -> int:
        """Values in the linear layers, which a step reads all of."""
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return self.num_hidden_layers * self.hidden_size * (2 * queries + 2 * keys + 3 * self.intermediate_size)

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


@dataclass(frozen=True)
class BackboneOutput:
    """The result of a pass."""

    last_hidden_state: Tensor
    """(B, W, H), after the final norm."""


class RMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467), computed in fp32 and scaled in the dtype of the input."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), x.shape[-1:], None, self.epsilon).to(x.dtype)


class RotaryEmbedding:
    """Cosine and sine of every position's angles; a table that grows with the positions used."""

    def __init__(self, config: BackboneConfig) -> None:
        self.inv_freq = config.inverse_frequencies()  # no buffer: it stays in fp32 whatever the weights are turned into
        self._table = torch.empty(2, 0, config.head_dim)

    def span(self, x: Tensor, begin: int, end: int) -> tuple[Tensor, Tensor]:
        """Cosine and sine (end - begin, head_dim) of consecutive positions, on the device and in the dtype of ``x``."""
        table = self._upto(end, x.device)
        return table[0, begin:end].to(x.dtype), table[1, begin:end].to(x.dtype)

    def __call__(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, W, head_dim) of ``position_ids`` (B, W), on the device and in the dtype of ``x``."""
        table = self._upto(int(position_ids.max()) + 1, x.device)
        return table[0, position_ids].to(x.dtype), table[1, position_ids].to(x.dtype)

    def _upto(self, end: int, device: torch.device) -> Tensor:
        table = self._table  # another thread may replace it
        if table.device != device or table.shape[1] < end:
            # An ordinary tensor even when first used in inference mode, so that training may use it after.
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(max(256, end + end // 2), device=device).float()
                angles = positions[:, None] * self.inv_freq.to(device)
                angles = torch.cat([angles, angles], dim=-1)
                self._table = table = torch.stack([angles.cos(), angles.sin()])
        return table


class Attention(nn.Module):
    """Causal attention with fewer key-value heads than query heads."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        rows, new, _ = x.shape
        queries = _rotated(self.q_proj(x).view(rows, new, self.heads, self.head_dim).transpose(1, 2), rotary)
        keys = _rotated(self.k_proj(x).view(rows, new, self.kv_heads, self.head_dim).transpose(1, 2), rotary)
        values = self.v_proj(x).view(rows, new, self.kv_heads, self.head_dim).transpose(1, 2)
        if cache is not None:
            keys, values = cache.update(keys, values, layer)
        return self.o_proj(self._attend(queries, keys, values, mask).transpose(1, 2).reshape(rows, new, -1))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """(B, heads, new, head_dim); without a mask a single position sees every key, several see those up to their own."""
        group = self.heads // self.kv_heads
        if queries.shape[2] == 1:
            # The queries of one group ask the same keys: rows of one product, and no key is copied.
            grouped = queries.view(queries.shape[0], self.kv_heads, group, self.head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(queries.shape)
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None)


class MLP(nn.Module):
    """Gated linear unit with SiLU (arXiv 2002.05202)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """Attention, then the gated unit, each on the norm of what it is added to."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache, layer)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embeddings in, hidden states out; called as `LlamaModel` is, for the arguments that `KalleLM` gives."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
        use_cache: bool = False,
    ) -> BackboneOutput:
        """``inputs_embeds`` (B, W, H) behind the columns of ``past_key_values``, which is extended.

        ``attention_mask`` (B, columns + W) is True where a column holds something. ``position_ids`` (B, W) are counted from each row's own
        start; without a cache and a mask their restarts keep the documents of a packed row apart.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        new = inputs_embeds.shape[1]
        if position_ids is None:
            rotary = self.rotary_emb.span(inputs_embeds, past, past + new)
        else:
            cosine, sine = self.rotary_emb(inputs_embeds, position_ids)
            rotary = cosine[:, None], sine[:, None]
        mask = _mask(attention_mask, position_ids if past_key_values is None else None, past, new, inputs_embeds.device)
        hidden = inputs_embeds
        _choose_kernels(inputs_embeds.device)
        for number, layer in enumerate(self.layers):
            hidden = layer(hidden, rotary, mask, past_key_values, number)
        return BackboneOutput(self.norm(hidden))


def _choose_kernels(device: torch.device) -> None:
    """On CUDA, leave cuDNN's attention out, in this process and for good, which no other thread can undo.

    It plans anew for every length that it meets, and in speech every frame is another length (docs/results/speed.md).
    """
    if device.type == "cuda" and torch.backends.cuda.cudnn_sdp_enabled():
        torch.backends.cuda.enable_cudnn_sdp(False)


def _mask(valid: Tensor | None, positions: Tensor | None, past: int, new: int, device: torch.device) -> Tensor | None:
    """True where a new position may look, broadcast to (B, heads, new, past + new); None where only the order restricts it."""
    if new == 1:
        return None if valid is None else valid[:, None, None]
    if valid is None and positions is None and past == 0:
        return None
    columns = torch.arange(past + new, device=device)
    own = columns[past:, None]
    mask = (columns <= own)[None]
    if valid is not None:
        mask = mask & (valid[:, None] | (columns == own))  # padding may look at itself: a row of no key would be NaN
    elif positions is not None:
        document = (positions == 0).cumsum(1)
        mask = mask & (document[:, :, None] == document[:, None])
    return mask[:, None]


def rotate_half(x: Tensor) -> Tensor:
    """The second half of the last dimension, negated, before the first: Llama pairs dimension i with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotary
    return x * cosine + rotate_half(x) * sine
