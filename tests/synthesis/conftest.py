from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kalle.checkpoint import load_strict, write_json
from kalle.convert.release_format import flowvae_names, lm_names
from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowConfig, FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.speaker import SpeakerEncoderConfig
from kalle.synthesis.kalle import Kalle
from kalle.text.tokenizer import Tokenizer

REFERENCE = Path(__file__).parents[1] / "reference"
BACKBONE = json.loads((REFERENCE / "lm_tiny.json").read_text())
SPEAKER = SpeakerEncoderConfig(channels=16, embedding_dim=64)
LATENT_DIM = 8


def tiny_flowvae_config() -> FlowVAEConfig:
    released = json.loads((REFERENCE / "flowvae_tiny.json").read_text())
    return FlowVAEConfig(
        latent_dim=released["latent_dim"],
        encoder=EncoderConfig(channels=released["downsample_channels"], strides=released["downsample_rates"]),
        flow=FlowConfig(hidden_channels=released["flow_hidden_channels"]),
        decoder=BigVGANConfig(initial_channels=released["upsample_initial_channel"]),
    )


def golden_lm(name: str, speaker: SpeakerEncoderConfig | None) -> KalleLM:
    released = torch.load(REFERENCE / f"{name}.pt", weights_only=True)
    lm = KalleLM(KalleLMConfig(backbone=BACKBONE, latent_dim=LATENT_DIM, speaker=speaker))
    load_strict(lm, {ours: released[theirs] for theirs, ours in lm_names(released).items()}, name)
    return lm.eval()


@pytest.fixture
def io() -> Callable[[str], dict[str, Tensor]]:
    return lambda name: load_file(REFERENCE / f"{name}_io.safetensors")


@pytest.fixture(scope="session")
def lm_tiny() -> KalleLM:
    return golden_lm("lm_tiny", None)


@pytest.fixture(scope="session")
def lm_speaker_tiny() -> KalleLM:
    return golden_lm("lm_speaker_tiny", SPEAKER)


@pytest.fixture(scope="session")
def flowvae_tiny() -> FlowVAE:
    config = tiny_flowvae_config()
    released = torch.load(REFERENCE / "flowvae_tiny.pt", weights_only=True)["generator"]
    flowvae = FlowVAE(config)
    names = flowvae_names(released, len(config.encoder.strides), len(config.decoder.block_kernel_sizes))
    load_strict(flowvae, {ours: released[theirs] for theirs, ours in names.items()}, "flowvae_tiny")
    return flowvae.eval()


@pytest.fixture(scope="session")
def kalle_tiny(flowvae_tiny: FlowVAE, lm_tiny: KalleLM) -> Kalle:
    return Kalle(flowvae_tiny, lm_tiny, Tokenizer.bytes())


@pytest.fixture(scope="session")
def kalle_speaker(flowvae_tiny: FlowVAE, lm_speaker_tiny: KalleLM) -> Kalle:
    return Kalle(flowvae_tiny, lm_speaker_tiny, Tokenizer.bytes())


@pytest.fixture
def weight_folder(tmp_path: Path, kalle_tiny: Kalle) -> Path:
    """A whole weight folder with the golden weights and the bytes tokenizer."""
    folder = tmp_path / "tiny"
    kalle_tiny.flowvae.save_pretrained(folder)
    kalle_tiny.lm.save_pretrained(folder)
    kalle_tiny.tokenizer.save(folder / "tokenizer")
    write_json(folder / "config.json", {"format_version": 1, "parts": ["flowvae", "lm", "tokenizer"], "sample_rate": 16000})
    return folder
