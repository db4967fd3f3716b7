"""KL losses on latents, checked against the published computation, closed forms and numeric optimisation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from kalle.gaussian import DiagGaussian
from kalle.losses.latent import (
    LatentHealth,
    constant_gaussian_baseline,
    directed_kl,
    flow_kl,
    latent_health,
    next_distribution_loss,
    speaker_kl,
)
from kalle.models.lm_batch import LMBatch

REFERENCE = Path(__file__).parents[1] / "reference"
DIRECTIONS = {"prediction_posterior": "pred_target", "posterior_prediction": "target_pred"}


def make_batch(posterior: DiagGaussian, lengths: torch.Tensor) -> LMBatch:
    count = len(lengths)
    return LMBatch(
        text_ids=torch.zeros(count, 1, dtype=torch.int64),
        text_lengths=torch.ones(count, dtype=torch.int64),
        latents=torch.zeros_like(posterior.mean),
        latent_lengths=lengths,
        posterior=posterior,
    )


def golden_batch() -> tuple[DiagGaussian, LMBatch, dict[str, torch.Tensor]]:
    """The reference's positions (text and audio in one row) as prediction rows and posterior frames."""
    io = load_file(REFERENCE / "lm_speaker_tiny_io.safetensors")
    lengths = io["target_mask"].sum(1).long()
    frames, dim = int(lengths.max()), io["pred_mean"].shape[2]
    rows = [torch.zeros(2, frames + 1, dim) for _ in range(2)]
    targets = [torch.zeros(2, frames, dim) for _ in range(2)]
    for item, length in enumerate(lengths.tolist()):
        positions = (io["target_mask"][item] + io["end_mask"][item]).nonzero()[:, 0]
        assert len(positions) == length + 1
        for row, name in zip(rows, ("pred_mean", "pred_log_scale"), strict=True):
            row[item, : length + 1] = io[name][item, positions]
        for target, half in zip(targets, io["labels"].chunk(2, dim=-1), strict=True):
            target[item, :length] = half[item, positions[:-1]]
    return DiagGaussian(*rows), make_batch(DiagGaussian(*targets), lengths), io


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_next_distribution_loss_equals_the_reference(direction):
    prediction, batch, io = golden_batch()
    loss = next_distribution_loss(prediction, batch, direction, end_weight=0.3)
    frame, end = (io[f"{part}_loss_{DIRECTIONS[direction]}"].item() for part in ("audio", "end"))
    assert loss.frame_kl.item() == pytest.approx(frame, rel=1e-5)
    assert loss.end_kl.item() == pytest.approx(end, rel=1e-5)
    assert loss.total.item() == pytest.approx(frame + 0.3 * end, rel=1e-5)
    assert (loss.frames.item(), loss.utterances.item()) == (11, 2)


def test_padding_has_no_part_in_loss_or_gradient():
    prediction, batch, _ = golden_batch()
    mean, log_std = (tensor.clone() for tensor in (prediction.mean, prediction.log_std))
    expected = next_distribution_loss(DiagGaussian(mean, log_std), batch)
    after_end = torch.arange(mean.shape[1]) > batch.latent_lengths[:, None]
    assert after_end.any()
    mean[after_end], log_std[after_end] = 1e30, 1e3  # overflows in the KL
    mean.requires_grad_(True)
    log_std.requires_grad_(True)
    loss = next_distribution_loss(DiagGaussian(mean, log_std), batch)
    loss.total.backward()
    assert loss.total.item() == expected.total.item()
    for gradient in (mean.grad, log_std.grad):
        assert gradient is not None
        assert (gradient[after_end] == 0).all()
        assert (gradient[~after_end].abs().sum(-1) > 0).all()


