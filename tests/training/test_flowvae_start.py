"""`kalle train flowvae init=… freeze=…`."""

from __future__ import annotations

from pathlib import Path

import torch

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
