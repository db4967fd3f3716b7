"""The speaker network of the Seed-TTS protocol against transformers' WavLM and a head written out here, with random weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from kalle.audio import Audio
from kalle.errors import UserError
from kalle.evaluation.metrics import MetricError, ScoreItem
from kalle.evaluation.similarity import Similarity
from kalle.evaluation.wavlm_sv import WavLMSpeaker, transformers_name

pytest.importorskip("transformers")
WIDTH, CHANNELS, POOLED, EMBEDDING, LAYERS = 32, 16, 24, 8, 3
State = dict[str, Tensor]


def wavlm() -> torch.nn.Module:
    from transformers import WavLMConfig, WavLMModel

    config = WavLMConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=48,
        num_buckets=32,
        conv_dim=(8,) * 7,
        feat_extract_norm="layer",
        do_stable_layer_norm=True,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        mask_time_prob=0.0,
    )
    torch.manual_seed(0)
    return WavLMModel(config).eval()


AUTHORS_NAMES = (
    (r"^feature_extractor\.conv_layers\.(\d+)\.conv\.", r"feature_extractor.conv_layers.\1.0."),
    (r"^feature_extractor\.conv_layers\.(\d+)\.layer_norm\.", r"feature_extractor.conv_layers.\1.2.1."),
    (r"^feature_projection\.projection\.", "post_extract_proj."),
    (r"^feature_projection\.layer_norm\.", "layer_norm."),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original0", "encoder.pos_conv.0.weight_g"),
    (r"^encoder\.pos_conv_embed\.conv\.parametrizations\.weight\.original1", "encoder.pos_conv.0.weight_v"),
    (r"^encoder\.pos_conv_embed\.conv\.bias", "encoder.pos_conv.0.bias"),
    (r"\.attention\.gru_rel_pos_linear\.", ".self_attn.grep_linear."),
    (r"\.attention\.gru_rel_pos_const", ".self_attn.grep_a"),
    (r"\.attention\.rel_attn_embed\.", ".self_attn.relative_attention_bias."),
    (r"\.attention\.", ".self_attn."),
    (r"(layers\.\d+)\.layer_norm\.", r"\1.self_attn_layer_norm."),
    (r"\.feed_forward\.intermediate_dense\.", ".fc1."),
    (r"\.feed_forward\.output_dense\.", ".fc2."),
)


def authors_name(name: str) -> str:
    for pattern, other in AUTHORS_NAMES:
        name = re.sub(pattern, other, name)
    return name


def head_state() -> State:
    """Random tensors under the names of the published head."""
    generator = torch.Generator().manual_seed(1)
    state: State = {"feature_weight": torch.randn(LAYERS + 1, generator=generator)}

    def affine(name: str, outputs: int, *inputs: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, *inputs, generator=generator) * (2 / max(1, int(np.prod(inputs)))) ** 0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    def norm(name: str, size: int) -> None:
        state[f"{name}.weight"] = 1 + 0.1 * torch.randn(size, generator=generator)
        state[f"{name}.bias"] = 0.1 * torch.randn(size, generator=generator)
        state[f"{name}.running_mean"] = 0.1 * torch.randn(size, generator=generator)
        state[f"{name}.running_var"] = 0.5 + torch.rand(size, generator=generator)
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    affine("layer1.conv", CHANNELS, WIDTH, 5)
    norm("layer1.bn", CHANNELS)
    for layer in ("layer2", "layer3", "layer4"):
        for part in ("Conv1dReluBn1", "Conv1dReluBn2"):
            affine(f"{layer}.{part}.conv", CHANNELS, CHANNELS, 1)
            norm(f"{layer}.{part}.bn", CHANNELS)
        for index in range(7):
            affine(f"{layer}.Res2Conv1dReluBn.convs.{index}", CHANNELS // 8, CHANNELS // 8, 3)
            norm(f"{layer}.Res2Conv1dReluBn.bns.{index}", CHANNELS // 8)
        affine(f"{layer}.SE_Connect.linear1", 128, CHANNELS)
        affine(f"{layer}.SE_Connect.linear2", CHANNELS, 128)
    affine("conv", POOLED, 3 * CHANNELS, 1)
    affine("pooling.linear1", 128, POOLED, 1)
    affine("pooling.linear2", POOLED, 128, 1)
    norm("bn", 2 * POOLED)
    affine("linear", EMBEDDING, 2 * POOLED)
    return state


def reference(model: torch.nn.Module, s: State, audio: Audio) -> Tensor:
    """The embedding, written with functions only."""

    def norm(x: Tensor, name: str) -> Tensor:
        return F.batch_norm(x, s[f"{name}.running_mean"], s[f"{name}.running_var"], s[f"{name}.weight"], s[f"{name}.bias"])

    def conv(x: Tensor, name: str, **options: int) -> Tensor:
        return F.conv1d(x, s[f"{name}.weight"], s[f"{name}.bias"], **options)

    def block(x: Tensor, name: str, dilation: int) -> Tensor:
        y = norm(conv(x, f"{name}.Conv1dReluBn1.conv").relu(), f"{name}.Conv1dReluBn1.bn")
        parts = list(torch.chunk(y, 8, dim=1))
        for index in range(7):
            heard = parts[index] if index == 0 else parts[index] + parts[index - 1]
            z = conv(heard, f"{name}.Res2Conv1dReluBn.convs.{index}", padding=dilation, dilation=dilation)
            parts[index] = norm(z.relu(), f"{name}.Res2Conv1dReluBn.bns.{index}")
        y = norm(conv(torch.cat(parts, 1), f"{name}.Conv1dReluBn2.conv").relu(), f"{name}.Conv1dReluBn2.bn")
        gate = F.linear(y.mean(2), s[f"{name}.SE_Connect.linear1.weight"], s[f"{name}.SE_Connect.linear1.bias"]).relu()
        gate = F.linear(gate, s[f"{name}.SE_Connect.linear2.weight"], s[f"{name}.SE_Connect.linear2.bias"]).sigmoid()
        return x + y * gate[:, :, None]

    wav = torch.from_numpy(audio)
    with torch.no_grad():
        states = model(F.layer_norm(wav, wav.shape)[None], output_hidden_states=True).hidden_states
        x = sum(weight * state for weight, state in zip(s["feature_weight"].softmax(0), states, strict=True)).transpose(1, 2)
        first = norm(conv(F.instance_norm(x + 1e-6), "layer1.conv", padding=2).relu(), "layer1.bn")
        second = block(first, "layer2", 2)
        third = block(second, "layer3", 3)
        joined = conv(torch.cat([second, third, block(third, "layer4", 4)], 1), "conv").relu()
        weight = conv(conv(joined, "pooling.linear1").tanh(), "pooling.linear2").softmax(2)
        mean = (weight * joined).sum(2)
        std = ((weight * joined**2).sum(2) - mean**2).clamp(min=1e-9).sqrt()
        return F.linear(norm(torch.cat([mean, std], 1), "bn"), s["linear.weight"], s["linear.bias"])[0]


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return wavlm()


@pytest.fixture(scope="module")
def checkpoint(model: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the authors store it: everything under "model", with tensors of the training that the network does not need."""
    front = {f"feature_extract.model.{authors_name(name)}": value for name, value in model.state_dict().items()}
    extra = {"loss_calculator.projection.weight": torch.zeros(3), "feature_extract.model.mask_emb": torch.zeros(WIDTH)}
    path = tmp_path_factory.mktemp("sv") / "wavlm_large_finetune.pth"
    torch.save({"model": {**front, **head_state(), **extra}}, path)
    return path


