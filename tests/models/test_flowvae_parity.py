"""The Flow-VAE against the numbers of the public implementation; its layout is (B, C, T), ours (B, T, C)."""

from __future__ import annotations

import torch

from kalle.losses.latent import flow_kl

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def _theirs(x):
    return x.transpose(1, 2)


def _parameters(posterior):
    return torch.cat([posterior.mean, posterior.log_std], dim=-1)


@torch.no_grad()
def test_encoder_and_sample(golden_flowvae, golden_io):
    io = golden_io("flowvae_tiny")
    posterior = golden_flowvae.encode(io["wav"][:, 0])
    torch.testing.assert_close(_theirs(_parameters(posterior)), io["latents"], **TOLERANCE)
    torch.testing.assert_close(_theirs(posterior.sample(_theirs(io["noise"]))), io["z"], **TOLERANCE)


@torch.no_grad()
def test_encoder_of_a_length_that_is_no_multiple_of_the_hop(golden_flowvae, golden_io):
    io = golden_io("flowvae_tiny_odd")
    assert io["wav"].shape[-1] % golden_flowvae.config.hop_length != 0
    torch.testing.assert_close(_theirs(_parameters(golden_flowvae.encode(io["wav"][:, 0]))), io["latents"], **TOLERANCE)


@torch.no_grad()
def test_flow_and_its_inverse(golden_flowvae, golden_io):
    io = golden_io("flowvae_tiny")
    torch.testing.assert_close(_theirs(golden_flowvae.to_prior(_theirs(io["z"]))), io["flow_z"], **TOLERANCE)
    torch.testing.assert_close(_theirs(golden_flowvae.from_prior(_theirs(io["flow_z"]))), io["flow_inverse_of_flow_z"], **TOLERANCE)


@torch.no_grad()
def test_decoder(golden_flowvae, golden_io):
    io = golden_io("flowvae_tiny")
    torch.testing.assert_close(golden_flowvae.decode(_theirs(io["z"])), io["decoded"][:, 0], **TOLERANCE)


@torch.no_grad()
def test_training_forward(golden_flowvae, golden_io):
    io, training = golden_io("flowvae_tiny"), golden_io("flowvae_tiny_training")
    output = golden_flowvae(io["wav"][:, 0], noise=_theirs(io["noise"]))
    torch.testing.assert_close(output.wav, training["wav_hat"][:, 0], **TOLERANCE)
    per_element = flow_kl(output.z_prior, output.posterior.log_std, reduction="none")
    torch.testing.assert_close(_theirs(per_element), training["kl_per_element"], **TOLERANCE)
    torch.testing.assert_close(flow_kl(output.z_prior, output.posterior.log_std), training["kl_mean"], **TOLERANCE)
