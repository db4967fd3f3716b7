"""The one type that modules exchange: a diagonal Gaussian."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

END_MEAN = 1.0
"""Mean of the end distribution N(1, e) in every dimension (KALL-E paper, section 3)."""
END_LOG_STD = 1.0
"""Natural log of its standard deviation e."""


@dataclass(frozen=True)
class DiagGaussian:
    """A Gaussian with diagonal covariance.

    ``mean`` and ``log_std`` have the same shape (..., D); ``log_std`` is the natural logarithm of the
    standard deviation. Sampling and divergences are computed and returned in fp32, whatever the dtype of
    the parameters, because exp() and squared ratios overflow half precision.
    """

    mean: Tensor
    log_std: Tensor

    def __post_init__(self) -> None:
        if self.mean.shape != self.log_std.shape:
            raise ValueError(f"mean and log_std must agree in shape: got {tuple(self.mean.shape)} and {tuple(self.log_std.shape)}")

    @classmethod
    def from_parameters(cls, parameters: Tensor, dim: int = -1) -> DiagGaussian:
        """Split ``parameters`` (mean first, then log_std) in two equal halves along ``dim``."""
        mean, log_std = parameters.chunk(2, dim=dim)
        return cls(mean, log_std)

    @classmethod
    def standard(cls, like: Tensor) -> DiagGaussian:
        """N(0, I) of the shape, dtype and device of ``like``."""
        return cls(torch.zeros_like(like), torch.zeros_like(like))

    @classmethod
    def end(cls, like: Tensor) -> DiagGaussian:
        """The end-of-speech distribution N(1, e) of the shape, dtype and device of ``like``."""
        return cls(torch.full_like(like, END_MEAN), torch.full_like(like, END_LOG_STD))

    @property
    def std(self) -> Tensor:
        """Standard deviation, fp32, (..., D)."""
        return self.log_std.float().exp()

    def sample(self, noise: Tensor | None = None, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``mean + temperature * noise * std``, fp32, (..., D).

        ``noise`` is standard normal of the same shape; without it, it is drawn in fp32 on the generator's
        device (the parameters' own device when no generator is given) and then moved.
        """
        if noise is None:
            device = generator.device if generator is not None else self.mean.device
            noise = torch.randn(self.mean.shape, generator=generator, device=device, dtype=torch.float32)
        return self.mean.float() + temperature * noise.to(self.mean.device, torch.float32) * self.std

    def kl_to(self, other: DiagGaussian) -> Tensor:
        """KL(self || other) in nats for each dimension, fp32, (..., D) after broadcasting."""
        log_ratio = self.log_std.float() - other.log_std.float()
        squared_distance = ((self.mean.float() - other.mean.float()) * torch.exp(-other.log_std.float())).square()
        return 0.5 * (torch.exp(2 * log_ratio) + squared_distance - 1) - log_ratio

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density of ``value`` in nats for each dimension, fp32, (..., D)."""
        z = (value.float() - self.mean.float()) * torch.exp(-self.log_std.float())
        return -0.5 * (z.square() + torch.log(torch.tensor(2 * torch.pi))) - self.log_std.float()

    def to(self, *args: object, **kwargs: object) -> DiagGaussian:
        """Both tensors through ``Tensor.to``."""
        return DiagGaussian(self.mean.to(*args, **kwargs), self.log_std.to(*args, **kwargs))  # type: ignore[call-overload]

    def detach(self) -> DiagGaussian:
        """Both tensors cut from the graph."""
        return DiagGaussian(self.mean.detach(), self.log_std.detach())

    def __getitem__(self, index: object) -> DiagGaussian:
        """Index both tensors alike, over the leading dimensions."""
        return DiagGaussian(self.mean[index], self.log_std[index])  # type: ignore[index]
