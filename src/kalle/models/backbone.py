"""A Llama decoder, for training and for speaking: the network, and the names of its weights, that transformers' LlamaModel has.

Written here because speaking needs few operations on one position at a time, and a command that starts at once: importing transformers'
network takes seconds and 190 MB. Training is no slower (docs/architecture.md).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kalle.checkpoint import first_of
from kalle.errors import UserError
from kalle.models.half_precision import PaddedLinear
from kalle.models.lm_state import CachedState, KVCache, LayerCache

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

    Mask = Tensor | BlockMask | None

T = TypeVar("T")
_LARGEST_SIZES = {
    "vocab_size": 2**22, "hidden_size": 2**16, "intermediate_size": 2**18, "num_hidden_layers": 2**10, "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10, "head_dim": 2**12, "max_position_embeddings": 2**27,
}  # fmt: skip
"""The sizes, and what no sensible network exceeds: a damaged or hostile file must not ask for all memory."""
_REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_WITHOUT_EFFECT = frozenset({
    "_name_or_path", "architectures", "bos_token_id", "chunk_size_feed_forward", "dtype", "eos_token_id", "id2label", "is_encoder_decoder",
    "label2id", "output_attentions", "output_hidden_states", "pad_token_id", "pretraining_tp", "problem_type", "return_dict",
    "tie_word_embeddings", "torch_dtype", "transformers_version", "use_cache",
})  # fmt: skip
"""Keys of a published config.json that change nothing in a network that returns hidden states."""
_ONLY_KNOWN = {"hidden_act": "silu", "attention_dropout": 0.0, "attention_bias": False, "mlp_bias": False, "model_type": "llama"}
"""Keys of which only one value is computed here."""
_OTHERS = ("initializer_range", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta")
_VALID = sorted({*_LARGEST_SIZES, *_ONLY_KNOWN, *_WITHOUT_EFFECT, *_OTHERS})


@dataclass(frozen=True)
class Llama3Scaling:
    """The rotary frequencies of Llama 3.1 and later, stretched for long contexts (`rope_type: llama3`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


_LLAMA3_KEYS = tuple(field.name for field in dataclasses.fields(Llama3Scaling))


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
    initializer_range: float = 0.02
    """Standard deviation of the weights that training starts from."""

    @classmethod
    def of(cls, values: Mapping[str, Any], source: str | Path = "lm.backbone") -> BackboneConfig:
        """The configuration that ``values`` (of a Llama config.json, or ``source``) describe.

        UserError for an unknown key (it lists the valid ones), a value that is not computed here, such as another activation, and for
        sizes that are missing, do not fit each other or are beyond all measure.
        """
        rest = {key: value for key, value in values.items() if key not in _WITHOUT_EFFECT}
        unknown = sorted(str(key) for key in rest if key not in _VALID)
        if unknown:
            raise UserError(f"unknown key {first_of(f'{name!r:.60}' for name in unknown)} in '{source}'; valid keys: {', '.join(_VALID)}")
        for key, only in _ONLY_KNOWN.items():
            if (value := rest.pop(key, only)) != only:
                raise UserError(f"not supported: {key} is {value!r} in '{source}', expected {only!r}; KALL-E's backbone is a plain Llama")
        rope = _rope(rest, source)
        missing = [key for key in _REQUIRED if rest.get(key) is None]
        if missing:
            raise UserError(f"missing key {', '.join(map(repr, missing))} in '{source}', expected a number; correct the file")
        sizes = {key: rest[key] for key in _LARGEST_SIZES if rest.get(key) is not None}
        for key, size in sizes.items():
            if not _is_size(size, key):
                raise _bad(source, key, size, f"an integer from 1 to {_LARGEST_SIZES[key]}")
        hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
        if "head_dim" not in sizes and hidden % heads:
            raise _bad(source, "hidden_size", hidden, f"a multiple of num_attention_heads={heads}, or a head_dim")
        sizes = {"num_key_value_heads": heads, "head_dim": hidden // heads, **sizes}
        if heads % sizes["num_key_value_heads"]:
            raise _bad(source, "num_attention_heads", heads, f"a multiple of num_key_value_heads={sizes['num_key_value_heads']}")
        if sizes["head_dim"] % 2:
            raise _bad(source, "head_dim", sizes["head_dim"], "an even number")
        numbers: dict[str, Any] = {key: rest.get(key, getattr(cls, key)) for key in ("rms_norm_eps", "initializer_range")}
        for key, number in numbers.items():
            if not _is_positive(number) or number >= 1:
                raise _bad(source, key, number, "a number between 0 and 1")
        return cls(**sizes, **numbers, **rope)

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


def _is_size(value: Any, key: str) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_SIZES[key]


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _bad(source: str | Path, key: str, value: Any, expected: str) -> UserError:
    return UserError(f"bad value in '{source}': {key} is {value!r}, expected {expected}; correct it")


def _rope(values: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """Take the rotary keys out of ``values``; UserError when they mean something else than the plain or Llama 3's frequencies."""
    given = values.pop("rope_scaling", None) or values.pop("rope_parameters", None) or {}
    values.pop("rope_parameters", None)
    expected = "rope_type default, or llama3 with " + ", ".join(_LLAMA3_KEYS)
    if not isinstance(given, Mapping):
        raise _bad(source, "rope_scaling", given, expected)
    given = dict(given)
    outer = values.pop("rope_theta", None)
    theta = given.pop("rope_theta", BackboneConfig.rope_theta if outer is None else outer)
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    if not _is_positive(theta):
        raise _bad(source, "rope_theta", theta, "a number above 0")
    if kind == "default" and not given:
        return {"rope_theta": float(theta)}
    fits = kind == "llama3" and set(given) == set(_LLAMA3_KEYS) and all(map(_is_positive, given.values()))
    if not fits or given["low_freq_factor"] >= given["high_freq_factor"]:
        raise _bad(source, "rope_scaling", {"rope_type": kind, **given}, f"{expected}, all above 0, low below high")
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
        self.q_proj = PaddedLinear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_proj = PaddedLinear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.v_proj = PaddedLinear(config.hidden_size, self.kv_heads * self.head_dim, bias=False)
        self.o_proj = PaddedLinear(self.heads * self.head_dim, config.hidden_size, bias=False)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: LayerCache | None) -> Tensor:
        rows, new, _ = x.shape
        queries = _rotated(self.q_proj(x).view(rows, new, self.heads, self.head_dim).transpose(1, 2), rotary)
        keys = _rotated(self.k_proj(x).view(rows, new, self.kv_heads, self.head_dim).transpose(1, 2), rotary)
        values = self.v_proj(x).view(rows, new, self.kv_heads, self.head_dim).transpose(1, 2)
        if cache is not None:
            keys, values = cache.extend(keys, values)
        return self.o_proj(self._attend(queries, keys, values, mask).transpose(1, 2).reshape(rows, new, -1))

    def _attend(self, queries: Tensor, keys: Tensor, values: Tensor, mask: Mask) -> Tensor:
        """(B, heads, new, head_dim); without a mask a single position sees every key, several see those up to their own."""
        group = self.heads // self.kv_heads
        # Under autocast the fp32 angles have made these fp32, which the fused kernels would round to the values' dtype themselves.
        queries, keys = queries.to(values.dtype), keys.to(values.dtype)
        if mask is not None and not isinstance(mask, Tensor):
            return _flex(queries.is_cuda)(queries, keys, values, block_mask=mask, enable_gqa=group > 1)
        if queries.shape[2] == 1:
            # The queries of one group ask the same keys: rows of one product, and no key is copied.
            grouped = queries.view(queries.shape[0], self.kv_heads, group, self.head_dim)
            return F.scaled_dot_product_attention(grouped, keys, values, mask).reshape(queries.shape)
        if group > 1:
            keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        short = queries.shape[2] == keys.shape[2] <= SHORT
        if mask is None and short and queries.requires_grad and queries.dtype == torch.bfloat16 and queries.device.type == "cpu":
            return _attended(queries, keys, values)
        return F.scaled_dot_product_attention(queries, keys, values, mask, is_causal=mask is None)


SHORT = 512
"""Longest row for which `_attended` is the quicker way."""


def _attended(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Causal attention by two products, (B, heads, T, head_dim) bf16.

    For training on a CPU in bf16, where torch 2.11's fused kernel takes two to three times as long for rows as short as utterances are
    (recipes/nano/README.md).
    """
    rows, heads, length, width = queries.shape
    q, k, v = (x.reshape(rows * heads, length, width) for x in (queries, keys, values))
    hidden = torch.full((length, length), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(hidden, q, k.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(scores.softmax(-1, torch.float32).to(v.dtype), v).view(queries.shape)


class MLP(nn.Module):
    """Gated linear unit with SiLU (arXiv 2002.05202)."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.gate_proj = PaddedLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = PaddedLinear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = PaddedLinear(config.intermediate_size, config.hidden_size, bias=False)

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

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Mask, cache: LayerCache | None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rotary, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Backbone(nn.Module):
    """Embeddings in, hidden states out; called as transformers' LlamaModel is."""

    flex = False
    """Whether the documents of packed rows are kept apart by torch's flex attention, which skips fully masked blocks, instead of a
    mask (R, W, W). It needs CUDA to be trained."""
    recompute = False
    """Whether training keeps the input of each layer only, and computes the rest again on the way back."""

    def __init__(self, config: BackboneConfig) -> None:
        """Linear layers and embeddings are drawn from N(0, ``initializer_range``²)."""
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = RotaryEmbedding(config)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, 0.0, config.initializer_range)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights, and of what goes in and comes out."""
        dtype: torch.dtype = self.embed_tokens.weight.dtype
        return dtype

    def forward(
        self,
        inputs_embeds: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: KVCache | None = None,
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
        packed = position_ids if past_key_values is None else None
        mask: Mask
        if self.flex and packed is not None and attention_mask is None and new > 1:
            mask = _block_mask(packed)
        else:
            mask = _mask(attention_mask, packed, past, new, inputs_embeds.device)
        hidden = inputs_embeds
        _choose_kernels(inputs_embeds.device)
        recompute = self.recompute and self.training and torch.is_grad_enabled()
        for number, layer in enumerate(self.layers):
            if recompute:
                hidden = checkpoint(layer, hidden, rotary, mask, None, use_reentrant=False)
            else:
                hidden = layer(hidden, rotary, mask, None if past_key_values is None else past_key_values.layer(number))
        return BackboneOutput(self.norm(hidden))

    def new_state(self) -> CachedState:
        """The state before the first position."""
        return CachedState(KVCache())

    def advance(self, embeddings: Tensor, state: CachedState) -> tuple[Tensor, CachedState]:
        """Read ``embeddings`` (B, W, H) behind ``state``: the hidden state (B, H) of the last position, and the extended state."""
        new = embeddings.shape[1]
        hidden = self(embeddings, state.attention_mask(new), state.position_ids(new), state.cache).last_hidden_state
        return hidden[:, -1], state

    def step(self, z: Tensor, state: CachedState, embed: Callable[[Tensor], Tensor], head: Callable[[Tensor], T]) -> tuple[T, CachedState]:
        """``head`` of the hidden state (B, H) of one more position, ``embed`` (B, 1, H) of the frames ``z`` (B, 1, D); and the state."""
        hidden, state = self.advance(embed(z[:, None]), state)
        return head(hidden), state


def _choose_kernels(device: torch.device) -> None:
    """To speak on CUDA, leave cuDNN's attention out, in this process and for good, which no other thread can undo.

    It plans anew for every length that it meets, and in speech every frame is another length (docs/results/speed.md).
    """
    if device.type == "cuda" and not torch.is_grad_enabled() and torch.backends.cuda.cudnn_sdp_enabled():
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
        document = _documents(positions)
        mask = mask & (document[:, :, None] == document[:, None])
    return mask[:, None]


def _documents(positions: Tensor) -> Tensor:
    """The number of the document at each of the ``positions`` (R, W) of packed rows, which restart at 0."""
    return (positions == 0).cumsum(1)


def _block_mask(positions: Tensor) -> BlockMask:
    """The same for flex attention: a position of a packed row sees those of its document up to its own."""
    from torch.nn.attention.flex_attention import create_block_mask

    document, (rows, width) = _documents(positions), positions.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (document[row, query] == document[row, key])

    return create_block_mask(sees, rows, None, width, width, device=str(positions.device))


@cache
def _flex(compiled: bool) -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if compiled else flex_attention


def rotate_half(x: Tensor) -> Tensor:
    """The second half of the last dimension, negated, before the first: Llama pairs dimension i with i + head_dim / 2."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    cosine, sine = rotary
    return x * cosine + rotate_half(x) * sine
