"""Metrics behind one interface, the protocols that they score, ``evaluate(config)`` that runs one, and ``compare`` of what it wrote."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalle.evaluation.comparison import Comparison, compare, gate
    from kalle.evaluation.metrics import Metric, MetricError, ScoreItem
    from kalle.evaluation.protocols import SpeakingConfig, evaluate_reconstruction, evaluate_synthesis, evaluate_wavs
    from kalle.evaluation.report import Result, Settings
    from kalle.evaluation.run import EvaluateConfig, ReconstructionConfig, evaluate, standard_metrics
    from kalle.evaluation.test_list import TestListConfig

__all__ = [
    "Comparison",
    "EvaluateConfig",
    "Metric",
    "MetricError",
    "ReconstructionConfig",
    "Result",
    "ScoreItem",
    "Settings",
    "SpeakingConfig",
    "TestListConfig",
    "compare",
    "evaluate",
    "evaluate_reconstruction",
    "evaluate_synthesis",
    "evaluate_wavs",
    "gate",
    "standard_metrics",
]

_HOMES = {
    "comparison": ("Comparison", "compare", "gate"),
    "metrics": ("Metric", "MetricError", "ScoreItem"),
    "protocols": ("SpeakingConfig", "evaluate_reconstruction", "evaluate_synthesis", "evaluate_wavs"),
    "report": ("Result", "Settings"),
    "run": ("EvaluateConfig", "ReconstructionConfig", "evaluate", "standard_metrics"),
    "test_list": ("TestListConfig",),
}


def __getattr__(name: str) -> Any:
    """Import a public name at its first use: ``compare`` needs numpy alone, and shall not wait for torch."""
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'kalle.evaluation' has no attribute {name!r}")
    value = getattr(import_module(f"kalle.evaluation.{home}"), name)
    globals()[name] = value
    return value
