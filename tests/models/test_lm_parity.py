"""The language model against the numbers of the public implementation, step by step and teacher-forced."""

from __future__ import annotations

import pytest
import torch

from kalle.gaussian import DiagGaussian
from kalle.losses.latent import next_distribution_loss, speaker_kl
from kalle.models.lm_batch import LMBatch

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}
DIRECTIONS = {"prediction_posterior": "pred_target", "posterior_prediction": "target_pred"}


def _generate(lm, ids, noise, prompt=None, speaker=None):
    """All predictions (2D, N) and the samples (N, D), never stopping."""
    prediction, state = lm.prefill(ids, prompt, speaker)
    rows, samples = [], []
    for draw in noise:
        rows.append(torch.cat([prediction.mean, prediction.log_std], -1))
        samples.append(prediction.sample(draw))
        prediction, state = lm.step(samples[-1], state)
    return torch.stack(rows, dim=-1), torch.cat(samples)


@pytest.mark.parametrize("kind", ["prompted", "unprompted"])
@torch.no_grad()
def test_generation(golden_lm, golden_io, kind):
    io = golden_io("lm_tiny")
    prompt = io["prompt_latents"] if kind == "prompted" else None
    expected = io[f"distributions_{kind}"]
    rows, _ = _generate(golden_lm, io["input_ids"][None], io["noise"][: expected.shape[-1], 0], prompt)
    torch.testing.assert_close(rows, expected, **TOLERANCE)
    prediction = DiagGaussian.from_parameters(rows.transpose(1, 2))
    end_kl = prediction.kl_to(DiagGaussian.end(prediction.mean)).mean(-1)
    torch.testing.assert_close(end_kl, io[f"end_kl_{kind}"], **TOLERANCE)


@pytest.mark.parametrize("kind", ["prompted", "unprompted"])
@torch.no_grad()
def test_teacher_forcing_equals_generation(golden_lm, golden_io, kind):
    io = golden_io("lm_tiny")
    prompt = io["prompt_latents"] if kind == "prompted" else None
    expected = io[f"distributions_{kind}"]
    _, samples = _generate(golden_lm, io["input_ids"][None], io["noise"][: expected.shape[-1], 0], prompt)
    latents = samples[None] if prompt is None else torch.cat([prompt, samples[None]], dim=1)
    batch = LMBatch(io["input_ids"][None], torch.tensor([17]), latents, torch.tensor([latents.shape[1]]))
    given = 0 if prompt is None else prompt.shape[1]
    prediction = golden_lm(batch)[:, given:-1]
    torch.testing.assert_close(torch.cat([prediction.mean, prediction.log_std], -1).transpose(1, 2), expected, **TOLERANCE)
    everywhere = golden_lm.all_positions(batch)
    assert everywhere.mean.shape == (1, 17 + latents.shape[1], 8)
    torch.testing.assert_close(everywhere.mean[:, 16:], golden_lm(batch).mean, **TOLERANCE)


@torch.no_grad()
def test_speaker_inference(golden_lm_speaker, golden_io):
    io = golden_io("speaker_tiny")
    speaker = golden_lm_speaker.encode_speaker(io["mels"])
    torch.testing.assert_close(speaker.mean, io["speaker_mean"], **TOLERANCE)
    torch.testing.assert_close(speaker.log_std, io["speaker_log_std"], **TOLERANCE)
    latent = speaker.sample(io["speaker_noise"])
    torch.testing.assert_close(latent, io["speaker_latent"], **TOLERANCE)
    rows, _ = _generate(golden_lm_speaker, io["input_ids"][None], io["step_noise"][:, 0], speaker=latent)
    torch.testing.assert_close(rows, io["distributions"], **TOLERANCE)


def _speaker_batch(io) -> LMBatch:
    """The released padded batch as ours: its labels are shifted by one, ours are the frames themselves."""
    text_lengths, latent_lengths = io["ids_mask"].sum(1).long(), io["audio_mask"].sum(1).long()
    frames = int(latent_lengths.max())
    latents, targets = torch.zeros(2, frames, 8), torch.zeros(2, frames, 16)
    for row, (text, length) in enumerate(zip(text_lengths.tolist(), latent_lengths.tolist(), strict=True)):
        latents[row, :length] = io["audio_latents"][row][io["audio_mask"][row].bool()]
        targets[row, :length] = io["labels"][row, text - 1 : text - 1 + length]
    return LMBatch(
        io["input_ids"][:, : int(text_lengths.max())],
        text_lengths,
        latents,
        latent_lengths,
        posterior=DiagGaussian.from_parameters(targets),
        speaker_mels=io["mels"],
        speaker_noise=io["speaker_noise"],
    )


@torch.no_grad()
def test_training_forward_with_a_speaker(golden_lm_speaker, golden_io):
    io = golden_io("lm_speaker_tiny")
    batch = _speaker_batch(io)
    assert len(set(batch.text_lengths.tolist())) == len(set(batch.latent_lengths.tolist())) == 2, "the rows must differ in length"
    everywhere = golden_lm_speaker.all_positions(batch)
    compared = (io["target_mask"] + io["end_mask"]).bool()
    assert compared[:, everywhere.mean.shape[1] :].sum() == 0
    compared = compared[:, : everywhere.mean.shape[1]]
    width = compared.shape[1]
    torch.testing.assert_close(everywhere.mean[compared], io["pred_mean"][:, :width][compared], **TOLERANCE)
    torch.testing.assert_close(everywhere.log_std[compared], io["pred_log_scale"][:, :width][compared], **TOLERANCE)
    # The rows of forward() are these very positions.
    rows = golden_lm_speaker(batch)
    for row, length in enumerate(batch.latent_lengths.tolist()):
        torch.testing.assert_close(rows.mean[row, : length + 1], everywhere.mean[row][compared[row]], **TOLERANCE)


@pytest.mark.parametrize("direction", DIRECTIONS)
@torch.no_grad()
def test_training_losses_with_a_speaker(golden_lm_speaker, golden_io, direction):
    io = golden_io("lm_speaker_tiny")
    batch = _speaker_batch(io)
    loss = next_distribution_loss(golden_lm_speaker(batch), batch, direction, end_weight=0.02)
    audio, end = io[f"audio_loss_{DIRECTIONS[direction]}"], io[f"end_loss_{DIRECTIONS[direction]}"]
    torch.testing.assert_close(loss.frame_kl, audio, **TOLERANCE)
    torch.testing.assert_close(loss.end_kl, end, **TOLERANCE)
    torch.testing.assert_close(loss.total, audio + 0.02 * end, **TOLERANCE)


@torch.no_grad()
def test_speaker_divergence(golden_lm_speaker, golden_io):
    io = golden_io("lm_speaker_tiny")
    torch.testing.assert_close(golden_lm_speaker.speaker_encoder(io["mels"]), io["speaker_embedding"], **TOLERANCE)
    divergence = speaker_kl(golden_lm_speaker.encode_speaker(io["mels"]))
    torch.testing.assert_close(divergence, io["speaker_kl_per_dim"].reshape(()), **TOLERANCE)
