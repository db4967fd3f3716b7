"""Text weights of a Llama, in a Hugging Face folder, as the start of a language model's backbone."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch
from torch import Tensor

from kalle.checkpoint import INDEX_NAME, WEIGHTS_NAME, read_json, read_weights, require_fit
from kalle.errors import UserError
from kalle.models.backbone import BackboneConfig
from kalle.models.lm import KalleLM, KalleLMConfig

logger = logging.getLogger(__name__)

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
