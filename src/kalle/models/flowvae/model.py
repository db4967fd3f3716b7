"""The Flow-VAE: speech to a sequence of Gaussians and back (KALL-E paper, section 3), with its encoder and its flow.

The encoder maps a waveform to the parameters of the posterior; the volume-preserving flow turns a sample of the posterior into one of the
prior N(0, I). The decoders have modules of their own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from kalle.checkpoint import CONFIG_NAME, load_module, part_folder, read_json, save_part
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.flowvae.bigvgan import BigVGANDecoder
from kalle.models.flowvae.config import BigVGANConfig, EncoderConfig, FlowConfig, FlowVAEConfig, ISTFTConfig
from kalle.models.flowvae.istft import ISTFTDecoder
from kalle.models.flowvae.streaming import DecoderForInference
from kalle.models.layers import SPEECH_RMS, CausalConv1d, in_full_precision, same_conv, variance_preserving

PART = "flowvae"
_STAGE_SLOPE = 0.2
_RESIDUAL_SLOPE = 0.01
_INITIAL_LOG_STD = -1.0
"""The posterior starts narrower than the spread of its means, so that the decoder receives the signal from the first step."""


class ResidualLayer(nn.Module):
    """Dilated then plain convolution, added to the input: (B, C, T) -> (B, C, T)."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.dilated = same_conv(channels, channels, 3, dilation)
        self.plain = same_conv(channels, channels, 3)
        self.activation = nn.LeakyReLU(_RESIDUAL_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.plain(self.activation(self.dilated(self.activation(x))))


class EncoderStage(nn.Module):
    """Strided convolution, residual stack, activation: (B, C, T) -> (B, C', about T / stride)."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, residual_layers: int) -> None:
        super().__init__()
        kernel_size = 2 * stride
        self.down = weight_norm(nn.Conv1d(channels_in, channels_out, kernel_size, stride, padding=(kernel_size - 1) // 2))
        self.residual = nn.Sequential(*(ResidualLayer(channels_out, 2**i) for i in range(residual_layers)))
        self.activation = nn.LeakyReLU(_STAGE_SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.residual(self.down(x)))


class Encoder(nn.Module):
    """Waveform (B, 1, S) to parameters (B, 2D, T), mean then log_std. Not causal; the input is not padded to a whole frame."""

    def __init__(self, config: EncoderConfig, latent_dim: int) -> None:
        super().__init__()
        widths = config.channels
        self.conv_in = same_conv(1, widths[0], 3)
        self.activation = nn.LeakyReLU(_STAGE_SLOPE)
        self.stages = nn.Sequential(
            *(
                EncoderStage(before, after, stride, config.residual_layers)
                for before, after, stride in zip(widths[:-1], widths[1:], config.strides, strict=True)
            )
        )
        self.conv_out = same_conv(widths[-1], 2 * latent_dim, 3)
        if not self.conv_in.weight.is_meta:  # which is about to be given its weights
            self._initialise()

    def forward(self, wav: Tensor) -> Tensor:
        x = self.stages(self.activation(self.conv_in(wav)))
        # Posteriors may be narrower than what bf16 resolves of their means.
        return in_full_precision(self.conv_out, x)

    @torch.no_grad()
    def _initialise(self) -> None:
        """Start with signals of unit variance at every depth.

        torch's default shrinks them by about the square root of 3 in each of the eight unnormalised convolutions on the
        main path; the posterior then hardly depends on the input and the first minutes of training are lost.
        """
        variance_preserving(self.conv_in, 1 / SPEECH_RMS)
        for stage in self.stages:
            assert isinstance(stage, EncoderStage)
            variance_preserving(stage.down, nn.init.calculate_gain("leaky_relu", _STAGE_SLOPE))
            for layer in stage.residual:
                assert isinstance(layer, ResidualLayer)
                variance_preserving(layer.dilated, nn.init.calculate_gain("leaky_relu", _RESIDUAL_SLOPE))
                variance_preserving(layer.plain, 1 / math.sqrt(2 * len(stage.residual)))
        variance_preserving(self.conv_out, 1.0)
        assert isinstance(self.conv_out, nn.Conv1d)
        weight, bias = self.conv_out.weight.clone(), self.conv_out.bias
        assert bias is not None
        log_std_rows = slice(len(bias) // 2, None)
        weight[log_std_rows] *= 0.01
        self.conv_out.weight = weight
        bias[log_std_rows] = _INITIAL_LOG_STD


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


@dataclass(frozen=True)
class FrameWindow:
    """As many neighbouring frames of each row, from another place in each."""

    starts: Tensor
    """First frame of each row, (B,) of integers, on the device of what is cut."""
    frames: int
    """Length in frames."""

    def of(self, x: Tensor, unit: int = 1) -> Tensor:
        """Cut ``x`` (B, N, ...), of ``unit`` entries a frame, to (B, frames * unit, ...)."""
        places = self.starts[:, None] * unit + torch.arange(self.frames * unit, device=x.device)
        return x[torch.arange(len(x), device=x.device)[:, None], places]


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
    """Reconstruction (B, T * hop_length), of ``window`` alone where one was given; not clipped, so that every sample keeps its gradient."""
    second: Tensor | None = None
    """Another of the same sample, with the decoder's noise from another place, where one was asked for."""
    log_pitch: Tensor | None = None
    """Predicted logarithm of the pitch in bins, (B, STFT frames), of a decoder with harmonics."""


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

    def with_sources(self) -> FlowVAE:
        """The same weights in a Flow-VAE whose inverse-STFT decoder has noise and harmonics, as a start for training them.

        What it has already is kept. Harmonics get the magnitudes of the spectrum, which gives way to them; noise is hardly heard yet.
        UserError for another decoder.
        """
        if not isinstance(self.config.decoder, ISTFTConfig):
            raise UserError("sources: got the paper's decoder, expected an inverse-STFT decoder (decoder.kind istft); take such weights")
        wider = FlowVAE(replace(self.config, decoder=replace(self.config.decoder, noise=True, harmonics=True)))
        wider.load_state_dict(self.state_dict(), strict=wider.config == self.config)
        if not self.config.has_harmonics:
            assert isinstance(wider.decoder, ISTFTDecoder), type(wider.decoder)
            wider.decoder.head.hand_over()
        return wider.train(self.training)

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

    def forward(
        self,
        wav: Tensor,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        window: FrameWindow | None = None,
        noise_start: int | Tensor = 0,
        second_noise_start: Tensor | None = None,
        pitch: Tensor | None = None,
    ) -> FlowVAEOutput:
        """Encode ``wav`` (B, S), sample once (``noise`` (B, T, D) or ``generator``), and send the sample to decoder and flow.

        With ``window`` the decoder gets those frames of each row alone; encoder and flow have all. The rest is for inverse-STFT decoders:
        ``noise_start`` (B,) is the STFT frame of its own noise that it begins with; with ``second_noise_start`` (B,) it decodes once more
        from there; ``pitch`` (B, STFT frames), in bins, takes the place of the predicted one where it is not NaN.
        """
        posterior = self.encode(wav)
        z = posterior.sample(noise, generator=generator)
        prior, latents = self.to_prior(z), (z if window is None else window.of(z)).transpose(1, 2)
        if not isinstance(self.decoder, ISTFTDecoder):
            return FlowVAEOutput(posterior, z, prior, self.decoder(latents))
        head, hidden = self.decoder.head, self.decoder.hidden(latents)
        second = None if second_noise_start is None else head(hidden, second_noise_start, pitch)
        log_pitch = head.log_pitch(hidden) if self.config.has_harmonics else None
        return FlowVAEOutput(posterior, z, prior, head(hidden, noise_start, pitch), second, log_pitch)

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
