"""The volume-preserving flow that turns a posterior sample into a sample of the prior N(0, I)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kalle.models.flowvae.config import FlowConfig
from kalle.models.layers import CausalConv1d


class WaveNet(nn.Module):
    """Gated causal convolutions with residual and skip paths, no conditioning: (B, H, T) -> (B, H, T)."""

    def __init__(self, hidden_channels: int, kernel_size: int, layers: int) -> None:
        super().__init__()
        self.gates = nn.ModuleList(CausalConv1d(hidden_channels, 2 * hidden_channels, kernel_size) for _ in range(layers))
        # The last layer has nothing after it to feed, so it has a skip path only.
        widths = [2 * hidden_channels] * (layers - 1) + [hidden_channels]
        self.res_skips = nn.ModuleList(weight_norm(nn.Conv1d(hidden_channels, width, 1)) for width in widths)

    def forward(self, x: Tensor) -> Tensor:
        hidden_channels = x.shape[1]
        skip_sum = torch.zeros_like(x)
        for gate, res_skip in zip(self.gates, self.res_skips, strict=True):
            content, control = gate(x).chunk(2, dim=1)
            out = res_skip(torch.tanh(content) * torch.sigmoid(control))
            if out.shape[1] == 2 * hidden_channels:
                residual, out = out.chunk(2, dim=1)
                x = x + residual
            skip_sum = skip_sum + out
        return skip_sum


class MeanCoupling(nn.Module):
    """x1 <- x1 + m(x0) on the two channel halves; its log-determinant is 0 and it starts as the identity."""

    def __init__(self, channels: int, config: FlowConfig) -> None:
        super().__init__()
        self.pre = nn.Conv1d(channels // 2, config.hidden_channels, 1)
        self.wavenet = WaveNet(config.hidden_channels, config.kernel_size, config.wavenet_layers)
        self.post = nn.Conv1d(config.hidden_channels, channels // 2, 1)
        nn.init.zeros_(self.post.weight)
        assert self.post.bias is not None
        nn.init.zeros_(self.post.bias)

    def shift(self, x0: Tensor) -> Tensor:
        """m(x0), (B, C/2, T)."""
        return self.post(self.wavenet(self.pre(x0)))

    def forward(self, x: Tensor) -> Tensor:
        x0, x1 = x.chunk(2, dim=1)
        return torch.cat([x0, x1 + self.shift(x0)], dim=1)

    def inverse(self, x: Tensor) -> Tensor:
        """The exact inverse of ``forward``."""
        x0, x1 = x.chunk(2, dim=1)
        return torch.cat([x0, x1 - self.shift(x0)], dim=1)


class CouplingFlow(nn.Module):
    """Coupling layers, each followed by a flip of the channels: (B, D, T) -> (B, D, T), causal."""

    def __init__(self, config: FlowConfig, latent_dim: int) -> None:
        super().__init__()
        self.couplings = nn.ModuleList(MeanCoupling(latent_dim, config) for _ in range(config.couplings))

    def forward(self, z: Tensor) -> Tensor:
        for coupling in self.couplings:
            z = coupling(z).flip(1)
        return z

    def inverse(self, z: Tensor) -> Tensor:
        """From the prior back to the posterior's space."""
        for coupling in reversed(self.couplings):
            assert isinstance(coupling, MeanCoupling)
            z = coupling.inverse(z.flip(1))
        return z
