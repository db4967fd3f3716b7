"""Names of the released tensors and ours, mapped in both directions (names from the released files)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from kalle.errors import UserError

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
        listed = ", ".join(unknown)
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
