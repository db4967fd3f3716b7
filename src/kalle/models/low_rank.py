"""A model that differs from another in some weights and shares the rest, the other staying as it is."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Module = TypeVar("Module", bound=nn.Module)


class LowRankLinear(nn.Module):
    """``y = x W^T + b + scale * (x A^T) B^T`` (LoRA, Hu et al., arXiv 2106.09685), W (out, in) and b being those of ``base``.

    ``lora_a`` A is (r, in), ``lora_b`` B (out, r); W and b take no gradient. The product is never added to W: in half precision most of
    so small a change would be rounded away.
    """

    def __init__(self, base: nn.Linear, lora_a: Tensor, lora_b: Tensor, scale: float) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scale = base.in_features, base.out_features, scale
        self.weight = nn.Parameter(base.weight.detach(), requires_grad=False)
        self.bias = None if base.bias is None else nn.Parameter(base.bias.detach(), requires_grad=False)
        self.lora_a, self.lora_b = nn.Parameter(lora_a, requires_grad=False), nn.Parameter(lora_b, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out), in the dtype of ``x``."""
        inner = functional.linear(x, self.lora_a.to(x.dtype))
        return functional.linear(x, self.weight, self.bias) + self.scale * functional.linear(inner, self.lora_b.to(x.dtype))


def shared_copy(module: Module) -> Module:
    """Another ``module`` over the very same memory, whose weights take no gradient; replacing one there leaves ``module`` alone."""
    memo: dict[int, object] = {}
    for tensor in chain(module.parameters(), module.buffers()):
        memo[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False) if isinstance(tensor, nn.Parameter) else tensor
    return copy.deepcopy(module, memo)


def linear_layers(module: nn.Module, without: tuple[str, ...] = ()) -> dict[str, nn.Linear]:
    """Every ``nn.Linear`` inside ``module`` by name, but those whose name begins with one of ``without``."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Linear) and not name.startswith(tuple(without))}


def with_low_rank(module: Module, factors: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> Module:
    """``module`` with a ``LowRankLinear`` in place of each linear layer named in ``factors`` (A, B); ``module`` itself stays as it is."""
    view = shared_copy(module)
    for name, (lora_a, lora_b) in factors.items():
        parent, leaf = _parent(view, name)
        base = getattr(parent, leaf)
        # Memory of its own: a tensor that is mapped from a file may lie askew, which changes the last bit of a product.
        own_a, own_b = (factor.detach().to(base.weight.device, copy=True) for factor in (lora_a, lora_b))
        setattr(parent, leaf, LowRankLinear(base, own_a, own_b, scale))
    return view


def with_weights(module: Module, weights: Mapping[str, Tensor]) -> Module:
    """``module`` with ``weights``, by the names of its parameters, in place of its own; ``module`` itself stays as it is."""
    view = shared_copy(module)
    for name, weight in weights.items():
        parent, leaf = _parent(view, name)
        assert leaf in parent._parameters, f"no parameter {name}"
        setattr(parent, leaf, nn.Parameter(weight, requires_grad=False))
    return view


def new_factors(layers: Mapping[str, nn.Linear], rank: int, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of rank ``rank`` for each of ``layers``: A drawn with variance 1 / in from ``generator``, B zero: no change yet."""
    return {
        name: (
            torch.randn(rank, layer.in_features, generator=generator) * layer.in_features**-0.5,
            torch.zeros(layer.out_features, rank),
        )
        for name, layer in layers.items()
    }


def _parent(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return module.get_submodule(path), leaf
