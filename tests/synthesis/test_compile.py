"""A compiled model speaks as the plain one does."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kalle.synthesis.kalle import Kalle


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_layers_speak_the_same(weight_folder: Path) -> None:
    plain, compiled = (Kalle.from_pretrained(weight_folder, "cpu", compile=compile) for compile in (False, True))
    expected = plain.synthesize("Lift the box.", seed=3, max_seconds=0.4, retries=0).audio
    np.testing.assert_allclose(compiled.synthesize("Lift the box.", seed=3, max_seconds=0.4, retries=0).audio, expected, atol=1e-3)
