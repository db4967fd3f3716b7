from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kalle.audio import write_audio
from kalle.serving.handlers import Handlers
from kalle.serving.sessions import Backend
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule


@pytest.fixture(scope="session")
def kalle_toy(toy_weights: Path) -> Kalle:
    """Untrained weights without a speaker encoder, with a stop rule that never stops: lengths are what the cap says."""
    kalle = Kalle.from_pretrained(toy_weights, "cpu")
    kalle.config = replace(kalle.config, stop=StopRule(threshold=0.0))
    return kalle


@pytest.fixture
def backend(kalle_toy: Kalle, tmp_path: Path) -> Iterator[Backend]:
    with Backend(kalle_toy, tmp_path / "voices", max_text=200) as made:
        yield made


@pytest.fixture
def handlers(backend: Backend) -> Handlers:
    return Handlers(backend)


@pytest.fixture
def recording(tmp_path: Path) -> str:
    write_audio(tmp_path / "me.wav", 0.3 * np.sin(2 * np.pi * 220 * np.arange(24000) / 16000), 16000)
    return str(tmp_path / "me.wav")
