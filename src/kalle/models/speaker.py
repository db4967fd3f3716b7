"""The speaker encoder: level-normalised mels to the embedding of an ECAPA-TDNN (arXiv 2005.07143), which the language model projects.

Legend: B batch, M mel bins, F mel frames, C channels, E embedding size.
Module names are those of the released tensor list, so that released tensors load as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from kalle.checkpoint import check_fields, check_sizes
from kalle.errors import UserError
from kalle.models.mel import LogMel, MelConfig

SPEAKER_MEL = MelConfig(sample_rate=16000, n_fft=1024, hop=256, win=1024, n_mels=80, fmin=0.0, fmax=8000.0)
PEAK = 0.95
"""Largest magnitude of a waveform after normalisation."""
CROP_FRAMES = 200
"""Frames of a training crop."""


class SpeakerMel(nn.Module):
    """Waveform to the log-mels the speaker encoder reads.

    The waveform is scaled to a peak of 0.95 before anything is cut from it, and repeated when it is shorter than a crop.
    Silence stays silence.
    """

    def __init__(self, config: MelConfig = SPEAKER_MEL, crop_frames: int = CROP_FRAMES) -> None:
        super().__init__()
        self.mel = LogMel(config)
        self.crop_samples = crop_frames * config.hop

    def prepare(self, wav: Tensor) -> Tensor:
        """``wav`` (S,) peak-normalised, and tiled to ``crop_samples`` when shorter; fp32. UserError when empty, not 1-D or not finite."""
        if wav.dim() != 1 or wav.shape[0] == 0:
            raise UserError(
                f"speaker reference: got shape {tuple(wav.shape)}, expected (samples,) with at least one; give one mono recording"
            )
        wav = wav.float()
        peak = wav.abs().max()
        if not torch.isfinite(peak):
            raise UserError("speaker reference: got a sample that is not finite, expected a waveform in [-1, 1]; re-read the recording")
        if peak > 0:
            wav = wav * (PEAK / peak)
        if wav.shape[0] < self.crop_samples:
            wav = wav.repeat(-(-self.crop_samples // wav.shape[0]))[: self.crop_samples]
        return wav

    def crop(self, wav: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """A random crop of ``wav`` (S,) as log-mels (n_mels, crop_frames), its place drawn from ``generator``: for training."""
        prepared = self.prepare(wav)
        start = int(torch.randint(prepared.shape[0] - self.crop_samples + 1, (1,), generator=generator))
        return self.mel(prepared[None, start : start + self.crop_samples])[0]

    def forward(self, wav: Tensor) -> Tensor:
        """The whole of ``wav`` (S,), at least one crop long after tiling, as log-mels (n_mels, frames): for synthesis."""
        return self.mel(self.prepare(wav)[None])[0]


VARIANCE_FLOOR = 1e-9


@dataclass(frozen=True)
class SpeakerEncoderConfig:
    """Sizes of the ECAPA-TDNN; the defaults are the published ones."""

    n_mels: int = 80
    """Mel bins of the input."""
    channels: int = 512
    """Channels of the convolutional blocks."""
    embedding_dim: int = 2048
    """Size of the embedding, the language model's hidden size."""
    pooled_channels: int = 1536
    """Channels of the convolution before the pooling."""
    attention_channels: int = 128
    """Channels inside the attentive pooling."""
    scale: int = 8
    """Number of channel groups of a Res2 convolution."""
    dilations: tuple[int, int, int] = (2, 3, 4)
    """Dilation, in frames, of the three Res2 blocks."""

    def __post_init__(self) -> None:
        check_fields(self, "speaker")
        object.__setattr__(self, "dilations", tuple(self.dilations))
        check_sizes(self, "speaker")
        if self.channels % self.scale:
            raise UserError(
                f"speaker encoder: got {self.channels} channels in {self.scale} groups, expected a multiple; change channels or scale"
            )
        if len(self.dilations) != 3:
            raise UserError(f"speaker encoder: got {len(self.dilations)} dilations, expected 3; give one per block")


class ConvUnit(nn.Module):
    """Convolution without bias, ReLU, batch-norm; the number of frames is kept."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        self.bn = nn.BatchNorm1d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, F) to (B, C_out, F)."""
        return self.bn(F.relu(self.conv(x)))


