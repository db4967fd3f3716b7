"""Metrics behind one interface, and the three things they score: reconstructions, synthesis, a folder of wavs."""

from kalle.evaluation.metric import Metric, MetricError, ScoreItem
from kalle.evaluation.reconstruction import evaluate_reconstruction
from kalle.evaluation.result import Result, Settings
from kalle.evaluation.speaking import SpeakingConfig, evaluate_synthesis
from kalle.evaluation.wavs import evaluate_wavs

__all__ = [
    "Metric",
    "MetricError",
    "Result",
    "ScoreItem",
    "Settings",
    "SpeakingConfig",
    "evaluate_reconstruction",
    "evaluate_synthesis",
    "evaluate_wavs",
]
