"""The Flow-VAE: speech to a sequence of Gaussians and back (KALL-E paper, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kalle.checkpoint import CONFIG_NAME, load_module, part_folder, read_json, save_part
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.flowvae.bigvgan import BigVGANDecoder
from kalle.models.flowvae.config import BigVGANConfig, FlowVAEConfig
from kalle.models.flowvae.encoder import Encoder
from kalle.models.flowvae.flow import CouplingFlow
from kalle.models.flowvae.istft import ISTFTDecoder
from kalle.models.flowvae.streaming import DecoderForInference

PART = "flowvae"


@dataclass(frozen=True)
class FlowVAEOutput:
    """A training pass over B waveforms of S samples."""

    posterior: DiagGaussian
    """(B, T, D)."""
    z: Tensor
    """The sample that was decoded, (B, T, D)."""
    z_prior: Tensor
    """The same sample through the flow, (B, T, D)."""
    wav: Tensor
    """Reconstruction (B, T * hop_length), not clipped, so that every sample keeps its gradient."""


class FlowVAE(nn.Module):
    """Encoder, prior flow and decoder. Shapes: B batch, S samples, T latent frames, D latent_dim."""

    def __init__(self, config: FlowVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config.encoder, config.latent_dim)
        self.flow = CouplingFlow(config.flow, config.latent_dim) if config.flow is not None else None
        self.decoder: nn.Module
        if isinstance(config.decoder, BigVGANConfig):
            self.decoder = BigVGANDecoder(config.decoder, config.latent_dim)
        else:
            self.decoder = ISTFTDecoder(config.decoder, config.latent_dim)

    @classmethod
    def from_pretrained(cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> FlowVAE:
        """Load ``folder`` (NAME or NAME/flowvae), in evaluation mode; a UserError lists every tensor that does not fit.

        On the CPU the weights are the mapped file: replace it by a rename while the model is in use, never overwrite it in place (``cp``),
        which would change the model or end the process. ``save_pretrained`` renames.
        """
        part = part_folder(folder, PART)
        config = FlowVAEConfig.from_dict(read_json(part / CONFIG_NAME), str(part / CONFIG_NAME))
        return load_module(lambda: cls(config), part, device, {"": dtype})

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``folder``/flowvae/{config.json, model.safetensors} (``folder`` itself when it is named flowvae).

        UserError after ``prepare_inference``.
        """
        if isinstance(self.decoder, DecoderForInference):
            raise UserError("the decoder was prepared for inference and has no weights to save; load the Flow-VAE again, unprepared")
        root = Path(folder)
        save_part(root if root.name == PART else root / PART, self.config.to_dict(), self)

    def prepare_inference(self, dtype: torch.dtype | None = None) -> FlowVAE:
        """Replace the paper's decoder by one that only decodes, faster and with its weights once in memory; returns itself.

        Waveforms differ from the trained decoder's by rounding. ``dtype`` bfloat16 computes the convolutions in it, the activations and
        the sums in the weights' own. The decoder then has no parameters: it can't be trained, saved or moved. The inverse-STFT decoder
        stays as it is; UserError for it and another ``dtype`` than its own.
        """
        if isinstance(self.decoder, BigVGANDecoder):
            self.decoder = DecoderForInference(self.decoder, dtype)
        elif isinstance(self.decoder, ISTFTDecoder) and dtype not in (None, self.decoder.conv_in.weight.dtype):
            raise UserError(f"the inverse-STFT decoder computes in the dtype of its weights: got {dtype}; leave the decoder's dtype out")
        return self

    def forward(self, wav: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None) -> FlowVAEOutput:
        """Encode ``wav`` (B, S), sample once (``noise`` (B, T, D) or ``generator``), and send the sample to decoder and flow."""
        posterior = self.encode(wav)
        z = posterior.sample(noise, generator=generator)
        return FlowVAEOutput(posterior, z, self.to_prior(z), self.decoder(z.transpose(1, 2)))

    def encode(self, wav: Tensor) -> DiagGaussian:
        """Posterior of ``wav`` (B, S) as (B, T, D); T follows from the convolutions, nothing is padded.

        The encoder sees seconds to both sides, so padding or a neighbour in the same row changes posteriors far away:
        encode utterances of equal length together, or one at a time.
        """
        return DiagGaussian.from_parameters(self.encoder(wav[:, None]).transpose(1, 2))

    def decode(self, z: Tensor) -> Tensor:
        """Waveform (B, T * hop_length) in [-1, 1] of the latents ``z`` (B, T, D)."""
        return self.decoder(z.transpose(1, 2)).clamp(-1, 1)

    def to_prior(self, z: Tensor) -> Tensor:
        """The flow: ``z`` (B, T, D) to the space where the prior is N(0, I). The identity without a flow."""
        return z if self.flow is None else self.flow(z.transpose(1, 2)).transpose(1, 2)

    def from_prior(self, z_prior: Tensor) -> Tensor:
        """The inverse of ``to_prior``."""
        return z_prior if self.flow is None else self.flow.inverse(z_prior.transpose(1, 2)).transpose(1, 2)