def test_frames_weigh_equally_whatever_their_utterance():
    torch.manual_seed(0)
    posterior = DiagGaussian(torch.randn(2, 5, 3), torch.randn(2, 5, 3))
    prediction = DiagGaussian(torch.randn(2, 6, 3), torch.randn(2, 6, 3))
    loss = next_distribution_loss(prediction, make_batch(posterior, torch.tensor([5, 1])))
    frames = [prediction[0, t].kl_to(posterior[0, t]).mean() for t in range(5)] + [prediction[1, 0].kl_to(posterior[1, 0]).mean()]
    ends = [prediction[b, t].kl_to(DiagGaussian(torch.ones(3), torch.ones(3))).mean() for b, t in ((0, 5), (1, 1))]
    assert loss.frame_kl.item() == pytest.approx(torch.stack(frames).mean().item(), rel=1e-5)
    assert loss.end_kl.item() == pytest.approx(torch.stack(ends).mean().item(), rel=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_perfect_prediction_costs_nothing(direction):
    torch.manual_seed(0)
    posterior = DiagGaussian(torch.randn(1, 4, 3), torch.randn(1, 4, 3))
    end = DiagGaussian.end(torch.zeros(1, 1, 3))
    perfect = DiagGaussian(torch.cat([posterior.mean, end.mean], 1), torch.cat([posterior.log_std, end.log_std], 1))
    loss = next_distribution_loss(perfect, make_batch(posterior, torch.tensor([4])), direction)
    assert abs(loss.total.item()) < 1e-6


def test_misuse_is_reported():
    prediction, batch, _ = golden_batch()
    with pytest.raises(ValueError, match="direction: got 'backwards'"):
        next_distribution_loss(prediction, batch, "backwards")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="one row more"):
        next_distribution_loss(prediction[:, :-1], batch)
    with pytest.raises(ValueError, match="reduction"):
        flow_kl(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3), "sum")  # type: ignore[arg-type]


def test_flow_kl_without_a_flow_is_the_vae_kl_in_expectation():
    generator = torch.Generator().manual_seed(0)
    posterior = DiagGaussian(torch.tensor([[[0.5, -1.0, 0.0]]]), torch.tensor([[[-1.0, 0.3, -0.2]]]))
    many = DiagGaussian(posterior.mean.expand(1, 200_000, 3), posterior.log_std.expand(1, 200_000, 3))
    estimate = flow_kl(many.sample(generator=generator), many.log_std, "none").mean((0, 1))
    torch.testing.assert_close(estimate, posterior.kl_to(DiagGaussian.standard(posterior.mean))[0, 0], rtol=0, atol=0.01)


def test_flow_kl_reductions():
    torch.manual_seed(0)
    z, log_std = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    elements = flow_kl(z, log_std, "none")
    torch.testing.assert_close(elements, -log_std - 0.5 + z**2 / 2)
    assert flow_kl(z, log_std).item() == pytest.approx(elements.mean().item(), rel=1e-6)
    assert flow_kl(z, log_std, "sum_dim").item() == pytest.approx(4 * elements.mean().item(), rel=1e-6)
    assert flow_kl(z.bfloat16(), log_std.bfloat16()).dtype == torch.float32


