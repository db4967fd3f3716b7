"""A text embedding that trains only the rows a corpus uses: the others get no gradient, so they need no optimizer state and no GPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM


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
