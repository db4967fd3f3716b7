"""Guided attention: one attention head follows the text, from its beginning to its end as the frames advance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from kalle.errors import UserError
from kalle.models.backbone import rotate_half
from kalle.models.batch import LMBatch, RowLayout
from kalle.models.layers import without_autocast
from kalle.models.lm import KalleLM

HEAD = 0
"""The head that is read; its keys are those of key-value head 0."""


class TextAttention:
    """Inside the block, what the query and key projections of ``layers`` put out in a pass of ``lm``.

    The fused attention kernels give no weights, so those of one head are computed once more from its queries and keys.
    B documents, T frames, L text positions, R rows of W positions.
    """

    def __init__(self, lm: KalleLM, layers: Sequence[int]) -> None:
        """A UserError when ``lm`` lacks one of the ``layers`` (from 0)."""
        self.lm, self.layers = lm, tuple(layers)
        depth = len(lm.backbone.layers)
        if not all(0 <= layer < depth for layer in self.layers):
            raise UserError(f"objective.alignment_layers: got {list(layers)}, expected layers from 0 to {depth - 1}; correct it")
        self._seen: dict[tuple[int, str], Tensor] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> TextAttention:
        for layer in self.layers:
            attention: Any = self.lm.backbone.layers[layer].self_attn
            for name in ("q_proj", "k_proj"):
                self._handles.append(getattr(attention, name).register_forward_hook(self._keep(layer, name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _keep(self, layer: int, name: str) -> Callable[[Any, Any, Tensor], None]:
        def hook(module: Any, inputs: Any, output: Tensor) -> None:
            self._seen[layer, name] = output

        return hook

    def weights(self, layer: int, batch: LMBatch, layout: RowLayout, text_start: Tensor) -> Tensor:
        """Attention of head `HEAD` of ``layer`` to the text, (B, T, L) fp32: row t when it predicts frame t (from 0).

        ``text_start`` (B,) int64 counts the positions before the text. A row sums to what the head does not spend on frames and on the
        speaker; columns beyond a text are 0, rows beyond the frames mean nothing.
        """
        config = self.lm.backbone.config
        width = int(config.head_dim or config.hidden_size // config.num_attention_heads)
        steps = torch.arange(int(layout.lengths.max()), device=text_start.device)
        documents = layout.row[:, None]
        keys = self._seen[layer, "k_proj"][documents, (layout.start[:, None] + steps).clamp(max=layout.width - 1)]
        frames = torch.arange(batch.latents.shape[1], device=text_start.device)
        asked = (text_start + batch.text_lengths - 1)[:, None] + frames
        places = (layout.start[:, None] + asked).clamp(max=layout.width - 1)
        queries = self._seen[layer, "q_proj"][documents, places]
        chosen = slice(HEAD * width, (HEAD + 1) * width)
        queries = self._rotated(queries[..., chosen].float(), asked)
        keys = self._rotated(keys[..., chosen].float(), steps.expand(len(documents), -1))
        with without_autocast(queries.device):
            scores = queries @ keys.transpose(1, 2) * width**-0.5
        hidden = (steps > asked[..., None]) | (steps >= layout.lengths[:, None, None])
        # A query beyond the document would be left without any key; it may look at the first.
        hidden[..., 0] = False
        attention = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        return self._text_columns(attention, batch, text_start)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        cosine, sine = self.lm.backbone.rotary_emb(x, positions)
        return x * cosine + rotate_half(x) * sine

    @staticmethod
    def _text_columns(attention: Tensor, batch: LMBatch, text_start: Tensor) -> Tensor:
        columns = torch.arange(batch.text_ids.shape[1], device=text_start.device)
        index = (text_start[:, None] + columns).clamp(max=attention.shape[2] - 1)
        picked = attention.gather(2, index[:, None].expand(-1, attention.shape[1], -1))
        return picked.masked_fill((columns >= batch.text_lengths[:, None])[:, None], 0.0)


RELATIVE_TOLERANCE = 0.08
"""How far from the straight line attention may be for nothing, as a share of the text; speech is not read at one pace."""
TOLERANCE_POSITIONS = 3.0
"""The same in text positions, which counts in short texts."""
RELATIVE_WIDTH = 0.08
"""Standard deviation of what is beyond the tolerance, as a share of the text."""
_SMALLEST_SHARE = 1e-6


def diagonal_band(text_lengths: Tensor, frame_lengths: Tensor, text_width: int, frame_width: int) -> Tensor:
    """How welcome attention to text position n is at frame t, (B, frame_width, text_width) in [0, 1].

    1 near n / L = t / T, falling off as a Gaussian; the idea of guided attention (Tachibana et al., arXiv 1710.08969) with room
    around the line. ``text_lengths`` and ``frame_lengths`` are (B,) int64.
    """
    texts, frames = text_lengths[:, None, None].float(), frame_lengths[:, None, None].clamp(min=1).float()
    positions = (torch.arange(text_width, device=text_lengths.device) + 0.5) / texts
    times = (torch.arange(frame_width, device=text_lengths.device)[:, None] + 0.5) / frames
    away = ((positions - times).abs() - RELATIVE_TOLERANCE - TOLERANCE_POSITIONS / texts).clamp(min=0)
    return torch.exp(-0.5 * (away / RELATIVE_WIDTH).square())


def alignment_loss(attention: Tensor, text_lengths: Tensor, frame_lengths: Tensor) -> Tensor:
    """``-log`` of the attention that falls into `diagonal_band`, averaged over all frames; a scalar in nats, fp32.

    ``attention`` (B, T, L) is a head's, to the text alone; what it spends elsewhere counts as astray.
    """
    band = diagonal_band(text_lengths, frame_lengths, attention.shape[2], attention.shape[1])
    astray = -(attention * band).sum(-1).clamp(min=_SMALLEST_SHARE).log()
    valid = torch.arange(attention.shape[1], device=frame_lengths.device) < frame_lengths[:, None]
    return astray.masked_fill(~valid, 0.0).sum() / valid.sum()
