"""What is varied: one thing at a time against the base, which is the quickstart's Flow-VAE and language model."""

from __future__ import annotations

from dataclasses import dataclass

BASE = "base"


@dataclass(frozen=True)
class Codec:
    """A Flow-VAE and how its latents are read: Hydra overrides of `kalle train flowvae`, and what every language model on it needs."""

    name: str
    question: str
    overrides: tuple[str, ...] = ()
    lm_overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A language model on the latents of ``codec``: Hydra overrides of `kalle train lm`."""

    name: str
    question: str
    codec: str = BASE
    overrides: tuple[str, ...] = ()


def _dimensions(count: int) -> Codec:
    return Codec(f"dim{count}", "latent dimension", (f"flowvae.latent_dim={count}",), (f"lm.latent_dim={count}",))


CODECS = (
    Codec(BASE, "-"),
    _dimensions(128),
    Codec(
        "rate25",
        "latent rate",
        ("flowvae.encoder.strides=[2,2,4,4,2,5]", "flowvae.decoder.upsample=4", "data.hop_length=640"),
        # Twice the frames for the same utterances in a batch.
        ("data.max_positions=2000", "data.drop_longer_than=1000"),
    ),
    Codec("noflow", "flow or no flow", ("flowvae.flow=null",)),
    Codec("lowkl", "hardly any KL, no flow", ("flowvae.flow=null", "objective.kl_weight=0.001")),
)

MODELS = (
    *(Model(codec.name, codec.question, codec.name) for codec in CODECS),
    Model("posterior_prediction", "KL direction", overrides=("objective.direction=posterior_prediction",)),
    Model("end0.02", "λ_end", overrides=("objective.end_weight=0.02",)),
    Model("end5", "λ_end", overrides=("objective.end_weight=5.0",)),
    Model("noise0", "input noise", overrides=("objective.input_noise=0.0",)),
    Model("unnormalised", "latent normalisation", overrides=("lm.normalise_latents=false",)),
)

TEMPERATURES = (0.5, 0.75)
"""Beside 1, with the base model."""
