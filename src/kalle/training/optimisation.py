"""The optimizer and its schedule as plain values, and which parts of a model train."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from kalle.checkpoint import as_tuple, check_fields, check_range
from kalle.errors import UserError
from kalle.models.lm import KalleLM
from kalle.models.lora import matching_parameters, merge_lora
from kalle.models.text_weights import expand_vocabulary

logger = logging.getLogger(__name__)

OptimizerFactory = Callable[[Iterable[Any]], Optimizer]
"""Parameters, or groups of them, to an optimizer."""
SchedulerFactory = Callable[[Optimizer], LRScheduler]


@dataclass(frozen=True)
class AdamWConfig:
    """torch's AdamW; calling it with parameters makes the optimizer."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, ...] = (0.9, 0.999)
    """Decay of the averages of the gradient and of its square."""
    eps: float = 1e-8
    """Added to the root of the latter."""
    weight_decay: float = 0.01
    """Decoupled from the gradient."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", as_tuple(self.betas))
        check_fields(self, "optimizer")
        if len(self.betas) != 2:
            raise UserError(f"optimizer.betas: got {list(self.betas)}, expected two numbers; correct it")
        try:
            self([nn.Parameter(torch.zeros(1))])
        except ValueError as error:
            raise UserError(f"optimizer: expected values it can work with ({error}); correct optimizer.*") from None

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        """The optimizer over ``parameters``."""
        return torch.optim.AdamW(parameters, **asdict(self))


@dataclass(frozen=True)
class WarmupCosine:
    """A linear warm-up, then a half cosine down to ``final_ratio`` of the peak; constant after."""

    warmup_steps: int = 1000
    """Updates in which the learning rate rises."""
    total_steps: int | None = None
    """Update at which the cosine ends; null: trainer.max_steps."""
    final_ratio: float = 0.0
    """Share of the peak that is left at the end."""

    def __post_init__(self) -> None:
        check_fields(self, "scheduler")
        check_range(self, "scheduler", "warmup_steps", "final_ratio")
        if self.total_steps is not None and self.total_steps < 1:
            raise UserError(
                f"scheduler.total_steps: got {self.total_steps}, expected at least 1; give the number of updates of the whole run"
            )

    def __call__(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule of ``optimizer``, stepped at every update."""
        assert self.total_steps is not None, "a cosine without an end"
        warmup, decay = self.warmup_steps, max(1, self.total_steps - self.warmup_steps)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            progress = min(1.0, (step - warmup) / decay)
            return self.final_ratio + (1 - self.final_ratio) * 0.5 * (1 + math.cos(math.pi * progress))

        return LambdaLR(optimizer, factor)


@dataclass(frozen=True)
class Exponential:
    """``decay`` to the power of the update, after an optional linear warm-up."""

    decay: float = 0.9999996
    """BigVGAN's."""
    warmup_steps: int = 0
    """Updates in which the learning rate rises."""

    def __post_init__(self) -> None:
        check_fields(self, "scheduler")
        check_range(self, "scheduler", "warmup_steps")
        check_range(self, "scheduler", "decay", most=1, above=True)

    def __call__(self, optimizer: Optimizer) -> LambdaLR:
        """The schedule of ``optimizer``, stepped at every update."""
        return LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / max(1, self.warmup_steps)) * self.decay**step)


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
    return any(isinstance(module, nn.Dropout) and module.p > 0 for module in lm.modules())


def finish_training(lm: KalleLM) -> None:
    """Turn a trained model into one with the names of a weight folder, in place: the whole vocabulary, adapters in the weights."""
    expand_vocabulary(lm)
    merge_lora(lm)
