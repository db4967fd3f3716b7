"""Low-rank adapters that train in a language model (LoRA, arXiv 2106.09685)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kalle.checkpoint import check_fields
from kalle.errors import UserError
from kalle.models.low_rank import linear_layers, low_rank_layers, new_factors, put_low_rank, replace

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM

FACTORS = (".lora_a", ".lora_b")
"""How the names of the factors' parameters end."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of the backbone."""


@dataclass(frozen=True)
class LoRAConfig:
    """``W x + (alpha / rank) B A x`` in place of ``W x``, with A (rank, in) random and B (out, rank) zero at the start."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """Of the input of A, in training."""
    targets: tuple[str, ...] = PROJECTIONS
    """Linear layers that get an adapter, by the last part of their name or the whole of it; ``*`` and ``?`` are wildcards."""
    also_train: tuple[str, ...] = ()
    """Parameters that train in full beside the adapters, as patterns of whole names, such as ``audio_linear.*``."""

    def __post_init__(self) -> None:
        check_fields(self, "lora")
        object.__setattr__(self, "targets", tuple(self.targets))
        object.__setattr__(self, "also_train", tuple(self.also_train))
        if self.rank < 1 or not self.targets:
            raise UserError(
                f"lora: got rank={self.rank}, targets={list(self.targets)}, expected a rank of 1 or more and a target; correct it"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: got {self.dropout}, expected at least 0 and less than 1; correct it")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def add_lora(lm: KalleLM, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
    """Put adapters into ``lm``, in place; afterwards only they and ``config.also_train`` require gradients.

    The output is unchanged until they are trained. A is drawn from ``generator`` (CPU), or from torch's own. A pattern that fits
    nothing, or a model that has adapters already, is a UserError.
    """
    if any(True for _ in low_rank_layers(lm)):
        raise UserError("this language model has adapters already; merge_lora or remove_lora first")
    also = matching_parameters(lm, config.also_train, "lora.also_train")
    put_low_rank(lm, new_factors(target_layers(lm, config.targets), config.rank, generator), config.scale, config.dropout)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(name.endswith(FACTORS) or name in also)


def lora_factors(lm: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """A (rank, in) and B (out, rank) of every adapter in ``lm``, by the name of its layer; they share the model's memory."""
    return {name: (layer.lora_a.detach(), layer.lora_b.detach()) for name, layer in low_rank_layers(lm)}


def also_trained(lm: nn.Module, config: LoRAConfig) -> dict[str, Tensor]:
    """What ``config.also_train`` names, buffers such as statistics of a batch norm among it; the tensors share the model's memory."""
    fitting = {name: tensor for name, tensor in lm.state_dict().items() if _fits_any(name, config.also_train)}
    return {name: tensor for name, tensor in fitting.items() if not name.endswith(FACTORS)}


def merge_lora(lm: KalleLM) -> None:
    """Add the adapters to the weights and take them out, in place: the output stays the same up to rounding."""
    for name, layer in list(low_rank_layers(lm)):
        replace(lm, name, layer.merged())


def remove_lora(lm: KalleLM) -> None:
    """Take the adapters out, in place: the weights below them are exactly those from before ``add_lora``.

    What ``also_train`` named keeps its trained values, and parameters keep their ``requires_grad``.
    """
    for name, layer in list(low_rank_layers(lm)):
        replace(lm, name, layer.bare())


def matching_parameters(lm: nn.Module, patterns: Sequence[str], key: str) -> set[str]:
    """Names of the parameters that fit one of ``patterns`` (wildcards ``*``, ``?``, ``[…]``).

    A pattern that fits no parameter is a UserError; ``key`` is what it is called in the configuration.
    """
    names = [name for name, _ in lm.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise UserError(
                f"{key}: no parameter fits {pattern!r}; names begin with {', '.join(parts)}, "
                f"such as '{names[len(names) // 2]}'; wildcards are * and ?"
            )
    return {name for name in names if _fits_any(name, patterns)}


def target_layers(lm: nn.Module, targets: Sequence[str]) -> dict[str, nn.Linear]:
    """The linear layers that ``targets`` mean (`LoRAConfig.targets`), by name; a UserError for one that fits none."""
    layers = linear_layers(lm)
    chosen: set[str] = set()
    for target in targets:
        fitting = [name for name in layers if fnmatchcase(name, target) or fnmatchcase(name.rpartition(".")[2], target)]
        if not fitting:
            valid = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(f"lora.targets: no linear layer is named {target!r}; valid names: {valid}")
        chosen.update(fitting)
    return {name: layers[name] for name in sorted(chosen)}


def _fits_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
