"""Properties of DiagGaussian, the project's currency."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from kalle.gaussian import DiagGaussian

MEANS = st.floats(-20, 20, width=32)
LOG_STDS = st.floats(-3, 3, width=32)


@st.composite
def gaussian_pairs(draw: st.DrawFn) -> tuple[DiagGaussian, DiagGaussian]:
    """Two Gaussians of one shape (T, D)."""
    frames, dim = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    count = frames * dim

    def one() -> DiagGaussian:
        mean, log_std = (draw(st.lists(values, min_size=count, max_size=count)) for values in (MEANS, LOG_STDS))
        return DiagGaussian(torch.tensor(mean).view(frames, dim), torch.tensor(log_std).view(frames, dim))

    return one(), one()


@settings(deadline=None)
@given(gaussian_pairs())
def test_kl_equals_torch_and_is_not_negative(pair):
    first, second = pair
    kl = first.kl_to(second)
    expected = kl_divergence(
        Normal(first.mean.double(), first.log_std.double().exp()), Normal(second.mean.double(), second.log_std.double().exp())
    )
    torch.testing.assert_close(kl.double(), expected, rtol=1e-5, atol=1e-5)
    assert kl.min() > -1e-5


@settings(deadline=None)
@given(gaussian_pairs())
def test_kl_to_itself_is_zero(pair):
    torch.testing.assert_close(pair[0].kl_to(pair[0]), torch.zeros_like(pair[0].mean), rtol=0, atol=1e-6)


@settings(deadline=None)
@given(gaussian_pairs())
def test_log_prob_equals_torch(pair):
    first, second = pair
    expected = Normal(first.mean.double(), first.log_std.double().exp()).log_prob(second.mean.double())
    torch.testing.assert_close(first.log_prob(second.mean).double(), expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None)
@given(gaussian_pairs(), st.floats(0, 2))
def test_sample_uses_the_given_noise(pair, temperature):
    gaussian, noise = pair[0], pair[1].mean
    expected = gaussian.mean + temperature * noise * gaussian.log_std.exp()
    torch.testing.assert_close(gaussian.sample(noise, temperature=temperature), expected, rtol=1e-5, atol=1e-5)


def test_zero_temperature_is_the_mean():
    gaussian = DiagGaussian(torch.randn(2, 3), torch.randn(2, 3))
    assert torch.equal(gaussian.sample(temperature=0.0), gaussian.mean)


def test_generator_makes_samples_reproducible():
    gaussian = DiagGaussian(torch.zeros(5, 4), torch.zeros(5, 4))
    first, again, other = (gaussian.sample(generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_passed_generator_leaves_the_global_one_alone():
    before = torch.get_rng_state()
    DiagGaussian(torch.zeros(3), torch.zeros(3)).sample(generator=torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.get_rng_state())


def test_samples_have_the_moments():
    gaussian = DiagGaussian(torch.full((200_000,), 3.0), torch.full((200_000,), math.log(0.5)))
    sample = gaussian.sample(generator=torch.Generator().manual_seed(0))
    assert sample.mean().item() == pytest.approx(3.0, abs=0.01)
    assert sample.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_parameters_compute_in_fp32(dtype):
    gaussian = DiagGaussian(torch.tensor([300.0], dtype=dtype), torch.tensor([12.0], dtype=dtype))
    standard = DiagGaussian.standard(gaussian.mean)
    assert standard.mean.dtype == dtype
    results = (gaussian.kl_to(standard), gaussian.sample(torch.ones(1, dtype=dtype)), gaussian.log_prob(gaussian.mean), gaussian.std)
    for result in results:
        assert result.dtype == torch.float32
        assert torch.isfinite(result).all()  # e^12 and 300^2 overflow fp16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_results_equal_those_of_the_same_numbers_in_fp32(dtype):
    torch.manual_seed(0)
    first, second = (DiagGaussian(*torch.randn(2, 8, 4).to(dtype)) for _ in range(2))
    wide, other = (gaussian.to(torch.float32) for gaussian in (first, second))
    assert torch.equal(first.kl_to(second), wide.kl_to(other))
    assert torch.equal(first.log_prob(second.mean), wide.log_prob(other.mean))


def test_half_gaussian_draws_the_noise_of_the_fp32_one():
    draws = [
        DiagGaussian(torch.zeros(6, dtype=dtype), torch.zeros(6, dtype=dtype)).sample(generator=torch.Generator().manual_seed(0))
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert torch.equal(*draws)


def test_end_and_standard_distributions():
    like = torch.randn(2, 3)
    end, standard = DiagGaussian.end(like), DiagGaussian.standard(like)
    assert torch.equal(end.mean, torch.ones(2, 3))
    torch.testing.assert_close(end.std, torch.full((2, 3), math.e))
    # The unit Gaussian's distance to the end distribution, which makes a fixed stop threshold of 0.5 delicate.
    torch.testing.assert_close(standard.kl_to(end), torch.full((2, 3), 0.635), rtol=0, atol=5e-4)


def test_parameters_are_mean_then_log_std():
    parameters = torch.randn(2, 6, 5)
    last, middle = DiagGaussian.from_parameters(torch.arange(4.0)), DiagGaussian.from_parameters(parameters, dim=1)
    assert (last.mean.tolist(), last.log_std.tolist()) == ([0.0, 1.0], [2.0, 3.0])
    assert torch.equal(middle.log_std, parameters[:, 3:])


def test_shapes_must_agree():
    with pytest.raises(ValueError, match="agree in shape"):
        DiagGaussian(torch.zeros(2), torch.zeros(3))


def test_kl_gradient_is_finite_far_from_the_target():
    mean = torch.tensor([50.0], requires_grad=True)
    log_std = torch.tensor([8.0], requires_grad=True)
    DiagGaussian(mean, log_std).kl_to(DiagGaussian(torch.zeros(1), torch.full((1,), -4.0))).sum().backward()
    for gradient in (mean.grad, log_std.grad):
        assert gradient is not None
        assert torch.isfinite(gradient).all()


def test_index_and_detach_keep_both_tensors_together():
    gaussian = DiagGaussian(torch.randn(2, 3, requires_grad=True), torch.randn(2, 3))
    assert torch.equal(gaussian[1].log_std, gaussian.log_std[1])
    assert not gaussian.detach().mean.requires_grad
    assert gaussian.to(torch.bfloat16).log_std.dtype == torch.bfloat16
