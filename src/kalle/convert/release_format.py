"""How the release configures its models and names their tensors, and what that is called here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from kalle.checkpoint import first_of
from kalle.errors import UserError
from kalle.models.backbone import BackboneConfig
from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowConfig, FlowVAEConfig
from kalle.models.lm import KalleLMConfig
from kalle.models.speaker import SpeakerEncoderConfig

RELEASED_BACKBONE: Mapping[str, Any] = {
    "attention_bias": False,
    "bos_token_id": 128000,
    "dtype": "float16",
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "tie_word_embeddings": True,
    "vocab_size": 128264,
}
"""Llama-3.2-1B with the tokens of KALL-E: the configuration of the released language model."""

_SIZES = (
    "downsample_channels",
    "downsample_rates",
    "flow_hidden_channels",
    "latent_dim",
    "resblock_dilation_sizes",
    "resblock_kernel_sizes",
    "sampling_rate",
    "upsample_initial_channel",
    "upsample_kernel_sizes",
    "upsample_rates",
)
_FIXED: Mapping[str, Any] = {"resblock": "1", "activation": "snakebeta", "snake_logscale": True, "use_vae": True, "causal": True}
"""Switches of the release with the only value that it uses."""
TRAINING_KEYS = (
    "resolutions",
    "mpd_reshapes",
    "use_spectral_norm",
    "discriminator_channel_mult",
    "num_mels",
    "num_freq",
    "n_fft",
    "hop_size",
    "win_size",
    "fmin",
    "fmax",
    "fmax_for_loss",
)
"""Discriminators and mel loss of the released training: no part of the module, kept for the way back."""


def flowvae_config(values: Mapping[str, Any], source: str | Path) -> FlowVAEConfig:
    """Our configuration for the released JSON ``values``; a UserError lists keys that are unknown or missing, or a value we lack."""
    _check_keys(values, source)
    for key, fixed in _FIXED.items():
        if values[key] != fixed:
            raise UserError(f"not supported in '{source}': {key} is {values[key]!r}, expected {fixed!r}; give the published JSON")
    strides, kernels = _integers(values, "upsample_rates", source), _integers(values, "upsample_kernel_sizes", source)
    if kernels != tuple(2 * stride for stride in strides):
        raise UserError(
            f"not supported in '{source}': upsample_kernel_sizes is {list(kernels)}, expected twice the upsample_rates; check the JSON"
        )
    return FlowVAEConfig(
        sample_rate=_integer(values, "sampling_rate", source),
        latent_dim=_integer(values, "latent_dim", source),
        encoder=EncoderConfig(_integers(values, "downsample_channels", source), _integers(values, "downsample_rates", source)),
        flow=FlowConfig(_integer(values, "flow_hidden_channels", source)),
        decoder=BigVGANConfig(
            initial_channels=_integer(values, "upsample_initial_channel", source),
            strides=strides,
            block_kernel_sizes=_integers(values, "resblock_kernel_sizes", source),
            block_dilations=_dilations(values, source),
        ),
    )


def released_flowvae_config(config: FlowVAEConfig, source: str | Path) -> dict[str, Any]:
    """The released JSON of ``config``, without training keys; a UserError when the release cannot express it."""
    decoder, flow = config.decoder, config.flow
    if not isinstance(decoder, BigVGANConfig) or flow is None:
        got = f"decoder.kind {decoder.kind!r} and {'no flow' if flow is None else 'a flow'}"
        raise UserError(f"no released format for '{source}': got {got}, expected 'bigvgan' and a flow; the release knows nothing else")
    values = {
        **_FIXED,
        "upsample_rates": list(decoder.strides),
        "upsample_kernel_sizes": [2 * stride for stride in decoder.strides],
        "upsample_initial_channel": decoder.initial_channels,
        "resblock_kernel_sizes": list(decoder.block_kernel_sizes),
        "resblock_dilation_sizes": [list(decoder.block_dilations)] * len(decoder.block_kernel_sizes),
        "downsample_rates": list(config.encoder.strides),
        "downsample_channels": list(config.encoder.channels),
        "latent_dim": config.latent_dim,
        "flow_hidden_channels": flow.hidden_channels,
        "sampling_rate": config.sample_rate,
    }
    if flowvae_config(values, source) != config:
        raise UserError(
            f"no released format for '{source}': its JSON has no residual_layers, couplings, kernel_size, wavenet_layers, "
            "final_activation, expected their defaults; such a model stays in our format"
        )
    return values


def lm_config(backbone: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str | Path) -> KalleLMConfig:
    """The configuration of released language model ``tensors`` with the Llama values ``backbone``.

    The latent size, and the speaker encoder's sizes when it is there, are read from the shapes. A tensor that is missing
    leaves its size at the default; the comparison of all tensors then reports it.
    """
    BackboneConfig.of(backbone, source)
    latent_dim = _size(tensors, "audio_linear.weight", 1, KalleLMConfig.latent_dim)
    return KalleLMConfig(backbone=dict(backbone), latent_dim=latent_dim, speaker=speaker_config(tensors))


def speaker_config(tensors: Mapping[str, Tensor]) -> SpeakerEncoderConfig | None:
    """Sizes of the speaker encoder in released ``tensors``, None when there is none; the dilations leave no trace in shapes."""
    if not any(name.startswith(("speaker_encoder.", "speaker_cond_disp_linear.")) for name in tensors):
        return None
    default = SpeakerEncoderConfig()
    splits = sum(1 for name in tensors if name.startswith("speaker_encoder.layer2.1.convs."))
    return SpeakerEncoderConfig(
        n_mels=_size(tensors, "speaker_encoder.layer1.conv.weight", 1, default.n_mels),
        channels=_size(tensors, "speaker_encoder.layer1.conv.weight", 0, default.channels),
        embedding_dim=_size(tensors, "speaker_encoder.linear.weight", 0, default.embedding_dim),
        pooled_channels=_size(tensors, "speaker_encoder.conv.weight", 0, default.pooled_channels),
        attention_channels=_size(tensors, "speaker_encoder.pooling.linear1.weight", 0, default.attention_channels),
        scale=splits + 1 if splits else default.scale,
    )


def _check_keys(values: Mapping[str, Any], source: str | Path) -> None:
    required = {*_SIZES, *_FIXED}
    valid = {*required, *TRAINING_KEYS}
    unknown = sorted(set(values) - valid)
    if unknown:
        raise UserError(
            f"unknown key {first_of(f'{name!r:.60}' for name in unknown)} in '{source}'; valid keys: {', '.join(sorted(valid))}"
        )
    missing = sorted(required - set(values))
    if missing:
        raise UserError(f"missing key {', '.join(map(repr, missing))} in '{source}'; give the JSON that was published with the weights")


def _integer(values: Mapping[str, Any], key: str, source: str | Path) -> int:
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UserError(f"bad value in '{source}': {key} is {value!r}, expected a positive integer; check the JSON")
    return value


def _integers(values: Mapping[str, Any], key: str, source: str | Path) -> tuple[int, ...]:
    given = values[key]
    if not isinstance(given, list) or not given or any(isinstance(item, bool) or not isinstance(item, int) or item < 1 for item in given):
        raise UserError(f"bad value in '{source}': {key} is {given!r}, expected a list of positive integers; check the JSON")
    return tuple(given)


def _dilations(values: Mapping[str, Any], source: str | Path) -> tuple[int, ...]:
    """The dilations all blocks share."""
    given = values["resblock_dilation_sizes"]
    blocks = len(_integers(values, "resblock_kernel_sizes", source))
    if not isinstance(given, list) or len(given) != blocks or any(row != given[0] for row in given):
        raise UserError(f"not supported in '{source}': resblock_dilation_sizes is {given!r}, expected {blocks} equal lists; check the JSON")
    return _integers({"resblock_dilation_sizes": given[0]}, "resblock_dilation_sizes", source)


def _size(tensors: Mapping[str, Tensor], name: str, axis: int, default: int) -> int:
    tensor = tensors.get(name)
    return int(tensor.shape[axis]) if tensor is not None and tensor.dim() > axis else default


_CONV = r"(bias|weight_g|weight_v)"
_PARAMETRISED = r"(bias|parametrizations\.weight\.original0|parametrizations\.weight\.original1)"
_NORMED = {"bias": "bias", "weight_g": "parametrizations.weight.original0", "weight_v": "parametrizations.weight.original1"}
_RELEASED_NORMED = {ours: released for released, ours in _NORMED.items()}
_ENCODER_STAGE = 3
"""A stage takes three places in the release's sequence: strided convolution, residual stack, activation."""

