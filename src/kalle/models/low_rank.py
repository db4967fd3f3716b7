"""Low-rank factors beside linear layers, and models that differ from another in some weights and share the rest."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

Module = TypeVar("Module", bound=nn.Module)


class LowRankLinear(nn.Module):
    """``y = x W^T + b + scale * (dropout(x) A^T) B^T`` (LoRA, Hu et al., arXiv 2106.09685), W (out, in) and b being those of ``base``.

    ``lora_a`` A is (r, in), ``lora_b`` B (out, r); W and b keep their names and memory, and take no gradient until they are told to. The
    product is not added to W unless ``merged`` is asked for: in half precision most of so small a change would be rounded away.
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
