"""Low-rank adapters in a language model (LoRA, arXiv 2106.09685), through peft, which is imported when one is added."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kalle.checkpoint import check_fields, dataclass_from_dict, read_json, read_tensors, require_fit, write_json, write_tensors
from kalle.errors import UserError

if TYPE_CHECKING:
    from kalle.models.lm import KalleLM

ADAPTER_WEIGHTS = "adapter.safetensors"
ADAPTER_CONFIG = "adapter.json"
_ADAPTER = "default"
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

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def add_lora(lm: KalleLM, config: LoRAConfig, generator: torch.Generator | None = None) -> None:
    """Put adapters into ``lm``, in place; afterwards only they and ``config.also_train`` require gradients.

    The output is unchanged until they are trained. A is drawn from ``generator`` (CPU), or from torch's own. A pattern that fits
    nothing, or a model that has adapters already, is a UserError.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise UserError("lora needs the package peft, which is not installed; pip install 'kalle-tts[train]'") from None
    if any(True for _ in lora_layers(lm)):
        raise UserError("this language model has adapters already; merge_lora or remove_lora first")
    also = matching_parameters(lm, config.also_train, "lora.also_train")
    settings: dict[str, Any] = {"r": config.rank, "lora_alpha": config.alpha, "lora_dropout": config.dropout}
    inject_adapter_in_model(LoraConfig(**settings, target_modules=_targets(lm, config.targets)), lm, _ADAPTER)
    del lm.peft_config  # peft would take a later, other adapter for a second one
    for _, layer in lora_layers(lm):
        down = layer.lora_A[_ADAPTER].weight
        start = torch.empty(down.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            down.copy_(start)
    for name, parameter in lm.named_parameters():
        parameter.requires_grad_(_is_adapter(name) or _plain(name) in also)


def lora_layers(lm: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and peft layer of every adapter in ``lm``; none in a model without."""
    for name, module in lm.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "base_layer"):
            yield name, module


def lora_state(lm: KalleLM, also_train: Sequence[str] = ()) -> dict[str, Tensor]:
    """The adapters' tensors ``NAME.lora_A.weight`` (rank, in) and ``NAME.lora_B.weight`` (out, rank), and what ``also_train`` names.

    The tensors share the model's memory. Buffers that ``also_train`` fits, such as statistics of a batch norm, are among them.
    """
    state = {_plain(name): tensor for name, tensor in lm.state_dict().items() if _is_adapter(name)}
    assert state, "lora_state of a model without adapters"
    state.update({_plain(name): tensor for name, tensor in lm.state_dict().items() if _fits_any(_plain(name), also_train)})
    return state


def load_lora(lm: KalleLM, tensors: Mapping[str, Tensor], source: str | Path, also_train: Sequence[str] = ()) -> None:
    """Copy the tensors of ``lora_state`` into a model with the same adapters; a UserError lists those that do not fit."""
    own = lora_state(lm, also_train)
    require_fit(own, tensors, source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def merge_lora(lm: KalleLM) -> None:
    """Add the adapters to the weights and take them out, in place: the output stays the same up to rounding."""
    for name, layer in list(lora_layers(lm)):
        layer.merge()
        _replace(lm, name, layer.get_base_layer())


def remove_lora(lm: KalleLM) -> None:
    """Take the adapters out, in place: the weights below them are exactly those from before ``add_lora``.

    What ``also_train`` named keeps its trained values, and parameters keep their ``requires_grad``.
    """
    for name, layer in list(lora_layers(lm)):
        assert not layer.merged, f"the adapter of {name} is merged"
        _replace(lm, name, layer.get_base_layer())


def save_adapter(lm: KalleLM, config: LoRAConfig, folder: str | Path, base_hash: str | None = None) -> None:
    """Write ``folder``/adapter.safetensors and adapter.json; ``base_hash`` is ``weights_hash`` of the model without adapters."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu() for name, tensor in lora_state(lm, config.also_train).items()}
    write_tensors(root / ADAPTER_WEIGHTS, tensors)
    write_json(root / ADAPTER_CONFIG, {**config.to_dict(), "base_hash": base_hash})


def load_adapter(lm: KalleLM, folder: str | Path, base_hash: str | None = None) -> LoRAConfig:
    """Add the adapters that ``save_adapter`` wrote to ``lm``, in place, and return their configuration.

    With ``base_hash``, the ``weights_hash`` of ``lm``, an adapter that was trained over other weights is a UserError.
    """
    root = Path(folder)
    values = read_json(root / ADAPTER_CONFIG)
    wanted = values.pop("base_hash", None)
    if base_hash is not None and wanted is not None and wanted != base_hash:
        raise UserError(
            f"the adapter in '{root}' belongs to other weights: it expects {wanted[:12]}, got {base_hash[:12]}; "
            "give the language model it was trained over"
        )
    config = dataclass_from_dict(LoRAConfig, values, root / ADAPTER_CONFIG)
    tensors = read_tensors(root / ADAPTER_WEIGHTS)
    add_lora(lm, config, torch.Generator().manual_seed(0))
    try:
        load_lora(lm, tensors, root, config.also_train)
    except UserError:
        remove_lora(lm)
        raise
    return config


def matching_parameters(lm: nn.Module, patterns: Sequence[str], key: str) -> set[str]:
    """Names of the parameters that fit one of ``patterns`` (wildcards ``*``, ``?``, ``[…]``), adapters' own additions to names left out.

    A pattern that fits no parameter is a UserError; ``key`` is what it is called in the configuration.
    """
    names = [_plain(name) for name, _ in lm.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            parts = sorted({name.split(".")[0] for name in names})
            raise UserError(
                f"{key}: no parameter fits {pattern!r}; names begin with {', '.join(parts)}, "
                f"such as '{names[len(names) // 2]}'; wildcards are * and ?"
            )
    return {name for name in names if _fits_any(name, patterns)}


def _targets(lm: nn.Module, targets: Sequence[str]) -> list[str]:
    layers = [name for name, module in lm.named_modules() if isinstance(module, nn.Linear)]
    chosen = []
    for target in targets:
        fitting = [name for name in layers if fnmatchcase(name, target) or fnmatchcase(name.rpartition(".")[2], target)]
        if not fitting:
            valid = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
            raise UserError(f"lora.targets: no linear layer is named {target!r}; valid names: {valid}")
        chosen += fitting
    return sorted(set(chosen))


def _fits_any(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _is_adapter(name: str) -> bool:
    return f".{_ADAPTER}." in name and (".lora_A." in name or ".lora_B." in name)


def _plain(name: str) -> str:
    """The name of a tensor without what peft adds to it."""
    return name.replace(f".{_ADAPTER}.", ".").replace(".base_layer.", ".")


def _replace(root: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(root.get_submodule(parent), child, module)