def test_names_of_both_sides_are_inverse(model: torch.nn.Module) -> None:
    for name in model.state_dict():
        assert transformers_name(authors_name(name)) == name


def test_it_equals_the_reference(model: torch.nn.Module, checkpoint: Path, speech: Callable[..., Audio]) -> None:
    network = WavLMSpeaker(checkpoint)
    for seed, seconds in ((0, 1.0), (1, 1.7)):
        audio = speech(seconds, seed)
        expected = reference(model, head_state(), audio).numpy()
        assert network(audio).shape == (EMBEDDING,)
        np.testing.assert_allclose(network(audio), expected, rtol=1e-4, atol=1e-5)


def test_identity_is_one_and_silence_is_no_voice(checkpoint: Path, speech: Callable[..., Audio]) -> None:
    metric, audio = Similarity("wavlm", checkpoint=checkpoint), speech(1.0)
    assert metric(ScoreItem("x", audio, "text", speaker=audio))["sim"] == pytest.approx(1, abs=1e-6)
    with pytest.raises(MetricError):
        metric(ScoreItem("x", np.zeros(16000, np.float32), "text", speaker=audio))


def test_what_is_not_used_is_told_by_name(checkpoint: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    described = WavLMSpeaker(checkpoint).describe()
    assert described["unused_tensors"] == ["feature_extract.model.masked_spec_embed", "loss_calculator.projection.weight"]
    assert caplog.text.count("is not used") == 2


def test_every_tensor_that_does_not_fit_is_listed(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = torch.load(checkpoint, weights_only=True)["model"]
    del state["layer3.SE_Connect.linear1.bias"], state["feature_extract.model.encoder.layers.1.fc1.bias"]
    state["bn.weight"] = torch.zeros(3)
    torch.save({"model": state}, tmp_path / "broken.pth")
    with pytest.raises(UserError) as raised:
        WavLMSpeaker(tmp_path / "broken.pth")
    lines = str(raised.value).partition("3 tensors: ")[2].partition("); get it")[0].split("; ")
    assert [record.getMessage().partition(": tensor ")[2] for record in caplog.records if record.levelname == "WARNING"] == lines
    assert len(lines) == 3
    assert any("layer3.SE_Connect.linear1.bias: missing" in line for line in lines)
    assert any("layers.1.feed_forward.intermediate_dense.bias: missing" in line for line in lines)
    assert any("bn.weight: got (3,)" in line for line in lines)


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "text.pth").write_text("nothing")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("gone.pth", "text.pth", "other.pth"):
        with pytest.raises(UserError, match="UniSpeech"):
            WavLMSpeaker(tmp_path / name)
