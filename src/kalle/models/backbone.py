"""A Llama decoder for synthesis: the network, and the names of its weights, that transformers' LlamaModel has.

Training computes with transformers, for the kernels it has for that. Speaking needs few operations on one position at a time, and a
command that starts at once: importing transformers' network takes seconds and 190 MB.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kalle.models.backbone_config import BackboneConfig
from kalle.models.kv_cache import KVCache


@dataclass(frozen=True)
class BackboneOutput:
    """What a pass returns."""

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
    """Cosine and sine of every position's angles; a table that grows as positions are asked for."""

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
            # An ordinary tensor even when first asked for in inference mode, so that training may use it after.
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
