"""What is estimated without storage is what a real step keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from kalle.models.discriminators import DiscriminatorConfig, Discriminators
from kalle.models.flowvae import BigVGANConfig, FlowVAE, FlowVAEConfig
from kalle.models.flowvae.bigvgan import set_way
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.training.plan import flowvae_footprint, lm_footprint, measure_memory, without_storage


def test_a_linear_layer_keeps_its_input_and_multiplies_once() -> None:
    with without_storage():
        layer = nn.Linear(8, 4)
        assert measure_memory(lambda: layer(torch.zeros(10, 8)), [layer]) == (10 * 8 * 4, 2 * 10 * 8 * 4)
        assert measure_memory(lambda: layer(layer(torch.zeros(10, 8))[:, [0, 0, 1, 1, 2, 2, 3, 3]]), [layer])[1] == 2 * 2 * 10 * 8 * 4


def test_what_is_estimated_is_what_a_real_step_keeps(toy_lm_config: KalleLMConfig, toy_flowvae_config: FlowVAEConfig) -> None:
    discriminators = DiscriminatorConfig(periods=(2, 3), resolutions=((256, 60, 240),), width=0.05)
    with without_storage():
        estimated = lm_footprint(KalleLM(toy_lm_config), 3, 7, 20)
        estimated_wave = flowvae_footprint(FlowVAE(toy_flowvae_config), Discriminators(discriminators), 2, 3200)
    real = lm_footprint(KalleLM(toy_lm_config), 3, 7, 20)
    real_wave = flowvae_footprint(FlowVAE(toy_flowvae_config), Discriminators(discriminators), 2, 3200)
    assert estimated == real
    assert (estimated_wave.flops, estimated_wave.batch) == (real_wave.flops, real_wave.batch)
    # Constants of a few bytes are kept once a process or once a call, depending on what ran before.
    assert abs(estimated_wave.activation_bytes - real_wave.activation_bytes) <= 64
    assert estimated.activation_bytes > 3 * 27 * 16 * 4 * 2, "at least the input of every layer"


def test_a_fused_decoder_is_estimated_by_what_it_keeps(toy_flowvae_config: FlowVAEConfig) -> None:
    pytest.importorskip("numba")
    decoder = BigVGANConfig(initial_channels=8, strides=(10, 16), block_kernel_sizes=(3,), block_dilations=(1, 3))

    def estimate(way: str) -> int:
        flowvae = FlowVAE(replace(toy_flowvae_config, decoder=decoder))
        set_way(flowvae, way, torch.device("cpu"))
        return flowvae_footprint(flowvae, None, 2, 3200).activation_bytes

    with without_storage():
        fused, plain = estimate("numba"), estimate("none")
    assert abs(fused - estimate("numba")) <= 64
    assert fused < plain / 2


def test_a_decoder_with_noise_and_harmonics_is_estimated(toy_flowvae_config: FlowVAEConfig) -> None:
    plain = FlowVAE(toy_flowvae_config)
    with without_storage():
        more, less = (flowvae_footprint(flowvae, None, 2, 3200) for flowvae in (plain.with_sources(), plain))
    assert more.activation_bytes > less.activation_bytes
    assert more.flops > less.flops


def test_twice_the_batch_is_twice_the_step(toy_lm_config: KalleLMConfig) -> None:
    with without_storage():
        one, two = (lm_footprint(KalleLM(toy_lm_config), items, 7, 20) for items in (2, 4))
    # The table of rotary angles is kept once.
    assert 1.8 * one.activation_bytes < two.activation_bytes <= 2 * one.activation_bytes
    assert two.flops == 2 * one.flops
