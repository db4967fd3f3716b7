"""Two processes train the Flow-VAE's networks as one process would that averaged their gradients by hand."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader

from kalle.models.discriminators import DiscriminatorConfig, Discriminators
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm_batch import WaveBatch
from kalle.training.callbacks import EMA
from kalle.training.distributed import AdversarialDDP
from kalle.training.flowvae import ClipSchedule, FlowVAEObjective, FlowVAETraining
from kalle.training.optimisation import Exponential
from training.distributed import kalle_on_ranks, on_ranks

DISCRIMINATORS = DiscriminatorConfig(periods=(2, 3), resolutions=((256, 60, 240),), width=0.05)
RANKS = 2


def build(config: FlowVAEConfig, start: int = 0) -> FlowVAETraining:
    torch.manual_seed(11)
    return FlowVAETraining(
        FlowVAE(config),
        # Plain descent: Adam would divide every gradient by its own size, and hide a wrong scale.
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        scheduler=Exponential(decay=1.0),
        objective=FlowVAEObjective(discriminator_start_step=start),
        clip=ClipSchedule(norm=1e9, early=1e9),
        discriminators=Discriminators(DISCRIMINATORS),
    )


def batch(rank: int, step: int) -> WaveBatch:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return WaveBatch(0.1 * torch.randn(2, 3200, generator=generator), (f"a{rank}", f"b{rank}"), (step, step))


def train(config: FlowVAEConfig, steps: int, start: int, averaged: bool) -> dict[str, Tensor]:
    """What one rank has after ``steps`` updates; under the strategy, its share of the batches."""
    rank = torch.distributed.get_rank()
    module = build(config, start)
    if rank:  # the wrappers must hand out the first rank's weights
        for parameter in module.parameters():
            parameter.data.add_(0.5)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=RANKS, strategy=AdversarialDDP(cluster_environment=Joined(rank)), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        use_distributed_sampler=False, callbacks=[EMA(0.5)] if averaged else [],
    )  # fmt: skip
    loader = DataLoader([batch(rank, step) for step in range(steps)], batch_size=None, collate_fn=lambda one: one)
    valid = DataLoader([batch(rank, 77)], batch_size=None, collate_fn=lambda one: one)
    trainer.fit(module, loader, valid)
    metrics = {name: value.clone() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
    return {**{name: tensor.clone() for name, tensor in module.state_dict().items()}, **metrics}


class Joined(LightningEnvironment):
    """The processes of `on_ranks`, which have met already."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self._local = rank

    @property
    def creates_processes_externally(self) -> bool:
        return True

    def local_rank(self) -> int:
        return self._local


def gradients(module: torch.nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in module.parameters() if parameter.grad is not None]


def one_step_by_hand(config: FlowVAEConfig) -> dict[str, Tensor]:
    """Both ranks' losses in one process, each player's gradients averaged over the ranks."""
    module = build(config)
    module.trainer = lightning.Trainer(max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False)
    batches = [batch(rank, 0) for rank in range(RANKS)]
    outputs = [module.flowvae(one.wav, noise=module.noise(one)) for one in batches]
    discriminators = module.discriminators
    assert discriminators is not None
    from kalle.losses.waveform import discriminator_loss

    for one, output in zip(batches, outputs, strict=True):
        (discriminator_loss(discriminators(one.wav).scores, discriminators(output.wav.detach()).scores) / RANKS).backward()
    torch.optim.SGD(discriminators.parameters(), lr=1e-3).step()
    module.zero_grad()
    for one, output in zip(batches, outputs, strict=True):
        (module._generator_losses(one.wav, output, None, None)["total"] / RANKS).backward()
    torch.optim.SGD(module.flowvae.parameters(), lr=1e-3).step()
    return module.state_dict()


@pytest.mark.slow
def test_a_step_on_two_ranks_averages_the_gradients_of_both_networks(toy_flowvae_config: FlowVAEConfig) -> None:
    results = on_ranks(train, toy_flowvae_config, 1, 0, False)
    expected, start = one_step_by_hand(toy_flowvae_config), build(toy_flowvae_config).state_dict()
    for name, value in expected.items():
        assert torch.equal(results[0][name], results[1][name]), name
        torch.testing.assert_close(results[0][name], value, rtol=1e-4, atol=1e-6)
    moved = {name.split(".")[0] for name in expected if not torch.equal(expected[name], start[name])}
    assert moved == {"flowvae", "discriminators"}
    for name in ("val/mel_l1", "val/active_dimensions", "val/kl_per_frame"):
        assert name in results[0], name


@pytest.mark.slow
def test_ranks_agree_when_discriminators_start_late_and_weights_are_averaged(toy_flowvae_config: FlowVAEConfig) -> None:
    results = on_ranks(train, toy_flowvae_config, 5, 2, True)
    start = build(toy_flowvae_config).state_dict()
    for name in start:
        assert torch.equal(results[0][name], results[1][name]), name
    assert any(not torch.equal(results[0][name], start[name]) for name in start if name.startswith("discriminators"))


@pytest.mark.slow
def test_the_command_trains_on_two_ranks(flowvae_overrides: list[str], tmp_path: Path) -> None:
    words = ["train", "flowvae", *flowvae_overrides, f"out={tmp_path}", "trainer.devices=2", "trainer.max_steps=4"]
    results = kalle_on_ranks(words)
    assert [result.returncode for result in results] == [0, 0], [result.stderr[-2000:] for result in results]
    assert load_file(tmp_path / "weights" / "flowvae" / "model.safetensors")
    rows: Any = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text()
    assert "val/mel_l1" in rows
