from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from kalle.errors import UserError
from kalle.evaluation.probe import probe
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import TextAttention
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch, Packing
from kalle.models.speaker import SpeakerEncoderConfig
from kalle.training.callbacks import EMA
from kalle.training.lm import KalleLMTraining, LMObjective
from kalle.training.optimisation import WarmupCosine

D = 4
SPEAKER = SpeakerEncoderConfig(channels=16, embedding_dim=8, pooled_channels=16, attention_channels=8)


@pytest.fixture
def make(toy_lm_config: KalleLMConfig) -> Callable[..., KalleLMTraining]:
    def build(speaker: bool = False, lr: float = 1e-2, steps: int = 60, seed: int = 0, **objective: Any) -> KalleLMTraining:
        torch.manual_seed(7)
        config = dataclasses.replace(toy_lm_config, speaker=SPEAKER if speaker else None)
        return KalleLMTraining(
            KalleLM(config),
            optimizer=partial(torch.optim.AdamW, lr=lr),
            scheduler=WarmupCosine(warmup_steps=3, total_steps=steps, final_ratio=0.1),
            objective=LMObjective(**objective),
            seed=seed,
        )

    return build


@pytest.fixture
def batch() -> LMBatch:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([9, 6, 4])
    mean = 1.5 * torch.randn(3, 9, D, generator=generator)
    posterior = DiagGaussian(mean, torch.full_like(mean, -0.5))
    valid = (torch.arange(9) < lengths[:, None])[..., None]
    latents = posterior.sample(generator=generator) * valid
    ids = torch.randint(0, 256, (3, 5), generator=generator)
    return LMBatch(ids, torch.tensor([5, 4, 3]), latents, lengths, posterior, cut_ids=("a", "b", "c"))


def with_speaker(batch: LMBatch, noise: bool = True) -> LMBatch:
    generator = torch.Generator().manual_seed(8)
    mels = torch.randn(3, 80, 40, generator=generator)
    return dataclasses.replace(batch, speaker_mels=mels, speaker_noise=torch.randn(3, 16, generator=generator) if noise else None)


@pytest.mark.parametrize("direction", ["prediction_posterior", "posterior_prediction"])
def test_overfits_one_batch(direction: str, make, batch: LMBatch, fit) -> None:
    module = make(direction=direction, steps=120)
    with torch.no_grad():
        before = module.losses(batch)
    fit(module, [batch], 120)
    with torch.no_grad():
        after = module.losses(batch)
    assert after["frame_kl"] < 0.2 * before["frame_kl"], (before, after)
    assert after["total"] == pytest.approx(float(after["frame_kl"] + 0.02 * after["end_kl"]))


def test_directions_differ(make, batch: LMBatch) -> None:
    one, other = (make(direction=direction).losses(batch)["frame_kl"] for direction in ("prediction_posterior", "posterior_prediction"))
    assert one != other


def test_input_noise_preserves_variance_and_moves_nothing_else(make) -> None:
    """z of mean m and std s gives sqrt(k) eps s + sqrt(1 - k) (z - m) + m: the same mean and std whatever k."""
    module = make(input_noise=0.9)
    mean, std = torch.tensor([0.0, 5.0, -3.0, 1.0]), torch.tensor([1.0, 0.1, 4.0, 2.0])
    module.lm.set_latent_statistics(mean, std)
    latents = mean + std * torch.randn(64, 500, D, generator=torch.Generator().manual_seed(1))
    batch = LMBatch(torch.zeros(64, 2, dtype=torch.long), torch.full((64,), 2), latents, torch.full((64,), 500))
    noisy = module.augmented(batch).latents
    torch.testing.assert_close(noisy.mean((0, 1)), mean, atol=0.05, rtol=0.01)
    torch.testing.assert_close(noisy.std((0, 1)), std, atol=0, rtol=0.02)
    kept = ((noisy - mean) * (latents - mean)).mean((0, 1)) / std.square()
    # E sqrt(1 - k) for k ~ U(0, 0.9) is (1 - 0.1^1.5) / (1.5 * 0.9).
    torch.testing.assert_close(kept, torch.full((D,), (1 - 0.1**1.5) / 1.35), atol=0.02, rtol=0)
    shares = ((noisy - latents) / std).square().mean(-1)
    assert shares.std() > 0.3, "each frame has a share of its own"