Rule = tuple[str, Callable[[re.Match[str]], str]]


def _flowvae_rules(stages: int, blocks_per_stage: int) -> list[Rule]:
    last = 2 + _ENCODER_STAGE * stages

    def encoder_conv(m: re.Match[str]) -> str:
        index = int(m[1])
        if index in (0, last):
            return f"encoder.conv_{'in' if index == 0 else 'out'}.{_NORMED[m[2]]}"
        return f"encoder.stages.{(index - 2) // _ENCODER_STAGE}.down.{_NORMED[m[2]]}"

    def encoder_residual(m: re.Match[str]) -> str:
        part = {"1": "dilated", "3": "plain"}[m[3]]
        return f"encoder.stages.{int(m[1]) // _ENCODER_STAGE - 1}.residual.{m[2]}.{part}.{_NORMED[m[4]]}"

    def block(m: re.Match[str]) -> str:
        stage, index = divmod(int(m[1]), blocks_per_stage)
        return f"decoder.stages.{stage}.blocks.{index}."

    return [
        (rf"audio_encoder\.generator\.(\d+)\.layer\.{_CONV}", encoder_conv),
        (rf"audio_encoder\.generator\.(\d+)\.layers\.(\d+)\.([13])\.{_CONV}", encoder_residual),
        (r"flow\.flows\.(\d+)\.(pre|post)\.(weight|bias)", lambda m: f"flow.couplings.{int(m[1]) // 2}.{m[2]}.{m[3]}"),
        (
            rf"flow\.flows\.(\d+)\.enc\.in_layers\.(\d+)\.{_CONV}",
            lambda m: f"flow.couplings.{int(m[1]) // 2}.wavenet.gates.{m[2]}.conv.{_NORMED[m[3]]}",
        ),
        (
            rf"flow\.flows\.(\d+)\.enc\.res_skip_layers\.(\d+)\.{_CONV}",
            lambda m: f"flow.couplings.{int(m[1]) // 2}.wavenet.res_skips.{m[2]}.{_NORMED[m[3]]}",
        ),
        (rf"conv_pre\.{_CONV}", lambda m: f"decoder.conv_in.{_NORMED[m[1]]}"),
        (rf"conv_post\.{_CONV}", lambda m: f"decoder.conv_out.conv.{_NORMED[m[1]]}"),
        (rf"ups\.(\d+)\.0\.{_CONV}", lambda m: f"decoder.stages.{m[1]}.up.conv.{_NORMED[m[2]]}"),
        (rf"resblocks\.(\d+)\.convs1\.(\d+)\.{_CONV}", lambda m: f"{block(m)}dilated.{m[2]}.conv.{_NORMED[m[3]]}"),
        (rf"resblocks\.(\d+)\.convs2\.(\d+)\.{_CONV}", lambda m: f"{block(m)}plain.{m[2]}.conv.{_NORMED[m[3]]}"),
        (r"resblocks\.(\d+)\.activations\.(\d+)\.(.+)", lambda m: f"{block(m)}activations.{m[2]}.{m[3]}"),
        (r"activation_post\.(.+)", lambda m: f"decoder.activation_out.{m[1]}"),
    ]


