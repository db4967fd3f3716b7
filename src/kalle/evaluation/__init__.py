"""Metrics behind one interface, and the three things they score: reconstructions, synthesis, a folder of wavs."""

from kalle.evaluation.metrics import Metric, MetricError, ScoreItem
from kalle.evaluation.protocols import SpeakingConfig, evaluate_reconstruction, evaluate_synthesis, evaluate_wavs
from kalle.evaluation.report import Result, Settings

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
