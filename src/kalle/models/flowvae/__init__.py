"""The Flow-VAE and its configuration."""

from kalle.models.flowvae.config import BigVGANConfig, EncoderConfig, FlowConfig, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.model import FlowVAE

__all__ = ["BigVGANConfig", "EncoderConfig", "FlowConfig", "FlowVAE", "FlowVAEConfig", "ISTFTConfig"]