def _released_flowvae_rules(stages: int, blocks_per_stage: int) -> list[Rule]:
    def encoder_end(m: re.Match[str]) -> str:
        index = 0 if m[1] == "in" else 2 + _ENCODER_STAGE * stages
        return f"audio_encoder.generator.{index}.layer.{_RELEASED_NORMED[m[2]]}"

    def encoder_residual(m: re.Match[str]) -> str:
        part = {"dilated": 1, "plain": 3}[m[3]]
        return f"audio_encoder.generator.{_ENCODER_STAGE * (int(m[1]) + 1)}.layers.{m[2]}.{part}.{_RELEASED_NORMED[m[4]]}"

    def block(m: re.Match[str]) -> str:
        return f"resblocks.{int(m[1]) * blocks_per_stage + int(m[2])}."

    return [
        (rf"encoder\.conv_(in|out)\.{_PARAMETRISED}", encoder_end),
        (
            rf"encoder\.stages\.(\d+)\.down\.{_PARAMETRISED}",
            lambda m: f"audio_encoder.generator.{2 + _ENCODER_STAGE * int(m[1])}.layer.{_RELEASED_NORMED[m[2]]}",
        ),
        (rf"encoder\.stages\.(\d+)\.residual\.(\d+)\.(dilated|plain)\.{_PARAMETRISED}", encoder_residual),
        (r"flow\.couplings\.(\d+)\.(pre|post)\.(weight|bias)", lambda m: f"flow.flows.{2 * int(m[1])}.{m[2]}.{m[3]}"),
        (
            rf"flow\.couplings\.(\d+)\.wavenet\.gates\.(\d+)\.conv\.{_PARAMETRISED}",
            lambda m: f"flow.flows.{2 * int(m[1])}.enc.in_layers.{m[2]}.{_RELEASED_NORMED[m[3]]}",
        ),
        (
            rf"flow\.couplings\.(\d+)\.wavenet\.res_skips\.(\d+)\.{_PARAMETRISED}",
            lambda m: f"flow.flows.{2 * int(m[1])}.enc.res_skip_layers.{m[2]}.{_RELEASED_NORMED[m[3]]}",
        ),
        (rf"decoder\.conv_in\.{_PARAMETRISED}", lambda m: f"conv_pre.{_RELEASED_NORMED[m[1]]}"),
        (rf"decoder\.conv_out\.conv\.{_PARAMETRISED}", lambda m: f"conv_post.{_RELEASED_NORMED[m[1]]}"),
        (rf"decoder\.stages\.(\d+)\.up\.conv\.{_PARAMETRISED}", lambda m: f"ups.{m[1]}.0.{_RELEASED_NORMED[m[2]]}"),
        (
            rf"decoder\.stages\.(\d+)\.blocks\.(\d+)\.(dilated|plain)\.(\d+)\.conv\.{_PARAMETRISED}",
            lambda m: f"{block(m)}{ {'dilated': 'convs1', 'plain': 'convs2'}[m[3]] }.{m[4]}.{_RELEASED_NORMED[m[5]]}",
        ),
        (r"decoder\.stages\.(\d+)\.blocks\.(\d+)\.activations\.(\d+)\.(.+)", lambda m: f"{block(m)}activations.{m[3]}.{m[4]}"),
        (r"decoder\.activation_out\.(.+)", lambda m: f"activation_post.{m[1]}"),
    ]


