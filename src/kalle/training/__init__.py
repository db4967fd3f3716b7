"""Training as a library: `train_flowvae` and `train_lm` on plain dataclasses. `kalle train` and Hydra only fill them.

::

    from kalle.training import FlowVAEDataConfig, FlowVAETrainingConfig, TrainerConfig, train_flowvae

    config = FlowVAETrainingConfig(out="run", data=FlowVAEDataConfig(corpus="corpus"), trainer=TrainerConfig(max_steps=1000))
    result = train_flowvae(config)
    result.weights, result.metrics
"""

from kalle.training.config import (
    EMAConfig,
    FlowVAECallbacks,
    FlowVAEDataConfig,
    FlowVAETrainingConfig,
    LMCallbacks,
    LMDataConfig,
    LMTrainingConfig,
    TokenizerConfig,
    TrainerConfig,
    WeightsFolder,
)
from kalle.training.flowvae import ClipSchedule, FlowVAEObjective
from kalle.training.lm import LMObjective
from kalle.training.optimisation import AdamWConfig, Exponential, WarmupCosine
from kalle.training.plan import Plan
from kalle.training.session import TrainingResult
from kalle.training.train import plan_flowvae, plan_lm, train_flowvae, train_lm

__all__ = [
    "AdamWConfig",
    "ClipSchedule",
    "EMAConfig",
    "Exponential",
    "FlowVAECallbacks",
    "FlowVAEDataConfig",
    "FlowVAEObjective",
    "FlowVAETrainingConfig",
    "LMCallbacks",
    "LMDataConfig",
    "LMObjective",
    "LMTrainingConfig",
    "Plan",
    "TokenizerConfig",
    "TrainerConfig",
    "TrainingResult",
    "WarmupCosine",
    "WeightsFolder",
    "plan_flowvae",
    "plan_lm",
    "train_flowvae",
    "train_lm",
]
