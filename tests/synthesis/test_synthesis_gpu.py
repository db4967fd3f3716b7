from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from kalle.synthesis import StopRule, generate
from kalle.synthesis.kalle import Kalle

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_frames_equal_the_release_on_cuda(lm_tiny, io) -> None:
    golden = io("lm_tiny")
    lm = copy.deepcopy(lm_tiny).cuda()
    frames = list(
        generate(lm, golden["input_ids"], golden["prompt_latents"], noise=golden["noise"].reshape(24, 8), stop=None, max_frames=23)
    )
    means = torch.stack([frame.distribution.mean for frame in frames], dim=1).cpu()
    torch.testing.assert_close(means, golden["distributions_prompted"][0, :8], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_folder_speaks_on_cuda_with_the_noise_of_the_cpu(weight_folder, dtype: str) -> None:
    options = {"seed": 3, "max_seconds": 0.48, "stop": StopRule(threshold=0.0)}
    spoken = Kalle.from_pretrained(weight_folder, "cuda", dtype).synthesize("Hello.", **options)
    reference = Kalle.from_pretrained(weight_folder, "cpu").synthesize("Hello.", **options)
    assert spoken.frames == reference.frames == 6
    np.testing.assert_allclose(spoken.latents, reference.latents, atol=1e-3 if dtype == "float32" else 0.2)
    assert np.isfinite(spoken.audio).all()
