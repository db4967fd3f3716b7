"""16-bit weights on a CPU: products of enough rows, and the choice between the two types."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kalle.errors import UserError
from kalle.models import half_precision
from kalle.models.half_precision import PaddedLinear, fastest_half, pad_products
from kalle.models.lm import KalleLM
from kalle.synthesis.kalle import resolve_dtype


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[tuple[torch.dtype, int], float]]:
    """How long each candidate takes, in place of the clock."""
    times = {(torch.float16, 1): 3.0, (torch.bfloat16, 1): 4.0, (torch.bfloat16, 4): 2.0}
    half_precision._fastest.cache_clear()
    monkeypatch.setattr(half_precision, "_seconds", lambda dtype, rows: times[dtype, rows])
    yield times
    half_precision._fastest.cache_clear()


@torch.no_grad()
@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 1, 6), (5, 6)])
@pytest.mark.parametrize("bias", [False, True])
def test_rows_of_padding_do_not_show(shape: tuple[int, ...], bias: bool) -> None:
    layer = PaddedLinear(6, 3, bias=bias)
    x = torch.randn(shape)
    expected = layer(x)
    layer.least_rows = 4
    torch.testing.assert_close(layer(x), expected)


def test_the_faster_type_is_taken(seconds: dict[tuple[torch.dtype, int], float], toy_lm_config) -> None:
    cpu = torch.device("cpu")
    lm = KalleLM(toy_lm_config)
    pad_products(lm.backbone)
    assert lm.backbone.layers[0].mlp.up_proj.least_rows == 1, "fp32 is left alone"
    lm.backbone.to(torch.bfloat16)
    pad_products(lm.backbone)
    assert lm.backbone.layers[0].mlp.up_proj.least_rows == 4
    assert fastest_half(cpu) == resolve_dtype("half", cpu) == torch.bfloat16
    seconds[torch.float16, 1] = 1.0
    half_precision._fastest.cache_clear()
    assert fastest_half(cpu) == torch.float16
    assert fastest_half(torch.device("cuda")) == torch.bfloat16
    with pytest.raises(UserError, match="half"):
        resolve_dtype("int4", cpu)
