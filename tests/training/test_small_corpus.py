"""A handful of recordings goes the whole way: prepared with the defaults, every split has an item, and both trainings run on it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from kalle.audio import write_audio
from kalle.cli.main import main
from kalle.data.corpus.cuts import load_cuts
from kalle.data.loading.datamodules import LMDataModule
from kalle.text.tokenizer import Tokenizer

RATE_HZ = 16000


def recordings(folder: Path, count: int) -> Path:
    folder.mkdir()
    generator = np.random.default_rng(0)
    for number in range(count):
        time = np.arange(RATE_HZ * (10 + number % 5) // 10) / RATE_HZ
        voiced = 0.3 * np.sin(2 * np.pi * (150 + 40 * np.sin(9 * time)) * time) * (0.2 + 0.8 * np.abs(np.sin(2 * np.pi * 3 * time)))
        noise = 0.003 * generator.standard_normal(len(time))
        write_audio(folder / f"take{number:02d}.wav", (voiced + noise).astype(np.float32), RATE_HZ)
        (folder / f"take{number:02d}.txt").write_text(f"Some words are said in take {number}.", encoding="utf-8")
    return folder


@pytest.mark.parametrize("count", [3, 20])
def test_few_recordings_are_enough(count: int, flowvae_overrides: list[str], lm_overrides: list[str], tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", "folder", str(recordings(tmp_path / "takes", count)), "--out", "corpus", "--language", "en"]) == 0
    assert all(len(load_cuts("corpus", split)) >= 1 for split in ("train", "valid", "test"))
    short = ["trainer.max_steps=1", "trainer.val_check_interval=1"]
    own = ["data.corpus=corpus", "data.batch_size=32", "callbacks.metrics=null", "out=flowvae"]
    assert main(["train", "flowvae", *flowvae_overrides, *own, *short]) == 0
    assert main(["encode", "flowvae=flowvae/weights", "corpus=corpus", "out=latents", "device=cpu"]) == 0
    data = LMDataModule("latents", Tokenizer.bytes(), 24000)
    assert len(data.train_dataloader()) == 1, "thirty buckets would make each utterance a batch of its own"
    own = ["data.latents=latents", "flowvae=flowvae/weights", "data.max_positions=24000", "data.buckets=30", "out=lm"]
    assert main(["train", "lm", *lm_overrides, *own, *short]) == 0
    assert (tmp_path / "lm" / "weights" / "lm" / "model.safetensors").is_file()
