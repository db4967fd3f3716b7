"""WavLM-large fine-tuned for speaker verification: the speaker embedding of the Seed-TTS protocol, from a checkpoint of its authors.

WavLM (Chen et al., arXiv 2110.13900) under a weighted sum of its hidden states and an ECAPA-TDNN head (Desplanques et al., arXiv
2005.07143) of 512 channels. The names of the head's tensors are those of the published checkpoint ``wavlm_large_finetune.pth``.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation.metrics import MetricError
from kalle.extras import require

MOST_SHOWN = 5
"""Tensors that an error names; each of the others has a line of the log."""
logger = logging.getLogger(__name__)
GET = "the speaker verification page of microsoft/UniSpeech (wavlm_large_finetune.pth)"
LEAST_SAMPLES = 400
"""One frame of WavLM."""
FRONT = "feature_extract.model."
"""Before the names of WavLM's own tensors in the checkpoint."""
_STRIDES = (5, 2, 2, 2, 2, 2, 2)
_RENAMED = (
    (r"^feature_extractor\.conv_layers\.(\d+)\.0\.", r"feature_extractor.conv_layers.\1.conv."),
    (r"^feature_extractor\.conv_layers\.(\d+)\.2(\.1)?\.", r"feature_extractor.conv_layers.\1.layer_norm."),
    (r"^post_extract_proj\.", "feature_projection.projection."),
    (r"^layer_norm\.", "feature_projection.layer_norm."),
    (r"^encoder\.pos_conv\.0\.weight_g$", "encoder.pos_conv_embed.conv.parametrizations.weight.original0"),
    (r"^encoder\.pos_conv\.0\.weight_v$", "encoder.pos_conv_embed.conv.parametrizations.weight.original1"),
    (r"^encoder\.pos_conv\.0\.", "encoder.pos_conv_embed.conv."),
    (r"\.self_attn\.grep_linear\.", ".attention.gru_rel_pos_linear."),
    (r"\.self_attn\.grep_a$", ".attention.gru_rel_pos_const"),
    (r"\.self_attn\.relative_attention_bias\.", ".attention.rel_attn_embed."),
    (r"\.self_attn\.", ".attention."),
    (r"\.self_attn_layer_norm\.", ".layer_norm."),
    (r"\.fc1\.", ".feed_forward.intermediate_dense."),
    (r"\.fc2\.", ".feed_forward.output_dense."),
    (r"^mask_emb$", "masked_spec_embed"),
)
"""WavLM's tensors as its authors name them, and as transformers does."""


def transformers_name(name: str) -> str:
    """The name in transformers' WavLMModel of one of WavLM's tensors."""
    for pattern, other in _RENAMED:
        name = re.sub(pattern, other, name)
    return name


class ConvReluNorm(nn.Module):
    """Convolution, ReLU, batch normalisation: (B, C, T) to (B, C', T)."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, kernel, padding=kernel // 2)
        self.bn = nn.BatchNorm1d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C', T)."""
        return self.bn(F.relu(self.conv(x)))


