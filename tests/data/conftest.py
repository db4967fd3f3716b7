"""Fabricated cuts and a tiny Flow-VAE for the tests of the encoder and the data modules."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from lhotse import Recording, SupervisionSegment
from lhotse.cut import CutSet, MonoCut

from kalle.models.flowvae import EncoderConfig, FlowVAE, FlowVAEConfig, ISTFTConfig

MakeCuts = Callable[..., list[MonoCut]]


@pytest.fixture
def make_cuts(tmp_path: Path) -> MakeCuts:
    """Cuts of sine sweeps: one per duration in samples, speakers a and b in turn."""

    def make(samples: list[int], prefix: str = "c", rate_hz: int = 16000, speakers: tuple[str, ...] = ("a", "b")) -> list[MonoCut]:
        folder = tmp_path / "audio"
        folder.mkdir(exist_ok=True)
        cuts = []
        for number, count in enumerate(samples):
            name = f"{prefix}{number:03d}"
            time = np.arange(count) / rate_hz
            wave = 0.3 * np.sin(2 * np.pi * (150 + 40 * number + 300 * time) * time)
            soundfile.write(folder / f"{name}.wav", wave, rate_hz)
            recording = Recording.from_file(folder / f"{name}.wav", recording_id=name)
            text = "text " + "word " * (1 + number % 5)
            supervision = SupervisionSegment(
                name, name, 0, recording.duration, text=text.strip(), speaker=speakers[number % len(speakers)], language="en"
            )
            cuts.append(MonoCut(name, 0, recording.duration, 0, supervisions=[supervision], recording=recording))
        return cuts

    return make


@pytest.fixture
def tiny_flowvae() -> FlowVAE:
    """An untrained Flow-VAE of 4 dimensions and 160 samples a frame."""
    torch.manual_seed(0)
    encoder = EncoderConfig(channels=(4, 8, 8), strides=(10, 16), residual_layers=2)
    decoder = ISTFTConfig(channels=8, blocks=1, upsample=2, n_fft=160, hop_length_stft=80)
    return FlowVAE(FlowVAEConfig(latent_dim=4, encoder=encoder, flow=None, decoder=decoder)).eval()


@pytest.fixture
def write_corpus(tmp_path: Path) -> Callable[..., Path]:
    """A prepared corpus folder with relative audio paths."""

    def write(**splits: list[MonoCut]) -> Path:
        for split, cuts in splits.items():
            for cut in cuts:
                for source in cut.recording.sources:
                    source.source = str(Path(source.source).relative_to(tmp_path)) if Path(source.source).is_absolute() else source.source
            CutSet.from_cuts(cuts).to_file(tmp_path / f"cuts_{split}.jsonl.gz")
        (tmp_path / ".completed").touch()
        return tmp_path

    return write
