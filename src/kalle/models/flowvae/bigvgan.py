"""The paper's decoder: causal upsampling with anti-aliased multi-periodicity blocks (BigVGAN, arXiv 2206.04658)."""

from __future__ import annotations

import logging

import torch
from alias_free_torch import Activation1d
from torch import Tensor, nn

from kalle.errors import UserError
from kalle.models.flowvae.config import BigVGANConfig
from kalle.models.layers import CausalConv1d, CausalUpsample1d, in_full_precision, same_conv

logger = logging.getLogger(__name__)

EPSILON = 1e-9


class SnakeBeta(nn.Module):
    """x + sin²(αx)/β with α, β per channel, stored as logarithms: (B, C, T) -> (B, C, T).

    Source: BigVGAN (arXiv 2206.04658), equation 2, with a separate magnitude β.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return snake_beta(x, self.alpha.exp()[:, None], self.beta.exp()[:, None])


def snake_beta(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """x + sin²(αx)/β, element by element."""
    return x + torch.sin(alpha * x).square() / (beta + EPSILON)


class AntiAliasedSnake(Activation1d):
    """SnakeBeta between a 2x upsampler and a 2x downsampler (symmetric filters, replicate padding: it looks ahead)."""

    way = "none"
    """none: by the library's layers; numba or triton: as `kalle.models.flowvae.training_activation` says, where the input allows it."""

    def __init__(self, channels: int) -> None:
        super().__init__(activation=SnakeBeta(channels))

    def forward(self, x: Tensor) -> Tensor:
        # Those passes are written for one device each and compute in fp32; what has no samples is the library's to refuse.
        is_theirs = self.way != "none" and x.device.type == {"numba": "cpu", "triton": "cuda"}[self.way] and x.dtype != torch.float64
        if not is_theirs or not x.shape[-1]:
            return super().forward(x)
        from kalle.models.flowvae.training_activation import fused_snake

        return fused_snake(x, self.act.alpha.exp(), self.act.beta.exp() + EPSILON, self.way)


def set_way(model: nn.Module, way: str, device: torch.device) -> str:
    """Let every anti-aliased activation in ``model`` be computed on ``device`` by ``way``; returns what that came to.

    none is alias_free_torch. numba is for a CPU and triton for CUDA; a UserError says why one cannot run. auto is numba on a CPU where it
    can run, and none on CUDA, where triton has not been measured yet. Weights and their names stay as they are, so a way can be changed at
    any time.
    """
    from kalle.models.flowvae.training_activation import why_not

    found = [module for module in model.modules() if isinstance(module, AntiAliasedSnake)]
    chosen, problem = "numba" if way == "auto" else way, None
    if chosen != "none":
        problem = why_not(chosen, device) if found else "a decoder without anti-aliased activations"
    if problem is not None:
        if way != "auto":
            raise UserError(f"fused_activation: got {way} and {problem}, expected a way that can run here; set fused_activation=auto")
        chosen = "none"
    for module in found:
        module.way = chosen
    if found:
        by = chosen if chosen != "none" else "alias_free_torch" + ("" if problem is None else f" ({problem})")
        logger.info("the decoder's activations are computed by %s", by)
    return chosen


_EDGE_KERNEL = 7


class AMPBlock(nn.Module):
    """Residual pairs of (activation, dilated convolution, activation, plain convolution): (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(CausalConv1d(channels, channels, kernel_size, dilation) for dilation in dilations)
        self.plain = nn.ModuleList(CausalConv1d(channels, channels, kernel_size) for _ in dilations)
        self.activations = nn.ModuleList(AntiAliasedSnake(channels) for _ in range(2 * len(dilations)))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.activations[::2], self.dilated, self.activations[1::2], self.plain, strict=True)
        for first, dilated, second, plain in pairs:
            x = x + plain(second(dilated(first(x))))
        return x


class BigVGANStage(nn.Module):
    """Upsample, then the mean of the blocks: (B, C, T) -> (B, C / 2, T * stride)."""

    def __init__(self, channels_in: int, stride: int, config: BigVGANConfig) -> None:
        super().__init__()
        channels = channels_in // 2
        self.up = CausalUpsample1d(channels_in, channels, stride)
        self.blocks = nn.ModuleList(AMPBlock(channels, kernel, config.block_dilations) for kernel in config.block_kernel_sizes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(x)
        total = self.blocks[0](x)
        for block in self.blocks[1:]:
            total = total + block(x)
        return total / len(self.blocks)


class BigVGANDecoder(nn.Module):
    """Latents (B, D, T) to a waveform (B, T * hop) in [-1, 1].

    The first convolution and the anti-aliasing filters look ahead; everything else is causal.
    """

    def __init__(self, config: BigVGANConfig, latent_dim: int) -> None:
        super().__init__()
        self.config = config
        widths = [config.initial_channels >> i for i in range(len(config.strides) + 1)]
        self.conv_in = same_conv(latent_dim, widths[0], _EDGE_KERNEL)
        self.stages = nn.ModuleList(BigVGANStage(width, stride, config) for width, stride in zip(widths[:-1], config.strides, strict=True))
        self.activation_out = AntiAliasedSnake(widths[-1])
        self.conv_out = CausalConv1d(widths[-1], 1, _EDGE_KERNEL)

    def forward(self, z: Tensor) -> Tensor:
        x = self.conv_in(z)
        for stage in self.stages:
            x = stage(x)
        # In half precision, discriminators would tell the waveform from a recording by its rounding.
        x = in_full_precision(self.conv_out, self.activation_out(x))
        return self.finish(x)[:, 0]

    def finish(self, x: Tensor) -> Tensor:
        """The last activation, element by element."""
        return torch.tanh(x) if self.config.final_activation == "tanh" else x
