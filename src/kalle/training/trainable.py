"""What of a model trains: frozen parts, adapters, a vocabulary of used tokens; and what it becomes for its weight folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from kalle.errors import UserError
from kalle.models.lm import KalleLM
from kalle.models.lora import matching_parameters, merge_lora
from kalle.models.vocabulary import expand_vocabulary


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the parameters whose names fit one of ``patterns`` (wildcards ``*`` and ``?``) out of training.

    A pattern that fits none, or nothing left to train, is a UserError. Batch statistics of a frozen speaker encoder still follow the data.
    """
    frozen = matching_parameters(model, patterns, "freeze")
    for name, parameter in model.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"freeze: got {list(patterns)}, which leaves nothing to train; freeze less")


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters and all of them."""
    parameters = list(model.parameters())
    return sum(parameter.numel() for parameter in parameters if parameter.requires_grad), sum(map(torch.numel, parameters))


def parameter_groups(lm: KalleLM, decay_all: bool = True) -> list[dict[str, Any]]:
    """The trainable parameters for an optimizer, in groups.

    With ``decay_all`` one group, as in the authors' scripts; else a second one, of norms, biases and the text embedding, has no weight
    decay.
    """
    trainable = {name: parameter for name, parameter in lm.named_parameters() if parameter.requires_grad}
    if decay_all:
        return [{"params": list(trainable.values())}]
    bare = [parameter for name, parameter in trainable.items() if parameter.ndim < 2 or "embed_tokens" in name]
    kept = [parameter for name, parameter in trainable.items() if not (parameter.ndim < 2 or "embed_tokens" in name)]
    groups: list[dict[str, Any]] = [{"params": kept}, {"params": bare, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def draws_dropout(lm: nn.Module) -> bool:
    """Whether a pass of ``lm`` in training draws random numbers."""
    dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in lm.modules())
    return dropout or any(getattr(module, "attention_dropout", 0.0) for module in lm.modules())


def finish(lm: KalleLM) -> None:
    """Turn a trained model into one with the names of a weight folder, in place: the whole vocabulary, adapters in the weights."""
    expand_vocabulary(lm)
    merge_lora(lm)
