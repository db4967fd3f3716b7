"""Text weights of a Llama as the start of the backbone, and a text embedding that trains only the rows that a corpus uses."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kalle.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_json, read_weights, require_fit
from kalle.errors import UserError
from kalle.models.backbone import BackboneConfig
from kalle.models.lm import KalleLM, KalleLMConfig

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM

logger = logging.getLogger(__name__)


class _Table:
    """The whole table on the CPU; copies of a model share it, and no state holds it."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __deepcopy__(self, memo: Any) -> _Table:
        return self


class CompactEmbedding(nn.Module):
    """Looks up N of V rows in ``weight`` (N, H) and, outside training, the others in the table they were taken from.

    Training it equals training the whole table, where no step decays weights that have no gradient. ``row_of`` (V,) int32 maps a token to
    its row, -1 where it has none; it is part of the state, and a state with another mapping is refused.
    """

    row_of: Tensor

    def __init__(self, table: Tensor, tokens: Tensor) -> None:
        """``table`` (V, H) is kept, on the CPU; ``tokens`` (N,) int64 are the ids that train."""
        super().__init__()
        used = torch.unique(tokens.cpu())
        assert len(used), "no tokens"
        assert int(used[0]) >= 0, int(used[0])
        assert int(used[-1]) < len(table), (int(used[-1]), len(table))
        self._table = _Table(table.detach().cpu())
        row_of = torch.full((len(table),), -1, dtype=torch.int32)
        row_of[used] = torch.arange(len(used), dtype=torch.int32)
        self.register_buffer("row_of", row_of)
        self.weight = nn.Parameter(self._table.rows[used].clone())

    @property
    def tokens(self) -> Tensor:
        """The ids (N,) int64 that have a row, ascending."""
        return (self.row_of >= 0).nonzero().flatten()

    def forward(self, ids: Tensor) -> Tensor:
        """Embeddings (..., H) of ``ids`` (...) int64; in training every id must have a row."""
        index = self.row_of[ids].long()
        frozen = index < 0
        embedded = functional.embedding(index.clamp(min=0), self.weight)
        if bool(frozen.any()):
            assert not self.training, f"tokens without a row in training: {ids[frozen].unique().tolist()}"
            rest = self._table.rows[ids[frozen].cpu()].to(embedded.device, embedded.dtype)
            embedded = embedded.index_put(frozen.nonzero(as_tuple=True), rest)
        return embedded

    def whole(self) -> Tensor:
        """The table (V, H) with the trained rows in their places, on the weight's device."""
        table = self._table.rows.to(self.weight.device, self.weight.dtype).clone()
        table[self.tokens] = self.weight.detach()
        return table

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *arguments: Any) -> None:
        theirs = state_dict.get(f"{prefix}row_of")
        if theirs is not None and not torch.equal(theirs.cpu(), self.row_of.cpu()):
            raise UserError(
                f"the checkpoint trains {int((theirs >= 0).sum())} text tokens, this run {len(self.weight)} others, of other texts; "
                "resume with the same data and tokenizer, or choose out=NEW or resume=never"
            )
        super()._load_from_state_dict(state_dict, prefix, *arguments)


def compact_vocabulary(lm: KalleLM, tokens: Tensor) -> None:
    """Replace the text embedding of ``lm`` by one that trains only ``tokens`` (N,) int64, in place; ``requires_grad`` stays."""
    whole: nn.Module = lm.backbone.embed_tokens
    assert isinstance(whole, nn.Embedding), type(whole)
    compact = CompactEmbedding(whole.weight, tokens).to(whole.weight.device)
    compact.weight.requires_grad_(whole.weight.requires_grad)
    lm.backbone.embed_tokens = compact.train(lm.training)  # type: ignore[assignment]


def expand_vocabulary(lm: KalleLM) -> None:
    """Put the whole text embedding back, in place: trained rows in their places, all others as they were. Nothing to do without."""
    compact: nn.Module = lm.backbone.embed_tokens
    if not isinstance(compact, CompactEmbedding):
        return
    table = compact.whole()
    whole = nn.Embedding.from_pretrained(table, freeze=False)
    whole.weight.requires_grad_(compact.weight.requires_grad)
    lm.backbone.embed_tokens = whole.train(lm.training)


_EMBEDDING = "embed_tokens.weight"
_ARCHITECTURE = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "rms_norm_eps", "max_position_embeddings", "attention_bias", "attention_dropout", "mlp_bias", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "rope_theta", "rope_scaling", "rope_parameters", "initializer_range",
)  # fmt: skip
"""The keys of a config.json that say what the backbone is; the rest is about files, or about generating text."""


def with_text_backbone(config: KalleLMConfig, folder: str | Path, vocab_size: int) -> KalleLMConfig:
    """``config`` with the backbone of ``folder``/config.json, its vocabulary grown to a tokenizer's ``vocab_size`` tokens.

    A UserError when that is no Llama, or has clearly more tokens than the tokenizer, which then is not the one of the text weights.
    """
    path = Path(folder) / "config.json"
    values = read_json(path)
    if values.get("model_type") != "llama":
        raise UserError(
            f"not a Llama: '{path}' has model_type {values.get('model_type')!r}, expected 'llama'; give a folder of Llama text weights"
        )
    backbone = {name: value for name, value in values.items() if name in _ARCHITECTURE}
    embedded = BackboneConfig.of(backbone, path).vocab_size
    if vocab_size < 0.9 * embedded:
        raise UserError(
            f"the tokenizer has {vocab_size} tokens but the text weights in '{folder}' embed {embedded}: it is another tokenizer; "
            "set tokenizer=llama3 tokenizer.folder=DIR to that of the text weights with the 8 added tokens"
        )
    return dataclasses.replace(config, backbone={**backbone, "vocab_size": max(vocab_size, embedded)})


def load_text_weights(lm: KalleLM, folder: str | Path, generator: torch.Generator) -> None:
    """Fill the backbone of ``lm`` from the safetensors in ``folder``, one file or several with an index, in fp32.

    Rows of the text embedding beyond those stored are drawn from a normal distribution with the mean and standard deviation that
    the stored ones have in each dimension. The output layer for text is left out. A UserError lists tensors that do not fit.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _stored(Path(folder)).items():
        plain = name.removeprefix("model.")
        if plain != "lm_head.weight" and not plain.endswith("rotary_emb.inv_freq"):
            tensors[plain] = tensor
    expected = dict(lm.backbone.state_dict())
    wanted = expected[_EMBEDDING].shape
    stored = tensors.get(_EMBEDDING)
    if stored is not None and stored.shape[1:] == wanted[1:]:
        tensors[_EMBEDDING] = _grown(stored, wanted[0], generator)
    require_fit(expected, tensors, folder)
    with torch.no_grad():
        for name, tensor in expected.items():
            tensor.copy_(tensors[name])
    logger.info("started from the text weights in '%s', with %d new tokens", folder, wanted[0] - len(stored) if stored is not None else 0)


def _grown(table: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """``table`` (V, H) with rows drawn like its own, to ``rows`` in all; as it is when it has as many."""
    if len(table) >= rows:
        return table
    table = table.float()
    noise = torch.randn(rows - len(table), table.shape[1], generator=generator)
    return torch.cat([table, table.mean(0) + table.std(0) * noise])


def _stored(folder: Path) -> dict[str, Tensor]:
    if not any((folder / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        raise UserError(
            f"no text weights in '{folder}': expected {WEIGHTS_NAME} or {INDEX_NAME}; give a Hugging Face folder with safetensors"
        )
    return read_weights(folder)
