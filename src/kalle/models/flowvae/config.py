"""Configuration of the Flow-VAE. The defaults are the released full-size model (KALL-E paper, section 3; released JSON)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from kalle.checkpoint import check_fields, check_sizes, dataclass_from_dict
from kalle.errors import UserError


@dataclass(frozen=True)
class EncoderConfig:
    """Strided convolutional encoder."""

    channels: tuple[int, ...] = (12, 24, 48, 96, 192, 384, 768)
    """Width after the first convolution, then after each stage."""
    strides: tuple[int, ...] = (2, 2, 4, 4, 4, 5)
    """Of the stages; their product is the samples of a latent frame."""
    residual_layers: int = 6
    """Layers of a stage's residual stack; layer i has dilation 2**i."""

    def __post_init__(self) -> None:
        check_fields(self, "flowvae.encoder")
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "strides", tuple(self.strides))
        check_sizes(self, "encoder", residual_layers=20)
        if len(self.channels) != len(self.strides) + 1:
            raise UserError(
                f"encoder.channels must have one entry more than encoder.strides: got {len(self.channels)} and {len(self.strides)}; "
                "add or remove an entry"
            )


@dataclass(frozen=True)
class FlowConfig:
    """Mean-only residual coupling flow between the posterior sample and the prior."""

    hidden_channels: int = 512
    """Width of a coupling's network."""
    couplings: int = 4
    """Coupling layers."""
    kernel_size: int = 5
    """Of its convolutions."""
    wavenet_layers: int = 4
    """Layers of a coupling's network."""

    def __post_init__(self) -> None:
        check_fields(self, "flowvae.flow")
        check_sizes(self, "flow", couplings=256, wavenet_layers=256)


@dataclass(frozen=True)
class BigVGANConfig:
    """Causal BigVGAN-like decoder, the paper's."""

    initial_channels: int = 1536
    """Width before the first stage; each stage halves it."""
    strides: tuple[int, ...] = (5, 4, 4, 4, 2, 2)
    """Of the stages; their product is the samples of a latent frame."""
    block_kernel_sizes: tuple[int, ...] = (3, 7, 11)
    """Kernels of the residual blocks of a stage, one block each."""
    block_dilations: tuple[int, ...] = (1, 3, 5)
    """Dilations of the layers of a block."""
    final_activation: Literal["tanh", "none"] = "tanh"
    """Bounds the waveform; "none" (BigVGAN v2) leaves that to the clamp of `FlowVAE.decode`. The release has a tanh."""
    kind: str = "bigvgan"
    """The name of this decoder in a weight folder."""

    def __post_init__(self) -> None:
        check_fields(self, "flowvae.decoder")
        for name in ("strides", "block_kernel_sizes", "block_dilations"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        check_sizes(self, "decoder")

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.strides)


@dataclass(frozen=True)
class ISTFTConfig:
    """ConvNeXt blocks at a low rate and an inverse-STFT head (Vocos, arXiv 2306.00814); ours, for machines without a GPU."""

    channels: int = 384
    blocks: int = 8
    expansion: int = 3
    """Width of a block's inner layer over ``channels``."""
    kernel_size: int = 7
    upsample: int = 8
    """STFT frames per latent frame."""
    n_fft: int = 640
    hop_length_stft: int = 160
    noise: bool = False
    """Add white noise of a predicted magnitude in every bin, which a decoder that is to sound like speech needs for what is noise in it."""
    harmonics: bool = False
    """Add the harmonics of a predicted pitch, whose phases go on from frame to frame, with a predicted magnitude and phase in every bin."""
    kind: str = "istft"

    def __post_init__(self) -> None:
        check_fields(self, "flowvae.decoder")
        check_sizes(self, "decoder", blocks=1024)

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return self.upsample * self.hop_length_stft


DECODER_CONFIGS: Mapping[str, type] = {"bigvgan": BigVGANConfig, "istft": ISTFTConfig}


@dataclass(frozen=True)
class FlowVAEConfig:
    """The whole Flow-VAE; ``flow=None`` makes it a plain VAE."""

    sample_rate: int = 16000
    """Hz."""
    latent_dim: int = 512
    """Dimensions of a latent frame."""
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    flow: FlowConfig | None = field(default_factory=FlowConfig)
    decoder: BigVGANConfig | ISTFTConfig = field(default_factory=BigVGANConfig)

    def __post_init__(self) -> None:
        check_fields(self, "flowvae")
        check_sizes(self, "flowvae", sample_rate=2**20)
        if self.decoder.hop_length != self.hop_length:
            raise UserError(
                f"encoder and decoder must agree on the samples per frame: got {self.hop_length} and {self.decoder.hop_length}; "
                "change the strides of one"
            )
        if self.flow is not None and self.latent_dim % 2:
            raise UserError(f"latent_dim must be even for the coupling flow: got {self.latent_dim}; use an even number or flow=null")

    @property
    def hop_length(self) -> int:
        """Samples per latent frame."""
        return math.prod(self.encoder.strides)

    @property
    def has_noise(self) -> bool:
        """Whether the decoder adds noise."""
        return isinstance(self.decoder, ISTFTConfig) and self.decoder.noise

    @property
    def has_harmonics(self) -> bool:
        """Whether the decoder adds harmonics of a pitch."""
        return isinstance(self.decoder, ISTFTConfig) and self.decoder.harmonics

    @property
    def frame_rate_hz(self) -> float:
        """Latent frames per second."""
        return self.sample_rate / self.hop_length

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as stored in config.json."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "flowvae/config.json") -> FlowVAEConfig:
        """The inverse of ``to_dict``; a UserError for an unknown key or decoder kind (it lists the valid ones) or a wrong type."""
        given = dict(values)
        if isinstance(given.get("decoder"), Mapping):
            kind = given["decoder"].get("kind", "bigvgan")
            if kind not in tuple(DECODER_CONFIGS):
                raise UserError(f"unknown decoder.kind in '{source}': got {kind!r}, expected one of {', '.join(DECODER_CONFIGS)}")
            given["decoder"] = dataclass_from_dict(DECODER_CONFIGS[kind], given["decoder"], source, "decoder")
        return dataclass_from_dict(cls, given, source)
