"""`kalle train flowvae init=… freeze=… fused_activation=…`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kalle.checkpoint import weights_hash
from kalle.cli.main import main
from kalle.models.flowvae import FlowVAE


def test_a_decoder_trains_on_under_an_encoder_that_stays(flowvae_overrides: list[str], tmp_path: Path, capsys) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    assert main(["train", "flowvae", *flowvae_overrides, f"out={first}"]) == 0
    more = [f"init={first / 'weights'}", "freeze=[encoder.*,flow.*]", "discriminators=null"]
    assert main(["train", "flowvae", *flowvae_overrides, f"out={second}", *more]) == 0
    before, after = FlowVAE.from_pretrained(first / "weights"), FlowVAE.from_pretrained(second / "weights")
    assert weights_hash(before.encoder) == weights_hash(after.encoder)
    z = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(before.to_prior(z), after.to_prior(z))
    assert not torch.allclose(before.decode(z), after.decode(z), atol=1e-6)


def test_the_start_decides_the_architecture(flowvae_overrides: list[str], tmp_path: Path, capsys) -> None:
    start = tmp_path / "start"
    assert main(["train", "flowvae", *flowvae_overrides, f"out={start}"]) == 0
    other = [f"init={start / 'weights'}", "flowvae.latent_dim=10", "freeze=[encoder.*]", "--dry-run"]
    assert main(["train", "flowvae", *flowvae_overrides, f"out={tmp_path / 'other'}", *other]) == 0
    assert not (tmp_path / "other").exists()


def test_a_pattern_that_fits_nothing_is_said(flowvae_overrides: list[str], tmp_path: Path, capsys) -> None:
    assert main(["train", "flowvae", *flowvae_overrides, f"out={tmp_path / 'run'}", "freeze=[encodr.*]"]) == 2
    assert "no parameter fits 'encodr.*'" in capsys.readouterr().err


def test_the_papers_decoder_trains_with_either_activation(flowvae_overrides: list[str], tmp_path: Path, capsys) -> None:
    pytest.importorskip("numba")
    paper = [words for words in flowvae_overrides if not words.startswith(("flowvae.decoder", "flowvae=", "trainer.max_steps"))]
    paper += ["flowvae=nano_bigvgan", "flowvae.decoder={initial_channels: 8, strides: [10, 16], block_kernel_sizes: [3]}"]
    trained = []
    for way, named in (("auto", "by numba"), ("none", "by alias_free_torch")):
        run = tmp_path / way
        words = ["train", "flowvae", *paper, "trainer.max_steps=2", f"fused_activation={way}", f"out={run}"]
        assert main(words) == 0
        assert named in capsys.readouterr().out
        trained.append(load_file(run / "weights" / "flowvae" / "model.safetensors"))
    assert trained[0].keys() == trained[1].keys()
    assert not all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0]), "the way is not taken"
    for name, value in trained[0].items():
        torch.testing.assert_close(value, trained[1][name], rtol=1e-3, atol=1e-4)
    assert main([*words[:-2], "fused_activation=triton", "device=cpu", "--dry-run", f"out={tmp_path / 'refused'}"]) == 2
    assert "set fused_activation=auto" in capsys.readouterr().err