def test_speaker_kl_equals_the_reference():
    io = load_file(REFERENCE / "lm_speaker_tiny_io.safetensors")
    weights = torch.load(REFERENCE / "lm_speaker_tiny.pt", weights_only=True)
    parameters = torch.nn.functional.linear(
        io["speaker_embedding"], weights["speaker_cond_disp_linear.weight"], weights["speaker_cond_disp_linear.bias"]
    )
    kl = speaker_kl(DiagGaussian.from_parameters(parameters))
    assert kl.item() == pytest.approx(io["speaker_kl_per_dim"].item(), rel=1e-4)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_constant_baseline_equals_numeric_optimisation(direction):
    generator = torch.Generator().manual_seed(1)
    mean = 2 * torch.randn(40, 3, generator=generator, dtype=torch.float64) + torch.tensor([0.0, 5.0, -1.0])
    log_std = 0.5 * torch.randn(40, 3, generator=generator, dtype=torch.float64) - 0.4
    baseline = constant_gaussian_baseline([DiagGaussian(mean, log_std)], direction)
    found = torch.zeros(2, 3, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([found], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-9, tolerance_change=1e-14)

    def mean_kl(m: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
        """The textbook formula in fp64; DiagGaussian computes in fp32."""
        p_mean, p_log_std, q_mean, q_log_std = (m, s, mean, log_std) if direction == "prediction_posterior" else (mean, log_std, m, s)
        ratio = torch.exp(2 * (p_log_std - q_log_std))
        return (q_log_std - p_log_std + (ratio + (p_mean - q_mean) ** 2 * torch.exp(-2 * q_log_std)) / 2 - 0.5).mean(0)

    def closure() -> torch.Tensor:
        optimiser.zero_grad()
        loss = mean_kl(found[0], found[1]).sum()
        loss.backward()
        return loss

    optimiser.step(closure)
    torch.testing.assert_close(baseline.distribution.mean, found[0].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(baseline.distribution.log_std, found[1].detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(baseline.kl, mean_kl(*found.detach()), rtol=1e-8, atol=1e-9)
    direct = directed_kl(baseline.distribution, DiagGaussian(mean, log_std), direction).mean(0)
    torch.testing.assert_close(baseline.kl.float(), direct, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_constant_baseline_streams(direction):
    torch.manual_seed(0)
    whole = DiagGaussian(torch.randn(30, 4), 0.3 * torch.randn(30, 4))
    parts = (whole[start:stop] for start, stop in ((0, 7), (7, 8), (8, 30)))
    streamed, at_once = constant_gaussian_baseline(parts, direction), constant_gaussian_baseline([whole], direction)
    assert streamed.frames == at_once.frames == 30
    torch.testing.assert_close(streamed.kl, at_once.kl, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(streamed.distribution.mean, at_once.distribution.mean, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_constant_baseline_of_one_repeated_posterior_is_itself(direction):
    one = DiagGaussian(torch.tensor([[3.0, -2.0]]), torch.tensor([[-0.5, 0.2]]))
    baseline = constant_gaussian_baseline([one] * 5, direction)
    torch.testing.assert_close(baseline.kl, torch.zeros(2, dtype=torch.float64), rtol=0, atol=1e-9)
    torch.testing.assert_close(baseline.distribution.log_std.float(), one.log_std[0])


def test_constant_baseline_needs_frames():
    with pytest.raises(ValueError, match="no frames"):
        constant_gaussian_baseline([], "prediction_posterior")


def test_latent_health():
    torch.manual_seed(0)
    mean = torch.randn(2, 500, 4)
    mean[..., 3] = 0.5  # a dimension whose mean never moves
    posterior = DiagGaussian(mean, torch.full_like(mean, math.log(0.5)))
    z = posterior.sample()
    health = latent_health(posterior, z)
    assert health["active_dimensions"] == 3
    assert health["mean_std"] == pytest.approx(0.5, rel=1e-5)
    assert health["mean_abs_mean"] == pytest.approx(mean.abs().mean().item(), rel=1e-5)
    assert health["kl_per_frame"] == pytest.approx(4 * health["kl_per_element"], rel=1e-5)
    kl = posterior.kl_to(DiagGaussian.standard(mean)).mean().item()
    assert health["kl_per_element"] == pytest.approx(kl, rel=1e-6)
    assert health["z_std"] == pytest.approx(z.flatten(0, 1).std(0, unbiased=False).mean().item(), rel=1e-5)
    with_flow = latent_health(posterior, z, z_prior=2 * z)
    assert with_flow["kl_per_element"] == pytest.approx(flow_kl(2 * z, posterior.log_std).item(), rel=1e-6)


def test_the_health_of_a_split_is_that_of_all_its_frames() -> None:
    """Utterances of unequal length, each with a constant mean: a dimension moves between them alone."""
    torch.manual_seed(0)
    means = torch.tensor([[0.0, 1.0], [4.0, 1.0], [0.0, 1.0]])
    parts = [mean.expand(1, frames, 2) for mean, frames in zip(means, (3, 40, 7), strict=True)]
    posteriors = [DiagGaussian(part, torch.full_like(part, -1.0)) for part in parts]
    samples = [posterior.sample() for posterior in posteriors]
    whole, halves = LatentHealth(2), [LatentHealth(2), LatentHealth(2)]
    for index, (posterior, z) in enumerate(zip(posteriors, samples, strict=True)):
        assert latent_health(posterior, z)["active_dimensions"] == 0
        whole.add(posterior, z)
        halves[index % 2].add(posterior, z)
    joined = DiagGaussian(torch.cat([p.mean for p in posteriors], 1), torch.cat([p.log_std for p in posteriors], 1))
    expected = latent_health(joined, torch.cat(samples, 1))
    assert whole.summary() == pytest.approx(expected)
    assert expected["active_dimensions"] == 1
    halves[0].sums += halves[1].sums
    assert halves[0].summary() == pytest.approx(expected), "sums of several ranks may be added"
