"""Whether transformers keeps the utterances of a packed row apart."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel

from kalle.errors import UserError


@torch.no_grad()
def check_documents_apart(attention: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """A UserError when this version of transformers lets the documents of a packed row see each other.

    It derives the block-diagonal mask from the restarts of ``position_ids``, but not with a cache, and says nothing when it does not.
    ``attention`` is its name of an implementation. Tried on a toy backbone of 16-wide heads.
    """
    size: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    }
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = LlamaModel(LlamaConfig(**size, head_dim=16, vocab_size=4))
        model.set_attn_implementation(attention)
        toy: nn.Module = model.eval()
        toy.to(device, dtype)
        embeddings = torch.randn(1, 6, 16, device=device, dtype=dtype)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)

    def second(inputs: Tensor) -> Tensor:
        return toy(inputs_embeds=inputs, position_ids=positions, attention_mask=None, use_cache=False).last_hidden_state[:, 3:]

    changed = embeddings.clone()
    changed[:, :3] *= -3
    if not torch.equal(second(embeddings), second(changed)):
        raise UserError(f"packing: with attention '{attention}' this version of transformers mixes packed utterances; use packing=false")
