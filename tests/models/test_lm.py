"""Properties of the language model that hold for any weights."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from kalle.checkpoint import read_tensors, write_json, write_tensors
from kalle.errors import UserError
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch
from kalle.models.speaker import SpeakerEncoderConfig

BACKBONE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 40,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
}
CONFIG = KalleLMConfig(backbone=BACKBONE, latent_dim=4)
SPEAKER = dataclasses.replace(CONFIG, speaker=SpeakerEncoderConfig(channels=8, embedding_dim=12, pooled_channels=16, attention_channels=8))
EXACT = {"rtol": 1e-4, "atol": 1e-5}


def _build(config: KalleLMConfig = CONFIG) -> KalleLM:
    torch.manual_seed(0)
    return KalleLM(config).eval()


def _batch(text_lengths, latent_lengths, speaker: bool = False, seed: int = 0) -> LMBatch:
    generator = torch.Generator().manual_seed(seed)
    texts, frames = torch.tensor(text_lengths), torch.tensor(latent_lengths)
    rows = len(texts)
    latents = torch.randn(rows, int(frames.max()), 4, generator=generator)
    latents[torch.arange(latents.shape[1]) >= frames[:, None]] = 0
    ids = torch.randint(1, 40, (rows, int(texts.max())), generator=generator)
    ids[torch.arange(ids.shape[1]) >= texts[:, None]] = 0
    mels = torch.randn(rows, 80, 20, generator=generator) if speaker else None
    return LMBatch(ids, texts, latents, frames, speaker_mels=mels)


def _single(batch: LMBatch, row: int) -> LMBatch:
    text, frames = int(batch.text_lengths[row]), int(batch.latent_lengths[row])
    return LMBatch(
        batch.text_ids[row : row + 1, :text],
        batch.text_lengths[row : row + 1],
        batch.latents[row : row + 1, :frames],
        batch.latent_lengths[row : row + 1],
        speaker_mels=None if batch.speaker_mels is None else batch.speaker_mels[row : row + 1],
    )


@pytest.mark.parametrize("speaker", [False, True])
@torch.no_grad()
def test_rows_of_differing_lengths_equal_singles(speaker):
    lm = _build(SPEAKER if speaker else CONFIG)
    batch = _batch([5, 9, 3], [7, 2, 11], speaker)
    together, everywhere = lm(batch), lm.all_positions(batch)
    assert together.mean.shape == (3, 12, 4)
    assert everywhere.mean.shape == (3, 14, 4)
    for row in range(3):
        single = _single(batch, row)
        frames, positions = int(single.latent_lengths), int(single.text_lengths + single.latent_lengths)
        for name in ("mean", "log_std"):
            torch.testing.assert_close(getattr(together, name)[row, : frames + 1], getattr(lm(single), name)[0], **EXACT)
            torch.testing.assert_close(getattr(everywhere, name)[row, :positions], getattr(lm.all_positions(single), name)[0], **EXACT)


@torch.no_grad()
def test_a_longer_right_padding_changes_nothing():
    lm = _build()
    batch = _batch([5], [6])
    padded = dataclasses.replace(
        batch,
        text_ids=torch.cat([batch.text_ids, torch.full((1, 3), 7)], dim=1),
        latents=torch.cat([batch.latents, torch.full((1, 4, 4), 9.0)], dim=1),
    )
    prediction = lm(padded)
    assert prediction.mean.shape == (1, 11, 4)
    torch.testing.assert_close(prediction.mean[:, :7], lm(batch).mean, **EXACT)
    torch.testing.assert_close(prediction.log_std[:, :7], lm(batch).log_std, **EXACT)


@pytest.mark.parametrize("speaker", [False, True])
@torch.no_grad()
def test_forward_equals_prefill_and_step(speaker):
    lm = _build(SPEAKER if speaker else CONFIG)
    batch = _batch([5, 5], [6, 6], speaker)
    expected = lm(batch)
    latent = None if batch.speaker_mels is None else lm.encode_speaker(batch.speaker_mels).mean
    prediction, state = lm.prefill(batch.text_ids, batch.latents[:, :2], latent)
    assert state.length == 5 + 2 + int(speaker)
    torch.testing.assert_close(prediction.mean, expected.mean[:, 2], **EXACT)
    for index in range(2, 6):
        prediction, state = lm.step(batch.latents[:, index], state)
        torch.testing.assert_close(prediction.mean, expected.mean[:, index + 1], **EXACT)
        torch.testing.assert_close(prediction.log_std, expected.log_std[:, index + 1], **EXACT)
    assert state.length == 5 + 6 + int(speaker)


def test_causal_by_gradient():
    lm = _build().double()
    lm.requires_grad_(False)
    # The latent layers work in fp32 whatever the model's dtype, so only zero and non-zero are compared.
    lm.audio_linear.float()
    lm.distribution_linear.float()
    batch = _batch([4], [9])
    latents = batch.latents.clone().requires_grad_(True)
    prediction = lm(dataclasses.replace(batch, latents=latents))
    for row in range(10):
        (gradient,) = torch.autograd.grad(prediction.mean[0, row].sum() + prediction.log_std[0, row].sum(), latents, retain_graph=True)
        influencing = gradient[0].abs().sum(-1) > 0
        assert influencing.tolist() == [frame < row for frame in range(9)], f"row {row}"


@torch.no_grad()
def test_text_and_speaker_are_heard():
    lm = _build(SPEAKER)
    batch = _batch([4], [3], speaker=True)
    other_text = dataclasses.replace(batch, text_ids=(batch.text_ids + 1) % 40)
    other_speaker = dataclasses.replace(batch, speaker_mels=-batch.speaker_mels)
    reference = lm(batch).mean
    assert not torch.allclose(lm(other_text).mean, reference)
    assert not torch.allclose(lm(other_speaker).mean, reference)


@torch.no_grad()
def test_speaker_noise_of_zero_is_the_mean_and_other_noise_is_not():
    lm = _build(SPEAKER)
    batch = _batch([4, 2], [3, 3], speaker=True)
    reference = lm(batch).mean
    assert torch.equal(lm(dataclasses.replace(batch, speaker_noise=torch.zeros(2, 32))).mean, reference)
    assert not torch.allclose(lm(dataclasses.replace(batch, speaker_noise=torch.ones(2, 32))).mean, reference)


@torch.no_grad()
def test_normalised_latents_equal_normalising_by_hand():
    plain = _build()
    inner = KalleLM(dataclasses.replace(CONFIG, normalise_latents=True)).eval()
    inner.load_state_dict(plain.state_dict(), strict=False)
    mean, std = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0.5, 2.0, 1.0, 3.0])
    inner.set_latent_statistics(mean, std)
    batch = _batch([4, 6], [5, 3])
    by_hand = plain(dataclasses.replace(batch, latents=(batch.latents - mean) / std))
    got = inner(batch)
    for row, length in enumerate(batch.latent_lengths.tolist()):
        torch.testing.assert_close(got.mean[row, : length + 1], (mean + std * by_hand.mean)[row, : length + 1], **EXACT)
        torch.testing.assert_close(got.log_std[row, : length + 1], (by_hand.log_std + std.log())[row, : length + 1], **EXACT)
        # A sample of one is the other's, denormalised.
        noise = torch.randn(length + 1, 4, generator=torch.Generator().manual_seed(row))
        torch.testing.assert_close(got[row, : length + 1].sample(noise), mean + std * by_hand[row, : length + 1].sample(noise), **EXACT)
    stepped, _ = inner.prefill(batch.text_ids[:1, :4], batch.latents[:1, :2])
    torch.testing.assert_close(stepped.mean, got.mean[:1, 2], **EXACT)


def test_latent_statistics_need_the_option():
    with pytest.raises(UserError, match="normalise_latents"):
        _build().set_latent_statistics(torch.zeros(4), torch.ones(4))


def test_a_model_without_a_speaker_encoder_says_so():
    with pytest.raises(UserError):
        _build().encode_speaker(torch.zeros(1, 80, 20))


@torch.no_grad()
def test_a_half_precision_backbone_gives_fp32_predictions(tmp_path):
    _build(SPEAKER).save_pretrained(tmp_path)
    reference = KalleLM.from_pretrained(tmp_path)
    lm = KalleLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in lm.backbone.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for name, parameter in lm.named_parameters() if not name.startswith("backbone")} == {torch.float32}
    batch = _batch([5, 3], [4, 6], speaker=True)
    speaker = lm.encode_speaker(batch.speaker_mels)
    prefilled, state = lm.prefill(batch.text_ids[:, :3], batch.latents[:, :2], speaker.mean)
    stepped, _ = lm.step(batch.latents[:, 2], state)
    for distribution in (lm(batch), speaker, prefilled, stepped):
        assert distribution.mean.dtype == distribution.log_std.dtype == torch.float32
    torch.testing.assert_close(lm(batch).mean[0, :5], reference(batch).mean[0, :5], rtol=0.1, atol=0.05)


def test_every_parameter_learns():
    lm = _build(SPEAKER).train()
    prediction = lm(dataclasses.replace(_batch([4, 5], [6, 3], speaker=True), speaker_noise=torch.ones(2, 32)))
    (prediction.mean.square().mean() + prediction.log_std.square().mean()).backward()
    silent = [name for name, parameter in lm.named_parameters() if parameter.grad is None or not parameter.grad.isfinite().all()]
    assert silent == []


NORMALISED = dataclasses.replace(CONFIG, normalise_latents=True)


@pytest.mark.parametrize("config", [CONFIG, SPEAKER, NORMALISED], ids=["plain", "speaker", "normalised"])
@torch.no_grad()
def test_save_and_load_give_the_same_numbers(config, tmp_path):
    lm = _build(config)
    if config.normalise_latents:
        lm.set_latent_statistics(torch.arange(4.0), torch.arange(1.0, 5.0))
    lm.save_pretrained(tmp_path)
    batch = _batch([4, 2], [3, 5], speaker=config.speaker is not None)
    for folder in (tmp_path, tmp_path / "lm"):
        loaded = KalleLM.from_pretrained(folder)
        assert loaded.config.to_dict() == config.to_dict()
        assert not loaded.training
        state = lm.state_dict()
        assert set(loaded.state_dict()) == set(state)
        assert all(tensor.dtype == state[name].dtype and torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
        assert torch.equal(loaded(batch).mean, lm(batch).mean)


def test_loading_lists_every_tensor_that_does_not_fit(tmp_path):
    _build().save_pretrained(tmp_path)
    weights = tmp_path / "lm" / "model.safetensors"
    tensors = read_tensors(weights)
    del tensors["audio_linear.bias"], tensors["backbone.norm.weight"]
    tensors["distribution_linear.bias"] = torch.zeros(3)
    tensors["speaker_projection.bias"] = torch.zeros(2)
    write_tensors(weights, tensors)
    with pytest.raises(UserError) as caught:
        KalleLM.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "4 tensors" in message
    for name in ("audio_linear.bias (32,)", "backbone.norm.weight (32,)", "distribution_linear.bias is (3,), expected (8,)"):
        assert name in message
    assert "superfluous: speaker_projection.bias (2,)" in message


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"latent": 4}, ["'latent'", "latent_dim", "normalise_latents"]),
        ({"speaker": {"width": 3}}, ["width", "channels"]),
        ({"backbone": {**BACKBONE, "num_layers": 2}}, ["num_layers", "num_hidden_layers"]),
        ({"backbone": {**BACKBONE, "model_type": "mistral"}}, ["mistral", "llama"]),
        ({"backbone": {**BACKBONE, "hidden_size": "wide"}}, ["hidden_size", "wide"]),
    ],
)
def test_wrong_configurations_say_what_is_valid(tmp_path, change, words):
    _build().save_pretrained(tmp_path)
    write_json(tmp_path / "lm" / "config.json", {**CONFIG.to_dict(), **change})
    with pytest.raises(UserError) as caught:
        KalleLM.from_pretrained(tmp_path)
    assert all(word in str(caught.value) for word in words)
    assert "\n" not in str(caught.value)


def test_a_configuration_without_backbone_is_refused():
    with pytest.raises(UserError, match="'backbone' is missing"):
        KalleLMConfig.from_dict({"latent_dim": 4})


@pytest.mark.parametrize("dimensions", [-1, 0, 10**9])
def test_a_latent_of_an_impossible_size_is_refused_from_the_configuration(dimensions: int, toy_lm_config: KalleLMConfig) -> None:
    values = toy_lm_config.to_dict() | {"latent_dim": dimensions}
    with pytest.raises(UserError, match=r"lm.latent_dim: got -?\d+, expected whole numbers from 1 to"):
        KalleLMConfig.from_dict(values)
