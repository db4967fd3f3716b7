from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import next_distribution_loss
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch, Packing, packed_layout, padded_layout
from kalle.models.speaker import SpeakerEncoderConfig

SPEAKER = SpeakerEncoderConfig(channels=16, embedding_dim=8, pooled_channels=16, attention_channels=8)
TEXTS, FRAMES = (5, 3, 8, 2), (7, 12, 1, 4)


@pytest.fixture(params=[False, True], ids=["text", "speaker"])
def speaker(request: pytest.FixtureRequest) -> bool:
    return request.param


@pytest.fixture
def lm(toy_lm_config: KalleLMConfig, speaker: bool) -> KalleLM:
    torch.manual_seed(0)
    lm = KalleLM(dataclasses.replace(toy_lm_config, speaker=SPEAKER if speaker else None)).eval()
    lm.set_latent_statistics(torch.arange(4.0), torch.arange(4.0) + 0.5)
    return lm


@pytest.fixture
def batch(speaker: bool) -> LMBatch:
    generator = torch.Generator().manual_seed(1)
    count, longest = len(TEXTS), max(FRAMES)
    mean = torch.randn(count, longest, 4, generator=generator)
    posterior = DiagGaussian(mean, torch.full_like(mean, -0.5))
    return LMBatch(
        torch.randint(0, 256, (count, max(TEXTS)), generator=generator),
        torch.tensor(TEXTS),
        posterior.sample(generator=generator),
        torch.tensor(FRAMES),
        posterior,
        speaker_mels=torch.randn(count, 80, 40, generator=generator) if speaker else None,
        speaker_noise=torch.randn(count, 16, generator=generator) if speaker else None,
    )


def one(batch: LMBatch, index: int) -> LMBatch:
    """The utterance ``index`` alone, without any padding."""
    rows, text, frames = slice(index, index + 1), TEXTS[index], FRAMES[index]
    assert batch.posterior is not None
    return dataclasses.replace(
        batch,
        text_ids=batch.text_ids[rows, :text],
        text_lengths=batch.text_lengths[rows],
        latents=batch.latents[rows, :frames],
        latent_lengths=batch.latent_lengths[rows],
        posterior=batch.posterior[rows, :frames],
        speaker_mels=None if batch.speaker_mels is None else batch.speaker_mels[rows],
        speaker_noise=None if batch.speaker_noise is None else batch.speaker_noise[rows],
    )


def packed(lm: KalleLM, batch: LMBatch, row_positions: int | None) -> DiagGaussian:
    return lm(batch, lm.layout(batch, Packing(row_positions)))


def separate_loss(lm: KalleLM, batch: LMBatch) -> torch.Tensor:
    """The batch loss put together from every utterance's own."""
    losses = [next_distribution_loss(lm(one(batch, index)), one(batch, index)) for index in range(len(TEXTS))]
    frames = sum(loss.frame_kl * loss.frames for loss in losses) / sum(FRAMES)
    return frames + 0.02 * sum(loss.end_kl for loss in losses) / len(TEXTS)


@pytest.mark.parametrize("row_positions", [None, 1, 20, 25])
def test_packed_loss_and_gradient_are_those_of_the_documents_alone(lm: KalleLM, batch: LMBatch, row_positions: int | None) -> None:
    alone = copy.deepcopy(lm)
    expected = separate_loss(alone, batch)
    expected.backward()
    loss = next_distribution_loss(packed(lm, batch, row_positions), batch).total
    loss.backward()
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    for (name, ours), theirs in zip(lm.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=2e-6, rtol=1e-4, msg=lambda message, name=name: f"{name}: {message}")


@pytest.mark.parametrize("row_positions", [None, 20])
def test_a_change_in_one_document_leaves_the_others_bits(lm: KalleLM, batch: LMBatch, row_positions: int | None) -> None:
    before = packed(lm, batch, row_positions).mean
    for changed in range(len(TEXTS)):
        latents, ids = batch.latents.clone(), batch.text_ids.clone()
        latents[changed] *= -5
        ids[changed] = 255 - ids[changed]
        after = packed(lm, dataclasses.replace(batch, latents=latents, text_ids=ids), row_positions).mean
        for index in range(len(TEXTS)):
            assert torch.equal(after[index], before[index]) == (index != changed), (changed, index)


