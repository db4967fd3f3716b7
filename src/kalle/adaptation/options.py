"""How one voice is learnt at test time."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from kalle.checkpoint import check_fields
from kalle.errors import UserError
from kalle.losses.latent import Direction
from kalle.synthesis.seeds import check_seed

Mode = Literal["lora", "full"]
DEFAULT_STEPS = 200
"""The paper's N: there the error rate is lowest, while similarity goes on rising."""
DEFAULT_RANK = 8
WARMUP_SHARE = 0.2
"""Share of the steps; the authors' scripts have the same."""
PAPER_WIDTH, PAPER_LR = 2048, 1e-6
NANO_WIDTH = 256
NANO_FULL_LR, NANO_LORA_LR = 1e-4, 3e-4


@dataclass(frozen=True)
class AdaptOptions:
    """Adam with decoupled weight decay, batches of one utterance, warm-up and a cosine to zero (KALL-E paper, test-time training).

    A UserError for a value that makes no sense.
    """

    mode: Mode = "lora"
    """"lora": low-rank factors beside every linear layer; "full": all weights, as in the paper. The speaker encoder is frozen in both."""
    rank: int = DEFAULT_RANK
    """Of the factors; "lora" only."""
    alpha: float | None = None
    """The product of the factors is scaled by alpha / rank; None is 2 * rank."""
    steps: int = DEFAULT_STEPS
    lr: float | None = None
    """Peak learning rate; None is ``default_lr``."""
    weight_decay: float = 0.01
    """Decoupled, as in AdamW, and not for the text embedding: Adam's own would move every row of it that no text has used."""
    warmup_share: float = WARMUP_SHARE
    """Share of the steps in which the learning rate rises."""
    seconds: float | None = None
    """Wall time after which no further step is begun."""
    direction: Direction = "prediction_posterior"
    """Of the KL divergence, as in training."""
    seed: int = 0
    """Of the noise of every step, the start of the factors, and the one draw of the voice's prompt."""

    def __post_init__(self) -> None:
        check_fields(self, "adapt")
        check_seed(self.seed)
        _positive("steps", self.steps)
        _positive("rank", self.rank)
        for name, value in (("learning rate", self.lr), ("seconds", self.seconds), ("alpha", self.alpha)):
            if value is not None:
                _positive(name, value)
        if not 0 <= self.weight_decay < float("inf"):
            raise UserError(f"bad weight decay: got {self.weight_decay}, expected 0 or more; change it")
        if not 0 <= self.warmup_share <= 1:
            raise UserError(f"bad warm-up: got a share of {self.warmup_share}, expected 0 to 1; change it")

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return (2.0 * self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def warmup_steps(self) -> int:
        """Steps in which the learning rate rises."""
        return round(self.warmup_share * self.steps)


def default_lr(mode: Mode, width: int) -> float:
    """The peak learning rate for a language model of this hidden size.

    "full": the paper's 1e-6 at 2048 and above; at 256 and below what was measured there (docs/how-to/adapt.md); a power of width between
    the two. "lora": measured at 256, and as many times that of "full" elsewhere, which nobody has measured.
    """
    power = math.log(NANO_FULL_LR / PAPER_LR) / math.log(PAPER_WIDTH / NANO_WIDTH)
    full = PAPER_LR * (PAPER_WIDTH / min(max(width, NANO_WIDTH), PAPER_WIDTH)) ** power
    return full if mode == "full" else full * NANO_LORA_LR / NANO_FULL_LR


def schedule(steps: int, warmup_steps: int) -> Callable[[int], float]:
    """Factor of the learning rate at step 0 to ``steps`` - 1: a linear rise to 1 over ``warmup_steps``, then a half cosine.

    It would be 0 at ``steps`` and stays so. (The authors' own, a cosine of 0.6 times the steps, rises again after its end.)
    """

    def factor(step: int) -> float:
        if step >= steps:
            return 0.0
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))

    return factor


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise UserError(f"bad {name}: got {value!r}, expected more than 0; change it")