class HierarchicalConv(nn.Module):
    """Hierarchical convolution: group i is convolved together with the result of group i - 1, the last group passes untouched."""

    def __init__(self, channels: int, scale: int, dilation: int) -> None:
        super().__init__()
        self.width = channels // scale
        self.convs = nn.ModuleList(
            nn.Conv1d(self.width, self.width, 3, padding=dilation, dilation=dilation, bias=False) for _ in range(scale - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm1d(self.width) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F) to (B, C, F)."""
        groups = x.split(self.width, dim=1)
        outputs: list[Tensor] = []
        for group, conv, bn in zip(groups, self.convs, self.bns, strict=False):
            outputs.append(bn(F.relu(conv(group + outputs[-1] if outputs else group))))
        return torch.cat([*outputs, groups[-1]], dim=1)


class SqueezeExcitation(nn.Module):
    """Scales every channel by a gate computed from the mean over time."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(channels, channels // 2)
        self.linear2 = nn.Linear(channels // 2, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F) to (B, C, F)."""
        gate = torch.sigmoid(self.linear2(F.relu(self.linear1(x.mean(dim=2)))))
        return x * gate.unsqueeze(2)


def _se_res2_block(channels: int, scale: int, dilation: int) -> nn.Sequential:
    """Unit, Res2 convolution, unit, squeeze-excitation; the residual is added by the encoder."""
    return nn.Sequential(
        ConvUnit(channels, channels, 1),
        HierarchicalConv(channels, scale, dilation),
        ConvUnit(channels, channels, 1),
        SqueezeExcitation(channels),
    )


class AttentiveStatistics(nn.Module):
    """Attention-weighted mean and standard deviation over time, per channel."""

    def __init__(self, channels: int, attention_channels: int) -> None:
        super().__init__()
        self.linear1 = nn.Conv1d(channels, attention_channels, 1)
        self.linear2 = nn.Conv1d(attention_channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, F) to (B, 2C), means first; fp32, because E[x^2] - E[x]^2 cancels in half precision."""
        weights = torch.softmax(self.linear2(torch.tanh(self.linear1(x))).float(), dim=2)
        values = x.float()
        mean = (weights * values).sum(dim=2)
        variance = (weights * values.square()).sum(dim=2) - mean.square()
        return torch.cat([mean, variance.clamp(min=VARIANCE_FLOOR).sqrt()], dim=1)


class SpeakerEncoder(nn.Module):
    """ECAPA-TDNN: log-mel frames of one speaker to an embedding.

    In training mode batch-norm uses the batch's statistics. The two norms after the pooling have one value per utterance,
    so for a batch of one utterance they use (and do not update) their running statistics.
    """

    def __init__(self, config: SpeakerEncoderConfig) -> None:
        super().__init__()
        self.config = config
        channels, scale = config.channels, config.scale
        self.layer1 = ConvUnit(config.n_mels, channels, 5)
        self.layer2, self.layer3, self.layer4 = (_se_res2_block(channels, scale, dilation) for dilation in config.dilations)
        self.conv = nn.Conv1d(3 * channels, config.pooled_channels, 1)
        self.pooling = AttentiveStatistics(config.pooled_channels, config.attention_channels)
        self.bn1 = nn.BatchNorm1d(2 * config.pooled_channels)
        self.linear = nn.Linear(2 * config.pooled_channels, config.embedding_dim)
        self.bn2 = nn.BatchNorm1d(config.embedding_dim)

    def forward(self, mels: Tensor) -> Tensor:
        """``mels`` (B, M, F), every frame valid, to embeddings (B, E); ValueError for another number of mel bins."""
        if mels.dim() != 3 or mels.shape[1] != self.config.n_mels:
            raise ValueError(f"speaker mels: got shape {tuple(mels.shape)}, expected (batch, {self.config.n_mels}, frames)")
        first = self.layer1(mels)
        total, outputs = first, []
        for block in (self.layer2, self.layer3, self.layer4):
            output = block(total) + total
            outputs.append(output)
            total = total + output
        pooled = self.pooling(F.relu(self.conv(torch.cat(outputs, dim=1))))
        normalised = _utterance_norm(self.bn1, pooled.to(self.bn1.weight.dtype))
        return _utterance_norm(self.bn2, self.linear(normalised))


def _utterance_norm(norm: nn.BatchNorm1d, x: Tensor) -> Tensor:
    """Batch-norm of (B, C); a single utterance has no variance to train with, so it takes the running statistics."""
    if norm.training and x.shape[0] == 1:
        return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training=False, eps=norm.eps)
    return norm(x)
