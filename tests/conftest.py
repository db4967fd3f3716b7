"""A toy world for tests that run whole commands: a corpus of sweeps, a Flow-VAE of 4 dimensions, its latents, a speaking weight folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from kalle.checkpoint import write_json
from kalle.models.flowvae import EncoderConfig, FlowConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.text.tokenizer import Tokenizer

# A loaded machine is no failure; pytest-timeout ends what hangs.
settings.register_profile("kalle", deadline=None)
settings.load_profile("kalle")

RATE_HZ = 16000
HOP = 160
DIMENSIONS = 4
SPLITS = {"train": [3200 + 400 * n for n in range(12)], "valid": [4800, 4000, 3600], "test": [4000, 3200]}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Two cores are shared with other work, and sums in a fixed order make runs comparable to the last bit."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy_flowvae_config() -> FlowVAEConfig:
    encoder = EncoderConfig(channels=(4, 8, 8), strides=(10, 16), residual_layers=2)
    flow = FlowConfig(hidden_channels=8, couplings=2, kernel_size=3, wavenet_layers=1)
    decoder = ISTFTConfig(channels=8, blocks=1, upsample=2, n_fft=160, hop_length_stft=80)
    return FlowVAEConfig(latent_dim=DIMENSIONS, encoder=encoder, flow=flow, decoder=decoder)


@pytest.fixture(scope="session")
def toy_lm_config() -> KalleLMConfig:
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    backbone = {**size, "head_dim": 8, "vocab_size": Tokenizer.bytes().vocab_size, "max_position_embeddings": 1024}
    return KalleLMConfig(backbone=backbone, latent_dim=DIMENSIONS, normalise_latents=True)


@pytest.fixture(scope="session")
def toy_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prepared corpus folder; every utterance is a sweep of its own with a text of its own."""
    from kalle.audio import write_audio
    from kalle.data.corpus.cuts import cuts_path, make_cut, write_cuts

    folder = tmp_path_factory.mktemp("toy") / "corpus"
    folder.mkdir()
    for split, lengths in SPLITS.items():
        cuts = []
        for number, samples in enumerate(lengths):
            name = f"{split}{number:02d}"
            time = np.arange(samples) / RATE_HZ
            write_audio(folder / "audio" / f"{name}.wav", 0.3 * np.sin(2 * np.pi * (200 + 50 * number + 900 * time) * time), RATE_HZ)
            text = f"text {'word ' * (1 + number % 4)}{number}"
            cuts.append(make_cut(name, f"audio/{name}.wav", RATE_HZ, samples, RATE_HZ, text, f"s{number % 2}", "en"))
        write_cuts(cuts_path(folder, split), cuts)
    (folder / ".completed").touch()
    return folder


@pytest.fixture(scope="session")
def toy_weights(tmp_path_factory: pytest.TempPathFactory, toy_flowvae_config: FlowVAEConfig, toy_lm_config: KalleLMConfig) -> Path:
    """An untrained weight folder with every part."""
    folder = tmp_path_factory.mktemp("toy") / "weights"
    torch.manual_seed(0)
    FlowVAE(toy_flowvae_config).save_pretrained(folder)
    KalleLM(toy_lm_config).save_pretrained(folder)
    Tokenizer.bytes().save(folder / "tokenizer")
    write_json(folder / "config.json", {"format_version": 1, "parts": ["flowvae", "lm", "tokenizer"], "sample_rate": RATE_HZ})
    return folder


@pytest.fixture(scope="session")
def toy_latents(tmp_path_factory: pytest.TempPathFactory, toy_corpus: Path, toy_weights: Path) -> Path:
    """The latents of the toy corpus under the toy Flow-VAE, with speaker mels."""
    from kalle.data.corpus.cuts import load_cuts
    from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus
    from kalle.models.speaker import SpeakerMel

    folder = tmp_path_factory.mktemp("toy") / "latents"
    encoder = CorpusEncoder(FlowVAE.from_pretrained(toy_weights), EncodeConfig(shard_size=5, speaker_mels=True), SpeakerMel())
    encode_corpus(encoder, {split: load_cuts(toy_corpus, split) for split in SPLITS}, folder)
    return folder


_COMMON = [
    "device=cpu",
    "threads=1",
    "seed=3",
    "logger=csv",
    "data.num_workers=0",
    "trainer.log_every_n_steps=1",
    "trainer.max_steps=6",
    "trainer.val_check_interval=4",
    "callbacks.checkpoint.every_steps=3",
    "callbacks.ema.decay=0.9",
]


@pytest.fixture(scope="session")
def flowvae_overrides(toy_corpus: Path) -> list[str]:
    """What makes `kalle train flowvae` a toy run of 6 steps, 5 to an epoch; ``out`` is the test's."""
    return [
        *_COMMON,
        "flowvae=nano",
        f"flowvae.latent_dim={DIMENSIONS}",
        "flowvae.encoder.channels=[4,8,8]",
        "flowvae.encoder.strides=[10,16]",
        "flowvae.encoder.residual_layers=2",
        "flowvae.flow={hidden_channels: 8, couplings: 2, kernel_size: 3, wavenet_layers: 1}",
        "flowvae.decoder={channels: 8, blocks: 1, upsample: 2, n_fft: 160, hop_length_stft: 80}",
        "discriminators={periods: [2, 3], resolutions: [[256, 60, 240]], width: 0.05}",
        f"data.corpus={toy_corpus}",
        f"data.hop_length={HOP}",
        "data.segment_samples=3200",
        "data.batch_size=5",
        "data.gap_seconds=[0.01,0.02]",
        "callbacks.media.utterances=1",
    ]


@pytest.fixture(scope="session")
def lm_overrides(toy_latents: Path) -> list[str]:
    """What makes `kalle train lm` a toy run of 6 steps, a few to an epoch; ``out`` is the test's."""
    size = "vocab_size: 272, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2"
    return [
        *_COMMON,
        "lm=nano",
        "tokenizer=bytes",
        f"lm.latent_dim={DIMENSIONS}",
        f"lm.backbone={{{size}, num_key_value_heads: 1, head_dim: 8}}",
        f"data.latents={toy_latents}",
        "data.max_positions=250",
        "data.buckets=3",
        "objective.input_noise=0.5",
        "scheduler.warmup_steps=2",
        "callbacks.media.texts=[Hi]",
    ]