_LM_RULES: list[Rule] = [
    (r"base_model\.model\.(.+)", lambda m: f"backbone.{m[1]}"),
    (r"(audio_linear|distribution_linear)\.(weight|bias)", lambda m: f"{m[1]}.{m[2]}"),
    (r"speaker_encoder\.(.+)", lambda m: f"speaker_encoder.{m[1]}"),
    (r"speaker_cond_disp_linear\.(weight|bias)", lambda m: f"speaker_projection.{m[1]}"),
]

_RELEASED_LM_RULES: list[Rule] = [
    (r"backbone\.(.+)", lambda m: f"base_model.model.{m[1]}"),
    (r"(audio_linear|distribution_linear)\.(weight|bias)", lambda m: f"{m[1]}.{m[2]}"),
    (r"speaker_encoder\.(.+)", lambda m: f"speaker_encoder.{m[1]}"),
    (r"speaker_projection\.(weight|bias)", lambda m: f"speaker_cond_disp_linear.{m[1]}"),
]

LM_HEAD = "base_model.lm_head.weight"
"""The release stores the tied output embedding a second time; we store it once."""
LM_EMBEDDING = "base_model.model.embed_tokens.weight"


def _renamed(name: str, rules: list[Rule]) -> str | None:
    matches = ((re.fullmatch(pattern, name), rename) for pattern, rename in rules)
    return next((rename(match) for match, rename in matches if match), None)


def _map_names(names: Iterable[str], rules: list[Rule], inverse: list[Rule], source: str, expected: str) -> dict[str, str]:
    mapping: dict[str, str] = {}
    unknown = []
    for name in names:
        renamed = _renamed(name, rules)
        # A name that does not come back, such as an odd flow index, has no counterpart either.
        if renamed is None or _renamed(renamed, inverse) != name:
            unknown.append(name)
        else:
            mapping[name] = renamed
    if unknown:
        listed = first_of(unknown)
        raise UserError(f"{expected}: '{source}' holds {len(unknown)} tensors of unknown name: {listed}; give the file as it was published")
    assert len(set(mapping.values())) == len(mapping), "two names map to one"
    return mapping


def flowvae_names(released: Iterable[str], stages: int, blocks_per_stage: int, source: str = "flowvae.pt") -> dict[str, str]:
    """Released name -> ours for a Flow-VAE of ``stages`` encoder stages; a UserError lists every name that has no counterpart."""
    forward, back = _flowvae_rules(stages, blocks_per_stage), _released_flowvae_rules(stages, blocks_per_stage)
    return _map_names(released, forward, back, source, "not the released format")


def released_flowvae_names(ours: Iterable[str], stages: int, blocks_per_stage: int, source: str = "flowvae") -> dict[str, str]:
    """Our name -> the released one, the inverse of ``flowvae_names``."""
    forward, back = _flowvae_rules(stages, blocks_per_stage), _released_flowvae_rules(stages, blocks_per_stage)
    return _map_names(ours, back, forward, source, "no released counterpart")


def lm_names(released: Iterable[str], source: str = "model.pt") -> dict[str, str]:
    """Released name -> ours for the language model, the tied ``lm_head`` left out."""
    names = (name for name in released if name != LM_HEAD)
    return _map_names(names, _LM_RULES, _RELEASED_LM_RULES, source, "not the released format")


def released_lm_names(ours: Iterable[str], source: str = "lm") -> dict[str, str]:
    """Our name -> the released one, the inverse of ``lm_names``."""
    return _map_names(ours, _RELEASED_LM_RULES, _LM_RULES, source, "no released counterpart")
