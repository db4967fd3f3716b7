"""Metrics behind one interface, the three protocols that they score, and ``evaluate(config)`` that runs one of them."""

from kalle.evaluation.metrics import Metric, MetricError, ScoreItem
from kalle.evaluation.protocols import SpeakingConfig, evaluate_reconstruction, evaluate_synthesis, evaluate_wavs
from kalle.evaluation.report import Result, Settings
from kalle.evaluation.run import EvaluateConfig, ReconstructionConfig, evaluate, standard_metrics
from kalle.evaluation.test_list import TestListConfig

__all__ = [
    "EvaluateConfig",
    "Metric",
    "MetricError",
    "ReconstructionConfig",
    "Result",
    "ScoreItem",
    "Settings",
    "SpeakingConfig",
    "TestListConfig",
    "evaluate",
    "evaluate_reconstruction",
    "evaluate_synthesis",
    "evaluate_wavs",
    "standard_metrics",
]
