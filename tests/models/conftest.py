from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kalle.checkpoint import load_strict
from kalle.convert.release_format import flowvae_config, flowvae_names, lm_config, lm_names
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM

REFERENCE = Path(__file__).parents[1] / "reference"


@pytest.fixture(scope="session")
def golden_io() -> Callable[[str], dict[str, Tensor]]:
    return lambda name: load_file(REFERENCE / f"{name}_io.safetensors")


@pytest.fixture(scope="session")
def released_shapes() -> dict[str, dict[str, list[int]]]:
    """Released file -> tensor name -> shape."""
    return json.loads((REFERENCE / "released_tensors.json").read_text())


@pytest.fixture(scope="session")
def golden_flowvae() -> FlowVAE:
    config = flowvae_config(json.loads((REFERENCE / "flowvae_tiny.json").read_text()), "flowvae_tiny.json")
    released = torch.load(REFERENCE / "flowvae_tiny.pt", weights_only=True)["generator"]
    flowvae = FlowVAE(config)
    names = flowvae_names(released, len(config.encoder.strides), len(config.decoder.block_kernel_sizes))
    load_strict(flowvae, {ours: released[theirs] for theirs, ours in names.items()}, "flowvae_tiny")
    return flowvae.eval().requires_grad_(False)


def _golden_lm(name: str) -> KalleLM:
    released = torch.load(REFERENCE / f"{name}.pt", weights_only=True)
    lm = KalleLM(lm_config(json.loads((REFERENCE / "lm_tiny.json").read_text()), released, name))
    load_strict(lm, {ours: released[theirs] for theirs, ours in lm_names(released).items()}, name)
    return lm.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def golden_lm() -> KalleLM:
    return _golden_lm("lm_tiny")


@pytest.fixture(scope="session")
def golden_lm_speaker() -> KalleLM:
    return _golden_lm("lm_speaker_tiny")
