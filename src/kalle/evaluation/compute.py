"""The arithmetic of speaking, counted in two ways: as the paper's table 4 does, and as it is done here.

Everything is counted on the ``meta`` device, so that no weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from kalle.models.backbone import BackboneConfig
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig


@dataclass(frozen=True)
class Compute:
    """The arithmetic of one utterance."""

    counting: str
    unit: str
    lm: int
    decoder: int

    @property
    def total(self) -> int:
        """Both parts together."""
        return self.lm + self.decoder


def paper_counting(lm: KalleLMConfig, flowvae: FlowVAEConfig, frames: int) -> Compute:
    """Multiply-accumulates of the backbone's linear layers on the whole prefix for every frame, without the text, and of the decoder.

    The arithmetic behind table 4 of the KALL-E paper (arXiv 2412.16846): frame t reads t positions, of one product a weight each.
    """
    positions = frames * (frames + 1) // 2
    products = BackboneConfig.of(lm.backbone).layer_parameters
    return Compute("paper", "multiply-accumulates", positions * products, decoder_flop(flowvae, frames) // 2)


def true_counting(lm: KalleLMConfig, flowvae: FlowVAEConfig, frames: int, text_positions: int) -> Compute:
    """Floating-point operations, two a multiply-accumulate, of products, convolutions and attention: with a cache, text and end frame."""
    return Compute("true", "floating-point operations", cached_flop(lm, frames, text_positions), decoder_flop(flowvae, frames))


@torch.no_grad()
def cached_flop(config: KalleLMConfig, frames: int, text_positions: int) -> int:
    """Operations of reading ``text_positions`` and stepping through ``frames``, the last step of which predicts the end.

    A step costs a constant and a multiple of the positions behind it, so that the first and the last one tell the sum.
    """
    with torch.device("meta"):
        lm = KalleLM(config).eval()

    def step_behind(positions: int) -> int:
        _, state = lm.prefill(torch.zeros(1, positions, dtype=torch.int64, device="meta"))
        return counted_flop(lambda: lm.step(torch.zeros(1, config.latent_dim, device="meta"), state))

    text = torch.zeros(1, text_positions, dtype=torch.int64, device="meta")
    ends = step_behind(text_positions) + step_behind(text_positions + frames - 1)
    return counted_flop(lambda: lm.prefill(text)) + frames * ends // 2


@torch.no_grad()
def decoder_flop(config: FlowVAEConfig, frames: int) -> int:
    """Operations of the Flow-VAE's decoder for ``frames``; a transposed convolution counts what it multiplies."""
    with torch.device("meta"):
        flowvae = FlowVAE(config).eval()
        return counted_flop(lambda: flowvae.decode(torch.zeros(1, frames, config.latent_dim)))


def counted_flop(run: Callable[[], object]) -> int:
    """Floating-point operations of the products, convolutions and attention in ``run``."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()