def test_input_noise_is_for_training_and_depends_on_the_visit_alone(make, batch: LMBatch) -> None:
    assert make(input_noise=0.0).augmented(batch) is batch
    module, visit = make(input_noise=0.5), dataclasses.replace(batch, epochs=(2, 2, 2))
    whole = module.augmented(visit, (5, 1, 0)).latents
    turned = LMBatch(
        batch.text_ids.flip(0), batch.text_lengths.flip(0), batch.latents.flip(0), batch.latent_lengths.flip(0),
        cut_ids=("c", "b", "a"), epochs=(2, 2, 2),
    )  # fmt: skip
    assert torch.equal(module.augmented(turned, (9, 9, 9)).latents.flip(0), whole)
    assert not torch.equal(module.augmented(dataclasses.replace(visit, epochs=(3, 3, 3))).latents, whole)
    assert not torch.equal(make(input_noise=0.5, seed=1).augmented(visit).latents, whole)
    assert torch.equal(module.losses(batch)["total"], module.losses(batch)["total"])


def test_noise_of_a_batch_without_visits_depends_on_the_step(make, batch: LMBatch) -> None:
    module = make(input_noise=0.5)
    one, again, other = (module.augmented(batch, (step, 0, 0)).latents for step in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)


def test_training_noise_depends_on_the_step_not_on_global_state(make, batch: LMBatch, fit) -> None:
    results = []
    for seed in (1, 1, 2):
        module = make(input_noise=0.5, seed=seed)
        torch.manual_seed(100 + len(results))
        fit(module, [batch, batch], 3)
        results.append(module.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    assert any(not torch.equal(results[0][name], results[2][name]) for name in results[0])


def test_speaker_loss_and_gradient(make, batch: LMBatch, fit) -> None:
    module = make(speaker=True, speaker_weight=0.1)
    spoken = with_speaker(batch)
    losses = module.losses(spoken)
    expected = losses["frame_kl"] + 0.02 * losses["end_kl"] + 0.1 * losses["speaker_kl"]
    torch.testing.assert_close(losses["total"], expected)
    before = module.lm.speaker_projection.weight.detach().clone()
    fit(module, [spoken], 2)
    assert not torch.equal(before, module.lm.speaker_projection.weight)


@pytest.mark.parametrize(("drop", "expected"), [(0.0, 0), (1.0, 120), (0.5, 60)])
def test_speakers_are_dropped_one_by_one(drop: float, expected: int, make, batch: LMBatch) -> None:
    module, spoken = make(speaker=True, speaker_drop=drop), with_speaker(batch)
    batches = [module.augmented(spoken, (step,)) for step in range(40)]
    dropped = [0 if one.speaker_kept is None else int((~one.speaker_kept).sum()) for one in batches]
    assert abs(sum(dropped) - expected) <= (0 if drop in (0.0, 1.0) else 16)
    assert drop != 0.5 or set(dropped) > {1, 2}, "within a batch"
    assert "speaker_kl" not in make(speaker=True).losses(batch)


def test_the_speaker_encoder_trains_whoever_is_dropped(make, batch: LMBatch) -> None:
    """Every parameter has a gradient at every step, as DDP wants it."""
    module = make(speaker=True, speaker_drop=1.0)
    module.losses(module.augmented(with_speaker(batch)))["total"].backward()
    assert all(parameter.grad is not None for name, parameter in module.named_parameters() if "speaker" in name)


def test_packed_training_is_padded_training(make, batch: LMBatch, fit) -> None:
    weights, shares = [], []
    for packing in (None, Packing(None), Packing(20)):
        module = make(input_noise=0.3, speaker=True, speaker_drop=0.5)
        # Adam would turn the sign of a gradient that is nothing but rounding into a full step.
        module.packing, module.optimizer_factory = packing, partial(torch.optim.SGD, lr=0.05)
        trainer = fit(module, [with_speaker(batch)], 3)
        weights.append(module.state_dict())
        shares.append(float(trainer.callback_metrics["train/padding_share"]))
    for packed in weights[1:]:
        for name, expected in weights[0].items():
            torch.testing.assert_close(packed[name], expected, atol=2e-6, rtol=1e-4)
    assert shares[0] > shares[2] > shares[1] == 0


def test_average_of_integer_buffers(make, batch: LMBatch, fit) -> None:
    """Batch-norm counts its batches in int64, which has no average."""
    module, average = make(speaker=True), EMA(decay=0.9)
    fit(module, [with_speaker(batch)], 4, callbacks=[average])
    counters = {name: value for name, value in module.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counters
    assert {int(value) for value in counters.values()} == {4}, "one pass of the speaker encoder a step"
    assert all(value.dtype == torch.int64 for value in counters.values())


def test_validation_swaps_texts(make, batch: LMBatch, fit) -> None:
    module = make(steps=80)
    # All three utterances alike but for the text: only the text can tell them apart.
    trainer = fit(module, [batch], 80, valid=[batch], check_val_every_n_epoch=80)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    swapped = dataclasses.replace(batch, text_ids=batch.text_ids.roll(1, 0), text_lengths=batch.text_lengths.roll(1, 0))
    with torch.no_grad():
        module.eval()
        assert metrics["val/frame_kl"] == pytest.approx(float(module.losses(batch)["frame_kl"]), rel=1e-4)
        assert metrics["val/frame_kl_swapped_text"] == pytest.approx(float(module.losses(swapped)["frame_kl"]), rel=1e-4)
    assert metrics["val/frame_kl_swapped_text"] > metrics["val/frame_kl"]
    assert {"val/total", "val/end_kl"} <= set(metrics)


def test_validation_averages_over_frames(make, batch: LMBatch, fit) -> None:
    """Batches of few long and of many short utterances weigh by their frames: the number that the probe reports."""
    short = LMBatch(batch.text_ids[1:], batch.text_lengths[1:], batch.latents[1:, :6], torch.tensor([2, 1]), batch.posterior[1:, :6])
    long = LMBatch(batch.text_ids[:1], batch.text_lengths[:1], batch.latents[:1], batch.latent_lengths[:1], batch.posterior[:1])
    module = make(lr=0.0)
    metrics = fit(module, [batch], 1, valid=[short, long]).callback_metrics
    module.eval()
    with torch.no_grad():
        a, b = module.losses(short), module.losses(long)
    assert float(metrics["val/frame_kl"]) == pytest.approx(float(3 * a["frame_kl"] + 9 * b["frame_kl"]) / 12, rel=1e-5)
    assert float(metrics["val/end_kl"]) == pytest.approx(float(2 * a["end_kl"] + b["end_kl"]) / 3, rel=1e-5)
    assert float(metrics["val/frame_kl"]) == pytest.approx(probe(module.lm, [short, long]).frame_kl, rel=1e-5)


def test_the_direction_is_checked_at_once() -> None:
    with pytest.raises(UserError, match=r"objective.direction: got 'foo', expected prediction_posterior or posterior_prediction"):
        LMObjective(direction="foo")  # type: ignore[arg-type]


def test_one_utterance_has_no_text_to_swap_with(make, batch: LMBatch, fit) -> None:
    alone = LMBatch(batch.text_ids[:1], batch.text_lengths[:1], batch.latents[:1], batch.latent_lengths[:1], batch.posterior[:1])
    trainer = fit(make(), [batch], 1, valid=[alone])
    assert "val/frame_kl" in trainer.callback_metrics
    assert trainer.callback_metrics["val/frame_kl_swapped_text"].isnan(), "logged, for ranks must log alike, and worth nothing"
    together = fit(make(), [batch], 1, valid=[alone, batch]).callback_metrics["val/frame_kl_swapped_text"]
    assert torch.equal(together, fit(make(), [batch], 1, valid=[batch]).callback_metrics["val/frame_kl_swapped_text"])


def test_half_precision_autocast_keeps_the_loss_in_single(make, batch: LMBatch, fit) -> None:
    module = make()
    seen: list[torch.Tensor] = []
    original = module.losses
    module.losses = lambda b, layout=None: (seen.append(original(b)["total"]), original(b))[1]  # type: ignore[func-returns-value]
    fit(module, [batch], 2, precision="bf16-mixed")
    assert len(seen) == 2
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in seen)
    assert float(seen[0]) == pytest.approx(float(make().losses(batch)["total"]), rel=0.05)


@pytest.mark.parametrize("packing", [None, Packing(40)])
def test_attention_is_led_along_the_text(make, batch: LMBatch, fit, packing: Packing | None) -> None:
    module = make(steps=40, alignment_weight=1.0, alignment_layers=(1,))
    module.packing = packing
    before = module.aligned_losses(batch, module.lm.layout(batch, packing))
    plain = module.losses(batch)
    torch.testing.assert_close(before["total"], plain["total"] + before["alignment"])
    fit(module, [batch], 40)
    after = module.aligned_losses(batch, module.lm.layout(batch, packing))
    assert after["alignment"] < 0.5 * before["alignment"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alignment_weight": -1.0}, "expected a weight of 0 or more"),
        ({"alignment_weight": 1.0, "alignment_layers": ()}, "and layers for it"),
        ({"alignment_weight": 1.0, "alignment_layers": (7,)}, r"got \[7\], expected layers from 0"),
    ],
)
def test_attention_that_cannot_be_led_is_refused(make, options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make(**options)


def test_led_attention_is_in_single_under_autocast(make, batch: LMBatch) -> None:
    module = make(alignment_weight=1.0, alignment_layers=(1,))
    layout = module.lm.layout(batch, None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), TextAttention(module.lm, (1,)) as attention:
        module.losses(batch, layout)
        weights = attention.weights(1, batch, layout, layout.lengths - batch.text_lengths - batch.latent_lengths)
    assert weights.dtype == torch.float32
    assert not torch.equal(weights, weights.bfloat16().float()), "computed in fp32, not merely returned in it"
