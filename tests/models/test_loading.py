"""A loaded model is the one that was saved, though nothing was drawn for it and its weights are the mapped file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from kalle.checkpoint import load_module, read_tensors, write_tensors
from kalle.errors import UserError
from kalle.models.flowvae import BigVGANConfig, EncoderConfig, FlowConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch
from kalle.models.speaker import SpeakerEncoderConfig

BACKBONE = json.loads((Path(__file__).parents[1] / "reference" / "lm_tiny.json").read_text())
SPEAKER = SpeakerEncoderConfig(channels=16, embedding_dim=32)
BIGVGAN = BigVGANConfig(initial_channels=32, strides=(5, 4), block_kernel_sizes=(3, 5), block_dilations=(1, 3))
ISTFT = ISTFTConfig(channels=8, blocks=2, upsample=2, n_fft=40, hop_length_stft=10)


def flowvae(decoder: BigVGANConfig | ISTFTConfig) -> FlowVAE:
    encoder = EncoderConfig(channels=(4, 8, 8), strides=(4, 5), residual_layers=2)
    return FlowVAE(FlowVAEConfig(latent_dim=8, encoder=encoder, flow=FlowConfig(hidden_channels=8, couplings=2), decoder=decoder))


def lm(speaker: SpeakerEncoderConfig | None = None, normalise_latents: bool = False) -> KalleLM:
    model = KalleLM(KalleLMConfig(BACKBONE, 8, speaker, normalise_latents))
    if normalise_latents:
        model.set_latent_statistics(torch.randn(8), torch.rand(8) + 0.5)
    return model


BUILDERS: dict[str, Callable[[], FlowVAE | KalleLM]] = {
    "bigvgan": lambda: flowvae(BIGVGAN),
    "istft": lambda: flowvae(ISTFT),
    "lm": lm,
    "speaker": lambda: lm(SPEAKER),
    "normalised": lambda: lm(SPEAKER, normalise_latents=True),
}


@pytest.fixture(params=BUILDERS)
def saved(request, tmp_path: Path) -> FlowVAE | KalleLM:
    """A model, and the folder ``tmp_path`` / "name" that it was saved to."""
    torch.manual_seed(0)
    model = BUILDERS[request.param]().eval()
    with torch.no_grad():
        for buffer in model.state_dict().values():  # batch-norm statistics and the like, which start as constants
            if buffer.is_floating_point():
                buffer.add_(0.01 * torch.rand_like(buffer))
    model.save_pretrained(tmp_path / "name")
    return model


def everything(module: nn.Module) -> dict[str, torch.Tensor]:
    """Parameters and buffers, those included that no file holds."""
    return dict((*module.named_parameters(), *module.named_buffers()))


def output(model: FlowVAE | KalleLM) -> list[torch.Tensor]:
    torch.manual_seed(5)
    if isinstance(model, FlowVAE):
        posterior = model.encode(torch.randn(1, 400))
        return [posterior.mean, posterior.log_std, model.to_prior(posterior.mean), model.decode(posterior.mean)]
    batch = LMBatch(torch.arange(4, 16)[None], torch.tensor([12]), torch.randn(1, 7, 8), torch.tensor([7]))
    if model.speaker_encoder is not None:
        batch = LMBatch(batch.text_ids, batch.text_lengths, batch.latents, batch.latent_lengths, speaker_mels=torch.randn(1, 80, 30))
    prediction = model.all_positions(batch)
    return [prediction.mean, prediction.log_std]


def test_a_loaded_model_is_the_saved_one(saved, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    loaded = type(saved).from_pretrained(tmp_path / "name")
    assert torch.equal(torch.get_rng_state(), state), "nothing was drawn"
    expected, got = everything(saved), everything(loaded)
    assert list(got) == list(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].device, got[name].requires_grad) == (tensor.dtype, tensor.device, tensor.requires_grad), name
        assert torch.equal(got[name], tensor), name
    assert not any(module.training for module in loaded.modules())
    with torch.no_grad():
        for one, other in zip(output(loaded), output(saved), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_weights_are_the_mapped_file_and_a_change_stays_in_memory(saved, tmp_path: Path) -> None:
    loaded = type(saved).from_pretrained(tmp_path / "name")
    file = next((tmp_path / "name").rglob("*.safetensors"))
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith(str(file))]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in lines]
    outside = [name for name, p in loaded.named_parameters() if not any(low <= p.data_ptr() < high for low, high in ranges)]
    assert outside == []
    before = file.read_bytes()
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before


def test_a_loaded_model_can_be_trained(saved, tmp_path: Path) -> None:
    loaded = type(saved).from_pretrained(tmp_path / "name").train()
    if isinstance(loaded, KalleLM):
        loaded.eval()  # one utterance alone has no batch statistics
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    sum(tensor.square().mean() for tensor in output(loaded)).backward()
    optimizer.step()
    file = next((tmp_path / "name").rglob("*.safetensors"))
    stored = read_tensors(file)
    changed = [name for name, tensor in loaded.named_parameters() if not torch.equal(tensor, stored[name])]
    assert len(changed) > len(stored) / 4


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
def test_weights_stored_in_16_bits_are_computed_with_in_fp32(saved, tmp_path: Path, stored: torch.dtype) -> None:
    file = next((tmp_path / "name").rglob("*.safetensors"))
    tensors = {name: t.to(stored) if t.is_floating_point() else t for name, t in read_tensors(file).items()}
    write_tensors(file, tensors)
    loaded = type(saved).from_pretrained(tmp_path / "name")
    for name, tensor in loaded.state_dict().items():
        assert tensor.dtype == saved.state_dict()[name].dtype
        assert torch.equal(tensor, tensors[name].to(tensor.dtype)), name


def test_half_precision_is_for_the_backbone_and_its_frequencies_stay(tmp_path: Path) -> None:
    model = lm(SPEAKER, normalise_latents=True)
    model.save_pretrained(tmp_path / "name")
    loaded = KalleLM.from_pretrained(tmp_path / "name", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.backbone.parameters()} == {torch.bfloat16}
    others = [p for name, p in everything(loaded).items() if not name.startswith("backbone.") and p.is_floating_point()]
    assert {p.dtype for p in others} == {torch.float32}
    assert torch.equal(loaded.backbone.rotary_emb.inv_freq, model.backbone.rotary_emb.inv_freq)
    assert loaded.backbone.rotary_emb.inv_freq.dtype == torch.float32


@pytest.mark.parametrize("decoder", [BIGVGAN, ISTFT], ids=["bigvgan", "istft"])
def test_a_flow_vae_in_half_precision(tmp_path: Path, decoder: BigVGANConfig | ISTFTConfig) -> None:
    torch.manual_seed(0)
    flowvae(decoder).save_pretrained(tmp_path / "name")
    single, half = FlowVAE.from_pretrained(tmp_path / "name"), FlowVAE.from_pretrained(tmp_path / "name", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    z = torch.randn(1, 6, 8)
    with torch.no_grad():
        torch.testing.assert_close(half.decode(z.bfloat16()).float(), single.decode(z), rtol=0.1, atol=0.02)


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    flowvae(ISTFT).save_pretrained(tmp_path / "name")
    file = tmp_path / "name" / "flowvae" / "model.safetensors"
    tensors = read_tensors(file)
    tensors["extra"] = torch.ones(2)
    tensors["decoder.norm.weight"] = torch.ones(3)
    del tensors["decoder.norm.bias"]
    write_tensors(file, tensors)
    with pytest.raises(UserError) as caught:
        FlowVAE.from_pretrained(tmp_path / "name")
    for words in (
        "(3 tensors)",
        "missing: decoder.norm.bias",
        "superfluous: extra (2,)",
        "misshapen: decoder.norm.weight is (3,)",
    ):
        assert words in str(caught.value)


def test_integers_are_no_weights(tmp_path: Path) -> None:
    lm().save_pretrained(tmp_path / "name")
    file = tmp_path / "name" / "lm" / "model.safetensors"
    tensors = read_tensors(file)
    write_tensors(file, tensors | {"audio_linear.weight": tensors["audio_linear.weight"].int()})
    with pytest.raises(UserError, match=r"\(1 tensors\): mistyped: audio_linear.weight is int32, expected float32"):
        KalleLM.from_pretrained(tmp_path / "name")


def test_saving_over_the_folder_a_model_was_loaded_from_leaves_the_model_as_it_is(saved, tmp_path: Path) -> None:
    loaded = type(saved).from_pretrained(tmp_path / "name")
    before = [tensor.clone() for tensor in loaded.state_dict().values()]
    with torch.no_grad():
        for parameter in saved.parameters():
            parameter.add_(1)
    saved.save_pretrained(tmp_path / "name")
    assert all(torch.equal(now, then) for now, then in zip(loaded.state_dict().values(), before, strict=True))


def test_a_weight_that_no_file_holds_is_noticed(tmp_path: Path) -> None:
    class Forgetful(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("scratch", torch.empty(3), persistent=False)

    write_tensors(tmp_path / "model.safetensors", {})
    with pytest.raises(AssertionError, match=r"no values for \['scratch'\]"):
        load_module(Forgetful, tmp_path)
