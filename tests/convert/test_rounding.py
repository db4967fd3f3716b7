"""Which weights become 16 bits, and what that is said to cost."""

from __future__ import annotations

import pytest
import torch

from kalle.errors import UserError
from kalle.synthesis.export import rounded

HALVES = [torch.float16, torch.bfloat16]


def drawn(*shape: int) -> torch.Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", HALVES)
def test_weights_are_rounded_and_the_error_is_told(dtype: torch.dtype) -> None:
    weight = drawn(64, 64)
    result, rounding = rounded({"weight": weight, "count": torch.tensor(3)}, (), dtype)
    assert result["weight"].dtype == dtype
    assert result["count"].dtype == torch.int64
    assert rounding.where == "weight"
    assert rounding.error == pytest.approx(float((result["weight"].float() - weight).abs().max() / weight.std(correction=0)), rel=1e-5)
    assert 0 < rounding.error < 0.03
    assert not rounding.kept


@pytest.mark.parametrize("dtype", HALVES)
def test_statistics_stay(dtype: torch.dtype) -> None:
    result, rounding = rounded({"latent_std": drawn(8), "weight": drawn(8)}, {"latent_std"}, dtype)
    assert result["latent_std"].dtype == torch.float32
    assert rounding.kept == ("latent_std",)


@pytest.mark.parametrize("values", [[1e6, 1.0, 2.0], [1e-9, 2e-9, -3e-9]], ids=["overflow", "vanish"])
def test_what_float16_cannot_hold_stays(values: list[float]) -> None:
    for dtype, kept in ((torch.float16, ("weight",)), (torch.bfloat16, ())):
        assert rounded({"weight": torch.tensor(values)}, (), dtype)[1].kept == kept


def test_gains_close_to_one_stay_where_bfloat16_would_lose_them() -> None:
    gains = 1 + 5 * drawn(256)
    assert rounded({"norm": gains}, (), torch.bfloat16)[1].kept == ("norm",)
    assert rounded({"norm": gains}, (), torch.float16)[1].kept == ()


def test_a_constant_and_an_empty_tensor() -> None:
    result, rounding = rounded(
        {"ones": torch.ones(4), "zeros": torch.zeros(4), "one": torch.tensor([0.3]), "none": torch.empty(0)}, (), torch.float16
    )
    assert all(tensor.dtype == torch.float16 for tensor in result.values())
    assert rounding.where == "one"
    assert rounding.error < 1e-3


def test_half_precision_stays_as_it_is() -> None:
    weight = drawn(4).half()
    result, rounding = rounded({"weight": weight}, (), torch.float16)
    assert torch.equal(result["weight"], weight)
    assert rounding.where is None


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_weights_are_refused(value: float) -> None:
    with pytest.raises(UserError):
        rounded({"weight": torch.tensor([1.0, value])}, (), torch.float16)
