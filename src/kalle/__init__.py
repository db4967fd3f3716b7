"""KALL-E: text to speech by autoregressive prediction of the next distribution (arXiv 2412.16846)."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kalle.gaussian import DiagGaussian
    from kalle.models.flowvae import FlowVAE
    from kalle.models.lm import KalleLM
    from kalle.synthesis.adapter import Adapter
    from kalle.synthesis.kalle import Kalle
    from kalle.synthesis.voice import Voice

__all__ = ["Adapter", "DiagGaussian", "FlowVAE", "Kalle", "KalleLM", "Voice", "adapt"]

_HOMES = {
    "Adapter": "kalle.synthesis.adapter",
    "DiagGaussian": "kalle.gaussian",
    "FlowVAE": "kalle.models.flowvae",
    "Kalle": "kalle.synthesis.kalle",
    "KalleLM": "kalle.models.lm",
    "Voice": "kalle.synthesis.voice",
    "adapt": "kalle.adaptation.adapt",
}

try:
    __version__ = version("kalle-tts")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    """Import a public name at its first use, so that ``import kalle`` itself stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kalle' has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