def test_gradients_stay_inside_a_document(lm: KalleLM, batch: LMBatch) -> None:
    latents = batch.latents.clone().requires_grad_()
    packed(lm, dataclasses.replace(batch, latents=latents), None).mean[1, :3].sum().backward()
    touched = latents.grad.abs().sum(-1) > 0
    assert touched[1, :2].all()
    assert int(touched.sum()) == 2, "rows 0 to 2 of one document see two frames of it and nothing else"


def test_rows_beyond_the_end_repeat_it(lm: KalleLM, batch: LMBatch) -> None:
    for prediction in (lm(batch), packed(lm, batch, None)):
        for index, frames in enumerate(FRAMES):
            rest = prediction.mean[index, frames:]
            assert torch.equal(rest, rest[:1].expand_as(rest))


def test_utterances_without_their_speaker_are_those_that_never_had_one(toy_lm_config: KalleLMConfig) -> None:
    torch.manual_seed(0)
    lm = KalleLM(dataclasses.replace(toy_lm_config, speaker=SPEAKER)).eval()
    generator = torch.Generator().manual_seed(1)
    ids, latents = torch.randint(0, 256, (3, 5), generator=generator), torch.randn(3, 6, 4, generator=generator)
    mels = torch.randn(3, 80, 40, generator=generator)
    whole = LMBatch(ids, torch.tensor([5, 4, 2]), latents, torch.tensor([6, 3, 5]), speaker_mels=mels)
    mixed = dataclasses.replace(whole, speaker_kept=torch.tensor([True, False, True]))
    spoken, silent = lm(whole).mean, lm(dataclasses.replace(whole, speaker_mels=None)).mean
    for layout in (None, lm.layout(mixed, Packing(None)), lm.layout(mixed, Packing(12))):
        prediction = lm(mixed, layout).mean
        for index, (expected, frames) in enumerate(zip((spoken, silent, spoken), (6, 3, 5), strict=True)):
            torch.testing.assert_close(prediction[index, : frames + 1], expected[index, : frames + 1], atol=1e-6, rtol=1e-5)


def test_positions_restart(batch: LMBatch) -> None:
    layout = packed_layout(torch.tensor([3, 4, 2]), Packing(6))
    assert layout.position_ids.tolist() == [[0, 1, 2, 3, 0], [0, 1, 2, 0, 1]], "two rows are enough, and nearly equally full"
    assert layout.row.tolist() == [1, 0, 1]
    assert layout.start.tolist() == [0, 0, 3]
    assert float(layout.padding_share) == pytest.approx(1 / 10)
    assert float(padded_layout(torch.tensor([3, 4, 2])).padding_share) == pytest.approx(3 / 12)
    assert float(packed_layout(torch.tensor([3, 4, 2]), Packing(None)).padding_share) == 0


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.one_of(st.none(), st.integers(1, 120)))
def test_documents_never_overlap(sizes: list[int], row_positions: int | None) -> None:
    layout = packed_layout(torch.tensor(sizes), Packing(row_positions))
    taken = torch.zeros(layout.rows, layout.width, dtype=torch.int64)
    for row, start, size in zip(layout.row, layout.start, sizes, strict=True):
        assert torch.equal(layout.position_ids[row, start : start + size], torch.arange(size))
        taken[row, start : start + size] += 1
    assert int(taken.max()) == 1
    assert int(taken.sum()) == sum(sizes)
    assert row_positions is None or layout.width <= max(row_positions, *sizes)
    assert (layout.position_ids[taken == 0] == 0).all()


@torch.no_grad()
@pytest.mark.parametrize("row_positions", [None, 20])
def test_flex_attention_gives_the_numbers_of_the_mask(lm: KalleLM, batch: LMBatch, row_positions: int | None) -> None:
    expected = packed(lm, batch, row_positions)
    lm.backbone.flex = True
    torch.testing.assert_close(packed(lm, batch, row_positions).mean, expected.mean, atol=1e-5, rtol=1e-5)
    assert torch.equal(lm(batch).mean, lm(batch, padded_layout(lm.layout(batch).lengths)).mean)


def test_a_row_of_no_positions_is_refused() -> None:
    with pytest.raises(UserError, match="row_positions: got 0, expected at least 1"):
        Packing(0)
