"""Low-rank factors beside linear layers, models that share the weights of another, and which weights a training changes."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from kalle.checkpoint import check_fields, check_range
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM

Module = TypeVar("Module", bound=nn.Module)


class LowRankLinear(nn.Module):
    """``y = x W^T + b + scale * (dropout(x) A^T) B^T`` (LoRA, Hu et al., arXiv 2106.09685), W (out, in) and b being those of ``base``.

    ``lora_a`` A is (r, in), ``lora_b`` B (out, r); W and b keep their names and memory, and take no gradient until they are told to. The
    product is not added to W unless ``merged`` is set: in half precision most of so small a change would be rounded away.
    """

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, scale
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        self.lora_a, self.lora_b = nn.Parameter(lora_a, requires_grad=False), nn.Parameter(lora_b, requires_grad=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of ``x``."""
        inner = functional.linear(self.dropout(x), self.lora_a.to(x.dtype))
        return functional.linear(x, self.weight, self.bias) + self.scale * functional.linear(inner, self.lora_b.to(x.dtype))

    def bare(self) -> nn.Linear:
        """The layer without the factors, over the same memory."""
        layer = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        layer.weight, layer.bias = self.weight, self.bias
        return layer

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The layer with the product of the factors added to its weight, in place."""
        self.weight.add_((self.scale * (self.lora_b @ self.lora_a)).to(self.weight.dtype))
        return self.bare()


def shared_copy(module: Module) -> Module:
    """Another ``module`` over the very same memory, whose weights take no gradient; replacing one there leaves ``module`` alone."""
    memo: dict[int, object] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor
    return copy.deepcopy(module, memo)


def linear_layers(module: nn.Module, without: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` inside ``module`` by name, but those whose name begins with one of ``without``."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and not name.startswith(tuple(without))}


def low_rank_layers(module: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """Name and layer of every ``LowRankLinear`` inside ``module``; none in a model without."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LowRankLinear))


def put_low_rank(module: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float, dropout: float = 0.0) -> None:
    """Put a ``LowRankLinear`` in place of each linear layer of ``module`` named in ``factors`` (A, B)."""
    for name, (lora_a, lora_b) in factors.items():
        base = module.get_submodule(name)
        assert isinstance(base, nn.Linear), name
        # Memory of its own: a tensor that is mapped from a file may lie askew, which changes the last bit of a product.
        own_a, own_b = (factor.detach().to(base.weight.device, copy=True) for factor in (lora_a, lora_b))
        replace(module, name, LowRankLinear(base, own_a, own_b, scale, dropout))


def with_low_rank(module: Module, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Module:
    """A model over the memory of ``module`` that has the ``factors`` of ``put_low_rank``; ``module`` itself stays as it is."""
    view = shared_copy(module)
    put_low_rank(view, factors, scale)
    return view


def with_weights(module: Module, weights: Mapping[str, Tensor]) -> Module:
    """``module`` with ``weights``, by the names of its parameters and buffers, in place of its own; ``module`` itself stays as it is."""
    view = shared_copy(module)
    for name, weight in weights.items():
        path, _, leaf = name.rpartition(".")
        parent = view.get_submodule(path)
        assert leaf in parent._parameters or leaf in parent._buffers, f"no parameter {name}"
        setattr(parent, leaf, nn.Parameter(weight, requires_grad=False) if leaf in parent._parameters else weight)
    return view


def new_factors(layers: Mapping[str, nn.Linear], rank: int, generator: torch.Generator | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of rank ``rank`` for each of ``layers``: A drawn with variance 1 / in, B zero: no change yet.

    ``generator`` is one of the CPU, by default torch's own.
    """
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5,
            torch.zeros(layer.out_features, rank),
        )
        for name, layer in layers.items()
    }


def replace(root: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` where ``root`` has the module of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


FACTORS = (".lora_a", ".lora_b")
"""How the names of the factors' parameters end."""
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of the backbone."""


@dataclass(frozen=True)
class LoRAConfig:
    """``W x + (alpha / rank) B A x`` in place of ``W x``, with A (rank, in) random and B (out, rank) zero at the start."""

    rank: int = 16
    """Rank of B A."""
    alpha: float = 32.0
    """Scale of B A, times the rank."""
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
        check_range(self, "lora", "alpha", above=True)
        if not 0 <= self.dropout < 1:
            raise UserError(f"lora.dropout: got {self.dropout}, expected at least 0 and less than 1; correct it")

    @property
    def scale(self) -> float:
        """Multiplies the product of the factors."""
        return self.alpha / self.rank

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in config.json."""
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
    """Tensors that ``config.also_train`` names, with buffers such as statistics; the tensors share the model's memory."""
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
