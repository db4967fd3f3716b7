"""What a training run with adapters leaves, and what speaks with it."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import numpy as np
import pytest
import torch

from kalle.audio import read_audio
from kalle.cli.main import main
from kalle.errors import UserError
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lora import LoRAConfig, add_lora
from kalle.models.speaker import SpeakerEncoderConfig
from kalle.synthesis.adapter import Adapter, base_hash
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import StopRule
from kalle.training import LMDataConfig, LMObjective, LMTrainingConfig
from kalle.training.train import Adapters, export_language_model


def trained(toy_weights: Path, config: LoRAConfig, out: Path) -> KalleLM:
    """Export a toy language model whose adapters and other weights were pushed somewhere; the merged model."""
    lm = KalleLM.from_pretrained(toy_weights)
    adapters = Adapters(config, base_hash(lm.state_dict()))
    add_lora(lm, config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    export_language_model(lm, adapters, out, steps=7)
    return KalleLM.from_pretrained(out).eval()


def test_the_adapter_speaks_as_the_merged_model(toy_weights: Path, tmp_path: Path) -> None:
    config = LoRAConfig(rank=2, alpha=6.0, targets=("q_proj", "down_proj"), also_train=("audio_linear.*",))
    merged = trained(toy_weights, config, tmp_path / "weights")
    kalle = Kalle.from_pretrained(toy_weights, "cpu")
    say = {"seed": 1, "max_seconds": 0.1, "stop": StopRule(0.0), "retries": 0}
    voice = kalle.random_voice(0)
    plain = kalle.synthesize("four", voice, **say)
    kalle.adapter = kalle.load_adapter(tmp_path / "weights" / "adapter")
    assert kalle.adapter.description.startswith("low rank 2, 7 steps")
    adapted = kalle.synthesize("four", voice, **say)
    other = Kalle(kalle.flowvae, merged, kalle.tokenizer).synthesize("four", voice, **say)
    np.testing.assert_allclose(adapted.latents, other.latents, atol=1e-4)
    assert np.abs(adapted.latents - plain.latents).max() > 1e-2
    kalle.adapter = None
    assert np.array_equal(kalle.synthesize("four", voice, **say).latents, plain.latents)


def test_the_command_takes_the_folder_and_the_file(toy_weights: Path, tmp_path: Path) -> None:
    trained(toy_weights, LoRAConfig(rank=2), tmp_path / "weights")
    say = ["say", "four", "--model", str(toy_weights), "--seed", "1", "--max-seconds", "0.2", "--device", "cpu"]
    folder = tmp_path / "weights" / "adapter"
    for name, words in (("plain", []), ("folder", ["--adapter", folder]), ("file", ["--adapter", folder / "adapter.safetensors"])):
        assert main([*say, "-o", str(tmp_path / f"{name}.wav"), *map(str, words)]) == 0
    plain, one, other = (read_audio(tmp_path / f"{name}.wav") for name in ("plain", "folder", "file"))
    assert np.array_equal(one, other)
    assert not np.array_equal(one, plain)


def test_other_weights_are_refused(toy_weights: Path, tmp_path: Path) -> None:
    merged = trained(toy_weights, LoRAConfig(rank=2), tmp_path / "weights")
    base = Kalle.from_pretrained(toy_weights, "cpu")
    with pytest.raises(UserError):
        Kalle(base.flowvae, merged, base.tokenizer).load_adapter(tmp_path / "weights" / "adapter")
    with pytest.raises(UserError, match=r"adapter file not found: got '.*adapter.safetensors'"):
        base.load_adapter(tmp_path)


def test_a_weight_that_stands_for_another_must_fit(toy_weights: Path) -> None:
    lm = KalleLM.from_pretrained(toy_weights)
    factors = {"backbone.layers.0.mlp.up_proj": (torch.zeros(1, 16), torch.zeros(32, 1))}
    for name, shape in (("audio_linear.bias", (3,)), ("nothing", (1,)), ("speaker_projection.weight", (1,))):
        adapter = Adapter.of_factors("b", factors, 1.0, whole={name: torch.zeros(shape)})
        with pytest.raises(UserError, match=f"the adapter does not fit: {name} is of shape"):
            adapter.applied_to(lm)


def test_a_changed_speaker_encoder_is_no_adapter(toy_lm_config: KalleLMConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    speaker = SpeakerEncoderConfig(channels=16, embedding_dim=64)
    KalleLM(dataclasses.replace(toy_lm_config, speaker=speaker)).save_pretrained(tmp_path / "base")
    with caplog.at_level(logging.WARNING, logger="kalle"):
        trained(tmp_path / "base", LoRAConfig(rank=2, also_train=("speaker_projection.*",)), tmp_path / "weights")
    assert "these adapters change the speaker encoder" in caplog.text
    assert not (tmp_path / "weights" / "adapter").exists()


def test_led_attention_is_not_compiled(toy_lm_config: KalleLMConfig) -> None:
    with pytest.raises(UserError, match=r"got compile=true and objective\.alignment_weight=0\.2, expected one of them"):
        LMTrainingConfig(
            out="o", data=LMDataConfig(latents="l"), lm=toy_lm_config, compile=True, objective=LMObjective(alignment_weight=0.2)
        )