class Res2Conv(nn.Module):
    """Res2Net's convolutions over ``scale`` groups of channels, each of which also hears the one before: (B, C, T) to the same."""

    def __init__(self, channels: int, kernel: int, dilation: int, scale: int = 8) -> None:
        super().__init__()
        self.width = channels // scale
        padding = dilation * (kernel // 2)
        self.convs = nn.ModuleList(nn.Conv1d(self.width, self.width, kernel, padding=padding, dilation=dilation) for _ in range(scale - 1))
        self.bns = nn.ModuleList(nn.BatchNorm1d(self.width) for _ in range(scale - 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T)."""
        *groups, last = x.split(self.width, dim=1)
        outputs: list[Tensor] = []
        for group, conv, norm in zip(groups, self.convs, self.bns, strict=True):
            outputs.append(norm(F.relu(conv(group + outputs[-1] if outputs else group))))
        return torch.cat([*outputs, last], dim=1)


class ChannelGate(nn.Module):
    """Squeeze and excitation: scales each channel of (B, C, T) by what its mean over time says."""

    def __init__(self, channels: int, bottleneck: int = 128) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(channels, bottleneck), nn.Linear(bottleneck, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T)."""
        gate = torch.sigmoid(self.linear2(F.relu(self.linear1(x.mean(dim=2)))))
        return x * gate[..., None]


class Block(nn.Module):
    """ECAPA's SE-Res2Block with its residual: (B, C, T) to the same. The attributes have the names of the checkpoint."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.Conv1dReluBn1 = ConvReluNorm(channels, channels)
        self.Res2Conv1dReluBn = Res2Conv(channels, 3, dilation)
        self.Conv1dReluBn2 = ConvReluNorm(channels, channels)
        self.SE_Connect = ChannelGate(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, T)."""
        return x + self.SE_Connect(self.Conv1dReluBn2(self.Res2Conv1dReluBn(self.Conv1dReluBn1(x))))


class AttentivePooling(nn.Module):
    """Mean and standard deviation over time under attention (Okabe et al., arXiv 1803.10963): (B, C, T) to (B, 2C)."""

    def __init__(self, channels: int, attention: int = 128) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Conv1d(channels, attention, 1), nn.Conv1d(attention, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 2C)."""
        weight = torch.softmax(self.linear2(torch.tanh(self.linear1(x))), dim=2)
        mean = (weight * x).sum(dim=2)
        variance = (weight * x**2).sum(dim=2) - mean**2
        return torch.cat([mean, variance.clamp(min=1e-9).sqrt()], dim=1)


class EcapaHead(nn.Module):
    """Hidden states (L, B, T, W) to embeddings (B, E)."""

    def __init__(self, layers: int, width: int, channels: int, pooled: int, embedding: int) -> None:
        super().__init__()
        self.feature_weight = nn.Parameter(torch.zeros(layers))
        self.instance_norm = nn.InstanceNorm1d(width)
        self.layer1 = ConvReluNorm(width, channels, 5)
        self.layer2, self.layer3, self.layer4 = (Block(channels, dilation) for dilation in (2, 3, 4))
        self.conv = nn.Conv1d(3 * channels, pooled, 1)
        self.pooling = AttentivePooling(pooled)
        self.bn = nn.BatchNorm1d(2 * pooled)
        self.linear = nn.Linear(2 * pooled, embedding)

    def forward(self, states: Tensor) -> Tensor:
        """(B, E)."""
        mixed = torch.einsum("l,lbtw->bwt", torch.softmax(self.feature_weight, dim=0), states) + 1e-6
        first = self.layer1(self.instance_norm(mixed))
        second = self.layer2(first)
        third = self.layer3(second)
        joined = F.relu(self.conv(torch.cat([second, third, self.layer4(third)], dim=1)))
        return self.linear(self.bn(self.pooling(joined)))


class WavLMSpeaker:
    """The speaker embedding (256,) of the Seed-TTS protocol from ``checkpoint``, a file of the authors' state; all sizes follow from it.

    Tensors of the checkpoint that the network has no place for (the training loss's, say) are logged one by one; one that the network
    misses, or of another shape, is a UserError that lists them all.
    """

    def __init__(self, checkpoint: str | Path, device: str = "cpu") -> None:
        require("transformers", "eval", "speaker similarity with WavLM (metrics.sim)")
        self.checkpoint, self.device = Path(checkpoint), torch.device(device)
        if not self.checkpoint.is_file():
            raise UserError(f"speaker model not found: got '{checkpoint}', expected the file of a checkpoint; get it from {GET}")
        state = _read(self.checkpoint)
        front = {transformers_name(name.removeprefix(FRONT)): value for name, value in state.items() if name.startswith(FRONT)}
        head = {name: value for name, value in state.items() if not name.startswith(FRONT)}
        self.wavlm, self.head = self._networks(front, head)
        unmatched = [*_load(self.wavlm, front, FRONT), *_load(self.head, head, "")]
        self.unmatched = tuple(name for name, problem in unmatched if problem == "unused")
        wrong = [f"{name}: {problem}" for name, problem in unmatched if problem != "unused"]
        if wrong:
            for problem in wrong:
                logger.warning("%s: tensor %s", self.checkpoint.name, problem)
            shown = "; ".join(wrong[:MOST_SHOWN]) + ("; …" if len(wrong) > MOST_SHOWN else "")
            raise UserError(f"'{checkpoint}' does not fit WavLM with an ECAPA head ({len(wrong)} tensors: {shown}); get it from {GET}")
        for name in self.unmatched:
            logger.info("%s: tensor %s is not used", self.checkpoint.name, name)
        with self.checkpoint.open("rb") as file:
            self.sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        self.wavlm.to(self.device).eval()
        self.head.to(self.device).eval()

    def _networks(self, front: Mapping[str, Tensor], head: Mapping[str, Tensor]) -> tuple[Any, EcapaHead]:
        from transformers import WavLMConfig, WavLMModel

        def shape(state: Mapping[str, Tensor], name: str, prefix: str = "") -> torch.Size:
            if name not in state:
                raise UserError(f"'{self.checkpoint}' is no WavLM with an ECAPA head: it has no {prefix}{name}; get it from {GET}")
            return state[name].shape

        convs = [shape(front, f"feature_extractor.conv_layers.{index}.conv.weight", FRONT) for index in range(len(_STRIDES))]
        position = shape(front, "encoder.pos_conv_embed.conv.parametrizations.weight.original1", FRONT)
        width = shape(front, "feature_projection.projection.weight", FRONT)[0]
        layers = len({match[1] for name in front if (match := re.match(r"encoder\.layers\.(\d+)\.", name))})
        config = WavLMConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=shape(front, "encoder.layers.0.attention.gru_rel_pos_const", FRONT)[1],
            intermediate_size=shape(front, "encoder.layers.0.feed_forward.intermediate_dense.weight", FRONT)[0],
            num_buckets=shape(front, "encoder.layers.0.attention.rel_attn_embed.weight", FRONT)[0],
            conv_dim=tuple(size[0] for size in convs),
            conv_kernel=tuple(size[2] for size in convs),
            conv_stride=_STRIDES,
            conv_bias="feature_extractor.conv_layers.0.conv.bias" in front,
            feat_extract_norm="layer" if "feature_extractor.conv_layers.1.layer_norm.weight" in front else "group",
            num_conv_pos_embeddings=position[2],
            num_conv_pos_embedding_groups=position[0] // position[1],
            do_stable_layer_norm=True,
            mask_time_prob=0.0,
        )
        pooled, joined, _ = shape(head, "conv.weight")
        return WavLMModel(config), EcapaHead(layers + 1, width, joined // 3, pooled, shape(head, "linear.weight")[0])

    @torch.no_grad()
    def __call__(self, audio: Audio) -> NDArray[np.float32]:
        """Embedding (E,) of mono float32 (S,) at 16 kHz. MetricError for silence or less than one frame."""
        if len(audio) < LEAST_SAMPLES or not audio.any():
            raise MetricError(f"no voice to embed in {len(audio)} samples")
        wav = torch.from_numpy(np.ascontiguousarray(audio)).to(self.device)
        states = self.wavlm(F.layer_norm(wav, wav.shape)[None], output_hidden_states=True).hidden_states
        return np.asarray(self.head(torch.stack(states))[0].cpu(), dtype=np.float32)

    def describe(self) -> Mapping[str, object]:
        """Checkpoint, its hash and the tensors that were not used."""
        return {"model": f"wavlm {self.checkpoint.name}", "weights_sha256": self.sha256[:16], "unused_tensors": list(self.unmatched)}


def _read(path: Path) -> dict[str, Tensor]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise UserError(f"speaker model '{path}' is not a checkpoint ({' '.join(str(error).split())[:120]}); get it from {GET}") from None
    state = loaded.get("model", loaded) if isinstance(loaded, dict) else {}
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def _load(module: nn.Module, state: Mapping[str, Tensor], prefix: str) -> list[tuple[str, str]]:
    """Load what fits; every other tensor of either side with its problem, "unused" where ``module`` has no place for it."""
    own = module.state_dict()
    problems = [(prefix + name, "unused") for name in state if name not in own]
    problems += [(prefix + name, "missing") for name in own if name not in state and not name.endswith("num_batches_tracked")]
    different = [name for name in own if name in state and own[name].shape != state[name].shape]
    problems += [(prefix + name, f"got {tuple(state[name].shape)}, expected {tuple(own[name].shape)}") for name in different]
    module.load_state_dict({name: state[name] for name in own if name in state and name not in different}, strict=False)
    return problems
