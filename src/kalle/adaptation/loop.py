"""The few hundred steps of test-time training, on a model of its own over the memory of another."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from kalle.adaptation.material import PromptSequence, Reporter
from kalle.adaptation.options import AdaptOptions, schedule
from kalle.errors import UserError
from kalle.models.lm import KalleLM
from kalle.models.lora import linear_layers, low_rank_layers, new_factors, with_low_rank, with_weights
from kalle.synthesis.adapter import LORA_A, LORA_B, SPEAKER_PARTS, Adapter
from kalle.synthesis.seeds import derived_seed

TEXT_EMBEDDING = "backbone.embed_tokens.weight"


@dataclass(frozen=True)
class Learnt:
    """What a run gave: the adapter, and the loss of every step in nats per dimension."""

    adapter: Adapter
    losses: tuple[float, ...]
    seconds: float
    rounding: float
    """Norm of what storing the change lost, over the norm of the change; 0 for low-rank factors, which are stored as they are."""


def learn(
    lm: KalleLM,
    base: str,
    sequences: Sequence[PromptSequence],
    options: AdaptOptions,
    lr: float,
    report: Reporter | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Learnt:
    """Learn ``sequences``, one a step in turn, each with fresh noise; ``lm``, whose hash is ``base``, is not touched.

    The noise is a function of the seed. At least one step is made; none is begun once ``options.seconds`` have passed on ``clock``.
    UserError when a loss is not finite.
    """
    view, parameters = trainable(lm, options)
    losses, seconds = _steps(view, parameters, sequences, options, lr, report, clock)
    if options.mode == "lora":
        factors = {
            name: (parameters[name + LORA_A].detach().cpu(), parameters[name + LORA_B].detach().cpu())
            for name in (key.removesuffix(LORA_A) for key in parameters if key.endswith(LORA_A))
        }
        return Learnt(Adapter.of_factors(base, factors, options.scale), losses, seconds, 0.0)
    return _full(lm, base, parameters, losses, seconds)


def trainable(lm: KalleLM, options: AdaptOptions) -> tuple[KalleLM, dict[str, nn.Parameter]]:
    """A model over the memory of ``lm`` and, by name, those of its parameters that learn: factors, or fp32 copies of all weights."""
    if options.mode == "lora":
        layers = linear_layers(lm, SPEAKER_PARTS)
        generator = torch.Generator().manual_seed(derived_seed(f"kalle adapt factors {options.seed}"))
        view = with_low_rank(lm, new_factors(layers, options.rank, generator), options.scale)
        chosen: dict[str, nn.Parameter] = {}
        for name, layer in low_rank_layers(view):
            chosen |= {name + LORA_A: layer.lora_a, name + LORA_B: layer.lora_b}
    else:
        copies = {
            name: weight.detach().to(torch.float32, copy=True)
            for name, weight in lm.named_parameters()
            if not name.startswith(SPEAKER_PARTS)
        }
        view = with_weights(lm, copies)
        chosen = {name: weight for name, weight in view.named_parameters() if name in copies}
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return view.eval(), chosen


def _steps(
    view: KalleLM,
    parameters: Mapping[str, nn.Parameter],
    sequences: Sequence[PromptSequence],
    options: AdaptOptions,
    lr: float,
    report: Reporter | None,
    clock: Callable[[], float],
) -> tuple[tuple[float, ...], float]:
    optimizer = _optimizer(parameters, lr, options.weight_decay)
    scheduler = LambdaLR(optimizer, schedule(options.steps, options.warmup_steps))
    generator = torch.Generator().manual_seed(derived_seed(f"kalle adapt noise {options.seed}"))
    losses: list[float] = []
    started = clock()
    while len(losses) < options.steps and not _spent(losses, clock() - started, options.seconds):
        sequence = sequences[len(losses) % len(sequences)]
        noise = torch.randn(sequence.noise_shape, generator=generator)
        with torch.enable_grad():
            loss = sequence.loss(view, noise, options.direction)
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise UserError(f"the loss is {losses[-1]} at step {len(losses)}, expected a number; lower --lr (it was {lr:g})")
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
        optimizer.step()
        scheduler.step()
        if report is not None:
            report(len(losses), options.steps, losses[-1], clock() - started)
    return tuple(losses), clock() - started


def _spent(losses: Sequence[float], seconds: float, budget: float | None) -> bool:
    return bool(losses) and budget is not None and seconds >= budget


def _optimizer(parameters: Mapping[str, nn.Parameter], lr: float, weight_decay: float) -> AdamW:
    decayed = [parameter for name, parameter in parameters.items() if name != TEXT_EMBEDDING]
    left = [parameter for name, parameter in parameters.items() if name == TEXT_EMBEDDING]
    groups = [{"params": decayed, "weight_decay": weight_decay}, *([{"params": left, "weight_decay": 0.0}] if left else [])]
    return AdamW(groups, lr=lr)


def _full(lm: KalleLM, base: str, parameters: Mapping[str, nn.Parameter], losses: tuple[float, ...], seconds: float) -> Learnt:
    before = dict(lm.named_parameters())
    changes = {name: (value.detach() - before[name].detach().float()).cpu() for name, value in parameters.items()}
    adapter = Adapter.of_changes(base, changes)
    lost = made = 0.0
    for name, change in changes.items():
        kept = adapter.change(name, change) if name in adapter.exponents else torch.zeros_like(change)
        lost, made = lost + _power(kept - change), made + _power(change)
    return Learnt(adapter, losses, seconds, math.sqrt(lost / made) if made else 0.0)


def _power(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())
