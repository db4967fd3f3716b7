from __future__ import annotations

from pathlib import Path

import pytest
import torch
from adapt_tools import RATE_HZ, sweep

from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.synthesis.kalle import Kalle
from kalle.text.tokenizer import Tokenizer


@pytest.fixture
def kalle(toy_flowvae_config: FlowVAEConfig, toy_lm_config: KalleLMConfig) -> Kalle:
    """A model of four dimensions with weights of its own for each test."""
    torch.manual_seed(0)
    return Kalle(FlowVAE(toy_flowvae_config).eval(), KalleLM(toy_lm_config).eval(), Tokenizer.bytes())


@pytest.fixture
def state(kalle: Kalle) -> dict[str, torch.Tensor]:
    """The weights of ``kalle`` as they were, copied."""
    return {name: tensor.clone() for name, tensor in kalle.lm.state_dict().items()}


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    from kalle.audio import write_audio

    path = tmp_path / "ref.wav"
    write_audio(path, sweep(), RATE_HZ)
    return path


@pytest.fixture
def kalle_with_speaker(toy_flowvae_config: FlowVAEConfig, toy_lm_config: KalleLMConfig) -> Kalle:
    """The same with a speaker encoder."""
    import dataclasses

    from kalle.models.speaker import SpeakerEncoderConfig

    torch.manual_seed(0)
    config = dataclasses.replace(toy_lm_config, speaker=SpeakerEncoderConfig(channels=16, embedding_dim=64))
    return Kalle(FlowVAE(toy_flowvae_config).eval(), KalleLM(config).eval(), Tokenizer.bytes())
