"""How healthy the latents of a Flow-VAE are: statistics over any number of utterances, summed over ranks by whoever needs that."""

from __future__ import annotations

import torch
from torch import Tensor

from kalle.gaussian import DiagGaussian
from kalle.losses.latent import flow_kl

ACTIVE_VARIANCE = 0.01
"""A dimension is active when its posterior mean varies by more than this (Burda et al., arXiv 1509.00519, appendix C)."""
_TERMS = ("mean", "mean_square", "z", "z_square", "kl", "std", "abs_mean")


class LatentHealth:
    """Sums over frames, so that a whole split counts as one: averages of batches would be wrong for variances, and for frames of utterances
    of unequal length.
    """

    def __init__(self, latent_dim: int) -> None:
        self.latent_dim = latent_dim
        self.sums = torch.zeros(len(_TERMS) * latent_dim + 1, dtype=torch.float64)
        """Every term of every dimension, then the number of frames; those of several ranks may be added. fp64, on the CPU."""

    def add(self, posterior: DiagGaussian, z: Tensor, z_prior: Tensor | None = None) -> None:
        """Count posteriors (..., D) and their samples ``z`` (..., D); the KL is against the flow prior when ``z_prior`` = flow(z) is
        given (one sample), else against N(0, I) in closed form.
        """
        posterior, z = posterior.detach(), z.detach().double()
        if z_prior is None:
            kl = posterior.kl_to(DiagGaussian.standard(posterior.mean))
        else:
            kl = flow_kl(z_prior.detach(), posterior.log_std, reduction="none")
        mean = posterior.mean.double()
        terms = (mean, mean.square(), z, z.square(), kl.double(), posterior.std.double(), mean.abs())
        sums = [term.reshape(-1, self.latent_dim).sum(0) for term in terms]
        frames = torch.tensor([mean.numel() // self.latent_dim], dtype=torch.float64)
        self.sums += torch.cat([*(total.cpu() for total in sums), frames])

    def summary(self) -> dict[str, float]:
        """``kl_per_element`` and ``kl_per_frame`` in nats; ``mean_std`` and ``mean_abs_mean`` over everything; ``active_dimensions``;
        ``z_std``, the standard deviation of the samples within a dimension, averaged. No frames is a broken invariant.
        """
        frames = self.sums[-1]
        assert frames > 0, "no frames were counted"
        average = dict(zip(_TERMS, self.sums[:-1].view(len(_TERMS), self.latent_dim) / frames, strict=True))
        spread = (average["mean_square"] - average["mean"].square()).clamp(min=0)
        z_spread = (average["z_square"] - average["z"].square()).clamp(min=0)
        return {
            "kl_per_element": float(average["kl"].mean()),
            "kl_per_frame": float(average["kl"].sum()),
            "mean_std": float(average["std"].mean()),
            "mean_abs_mean": float(average["abs_mean"].mean()),
            "active_dimensions": float((spread > ACTIVE_VARIANCE).sum()),
            "z_std": float(z_spread.sqrt().mean()),
        }


def latent_health(posterior: DiagGaussian, z: Tensor, z_prior: Tensor | None = None) -> dict[str, float]:
    """`LatentHealth` of posteriors (B, T, D) and their samples alone."""
    health = LatentHealth(z.shape[-1])
    health.add(posterior, z, z_prior)
    return health.summary()
