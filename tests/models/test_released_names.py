"""Every name and shape of the released files, against full-size modules without storage, and the map both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kalle.convert.release_format import (
    LM_EMBEDDING,
    LM_HEAD,
    RELEASED_BACKBONE,
    flowvae_config,
    flowvae_names,
    lm_config,
    lm_names,
    released_flowvae_config,
    released_flowvae_names,
    released_lm_names,
)
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE, FlowVAEConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.speaker import SpeakerEncoderConfig

REFERENCE = Path(__file__).parents[1] / "reference"
RELEASED_JSON = json.loads((REFERENCE / "released_flowvae_config.json").read_text())
STAGES, BLOCKS = 6, 3


def _meta(shapes):
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def _shapes(module):
    return {name: list(tensor.shape) for name, tensor in module.state_dict().items()}


def test_the_released_json_is_the_default_configuration():
    assert flowvae_config(RELEASED_JSON, "json") == FlowVAEConfig()


def test_full_size_flowvae_has_every_released_tensor_and_no_other(released_shapes):
    released = released_shapes["flowvae.pt['generator']"]
    with torch.device("meta"):
        module = FlowVAE(flowvae_config(RELEASED_JSON, "json"))
    names = flowvae_names(released, STAGES, BLOCKS)
    assert {names[name]: shape for name, shape in released.items()} == _shapes(module)
    assert released_flowvae_names(module.state_dict(), STAGES, BLOCKS) == {ours: theirs for theirs, ours in names.items()}
    parameters = {part: sum(p.numel() for p in getattr(module, part).parameters()) / 1e6 for part in ("encoder", "flow", "decoder")}
    assert {part: round(millions, 1) for part, millions in parameters.items()} == {"encoder": 34.4, "flow": 50.4, "decoder": 119.6}


def test_full_size_language_model_has_every_released_tensor_and_no_other(released_shapes):
    released = released_shapes["model.pt"]
    config = lm_config(RELEASED_BACKBONE, _meta(released), "model.pt")
    assert config == KalleLMConfig(backbone=dict(RELEASED_BACKBONE), latent_dim=512, speaker=None)
    with torch.device("meta"):
        module = KalleLM(config)
    names = lm_names(released)
    assert set(released) - set(names) == {LM_HEAD}
    assert released[LM_HEAD] == released[LM_EMBEDDING]
    assert {names[name]: released[name] for name in names} == _shapes(module)
    assert released_lm_names(module.state_dict()) == {ours: theirs for theirs, ours in names.items()}
    assert round(sum(p.numel() for p in module.parameters()) / 1e9, 3) == 1.239


def test_full_size_speaker_encoder_is_read_from_shapes(released_shapes):
    (speaker,) = (shapes for name, shapes in released_shapes.items() if name.startswith("speaker_encoder"))
    released = {**released_shapes["model.pt"], **{f"speaker_encoder.{name}": shape for name, shape in speaker.items()}}
    released |= {"speaker_cond_disp_linear.weight": [4096, 2048], "speaker_cond_disp_linear.bias": [4096]}
    config = lm_config(RELEASED_BACKBONE, _meta(released), "model.pt")
    assert config.speaker == SpeakerEncoderConfig()
    with torch.device("meta"):
        module = KalleLM(config)
    names = lm_names(released)
    assert {names[name]: released[name] for name in names} == _shapes(module)
    assert released_lm_names(module.state_dict()) == {ours: theirs for theirs, ours in names.items()}


@pytest.mark.parametrize(
    "name",
    [
        "flow.flows.1.pre.weight",
        "flow.flows.00.pre.weight",
        "audio_encoder.generator.4.layer.bias",
        "audio_encoder.generator.3.layer.bias",
        "audio_encoder.generator.4.layers.0.1.bias",
        "conv_pre.weight",
        "ups.0.1.bias",
        "generator.conv_pre.bias",
    ],
)
def test_flowvae_names_without_a_counterpart_are_listed(name):
    with pytest.raises(UserError, match="2 tensors of unknown name") as caught:
        flowvae_names(["conv_pre.bias", name, "other"], STAGES, BLOCKS)
    assert name in str(caught.value)
    assert "other" in str(caught.value)


def test_lm_names_without_a_counterpart_are_listed():
    with pytest.raises(UserError, match=r"2 tensors of unknown name: lm_head.weight, audio_linear.scale"):
        lm_names(["audio_linear.bias", "lm_head.weight", "audio_linear.scale", LM_HEAD])
    with pytest.raises(UserError, match="latent_mean"):
        released_lm_names(["latent_mean"])


def test_released_json_of_a_configuration():
    expected = {key: value for key, value in RELEASED_JSON.items() if key in released_flowvae_config(FlowVAEConfig(), "x")}
    assert released_flowvae_config(FlowVAEConfig(), "x") == expected
    assert flowvae_config(expected, "x") == FlowVAEConfig()
