"""The compiled activation against the library's and against the form in torch operations, and what is used where it cannot be had."""

from __future__ import annotations

import importlib.util
import logging
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kalle.models.flowvae import inference
from kalle.models.flowvae.bigvgan import AntiAliasedSnake
from kalle.models.flowvae.inference import PreparedActivation

pytest.importorskip("numba")
fused = pytest.importorskip("kalle.models.flowvae.fused_activation")


def activation(channels: int) -> torch.nn.Module:
    module = AntiAliasedSnake(channels).requires_grad_(False)
    module.act.alpha.copy_(torch.linspace(-2, 1.5, channels))
    module.act.beta.copy_(torch.linspace(1, -1, channels))
    return module


def signal(channels: int, length: int, batch: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, C, 1, n), channels-last."""
    x = torch.randn(batch, 1, length, channels, generator=torch.Generator().manual_seed(length))
    return x.permute(0, 3, 1, 2).to(dtype)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=["one strip, one thread", "many strips, items and threads", "threads of its own"])
def cut(request, monkeypatch, threads):
    """Everything at once, or cut as finely as can be."""
    threads(1)
    if request.param != "one strip, one thread":
        threads(3)
        monkeypatch.setattr(fused, "_STRIP_VALUES", 1)
        monkeypatch.setattr(fused, "_ITEM_VALUES", 64)
        monkeypatch.setattr(fused, "_LEAST_VALUES", 1)
    if request.param == "threads of its own":
        monkeypatch.setattr(fused, "_torch_team", lambda: None)


@torch.inference_mode()
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 11, 12, 23, 97, 700])
@pytest.mark.parametrize("channels", [1, 5, 24])
def test_it_is_the_activation_of_the_library(length, channels, cut):
    module, x = activation(channels), signal(channels, length, batch=2)
    prepared = PreparedActivation(module, fused.FusedActivation)
    past = signal(channels, 3, batch=2)
    whole = prepared.after(past, [x], True, True)
    assert torch.equal(whole[..., :3], past)
    exact = module.double()(x[:, :, 0].double())
    torch.testing.assert_close(whole[:, :, 0, 3:].double(), exact, rtol=5e-6, atol=5e-6)


@torch.inference_mode()
@pytest.mark.parametrize(("starts", "ends"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("first", [0, 1, 7, 40])
def test_a_signal_in_two_parts_is_that_in_torch(starts, ends, first, cut):
    module, x = activation(5), signal(5, 40, batch=2)
    parts, sent = [x[..., :first], x[..., first:]], 3
    by_torch, by_numba = (
        PreparedActivation(module, kind).after(x[..., :2], parts, starts, ends, sent) for kind in (None, fused.FusedActivation)
    )
    assert by_numba.shape[-1] == 2 + 40 - sent - 5 * (2 - starts - ends)
    torch.testing.assert_close(by_numba, by_torch, rtol=5e-6, atol=5e-6)


@torch.inference_mode()
@pytest.mark.parametrize("read", [torch.float32, torch.bfloat16])
def test_bfloat16_is_rounded_as_torch_does(read, cut):
    prepared, x = PreparedActivation(activation(24), fused.FusedActivation), signal(24, 300, dtype=read)
    nothing = x[..., :0]
    wide = prepared.after(nothing.float(), [x.float()], True, True)
    assert torch.equal(prepared.after(nothing.bfloat16(), [x], True, True), wide.bfloat16())
    assert torch.equal(prepared.after(nothing.float(), [x], True, True), wide)


@torch.inference_mode()
def test_a_large_angle_and_a_vanishing_alpha():
    module, x = activation(3), 1000 * signal(3, 50)
    module.act.alpha.copy_(torch.tensor([-100.0, 3.0, 0.0]))
    y = PreparedActivation(module, fused.FusedActivation).after(x[..., :0], [x], True, True)
    exact = module.double()(x[:, :, 0].double())
    # fp32 knows an angle of 20,000 to 1e-3.
    torch.testing.assert_close(y[:, :, 0].double(), exact, rtol=1e-5, atol=3e-3)


@torch.inference_mode()
@pytest.mark.parametrize("layout", ["contiguous", "every second sample"])
def test_any_layout_is_taken(layout):
    x = signal(5, 60, batch=2)
    x = x.contiguous() if layout == "contiguous" else x[..., ::2]
    by_torch, by_numba = (
        PreparedActivation(activation(5), kind).after(x[..., :4], [x], True, True) for kind in (None, fused.FusedActivation)
    )
    torch.testing.assert_close(by_numba, by_torch, rtol=5e-6, atol=5e-6)


def test_what_it_cannot_differentiate_is_left_to_torch(monkeypatch):
    monkeypatch.setattr(fused.FusedActivation, "after", lambda *_: pytest.fail("no derivative"))
    prepared, x = PreparedActivation(activation(3), fused.FusedActivation), signal(3, 30)
    y = prepared.after(x[..., :0], [x.requires_grad_()], True, True)
    assert torch.autograd.grad(y.sum(), x)[0].abs().sum() > 0


@torch.inference_mode()
def test_other_dtypes_are_left_to_torch():
    x = signal(3, 30, dtype=torch.float64)
    y = PreparedActivation(activation(3), fused.FusedActivation).after(x[..., :0].float(), [x], True, True)
    assert y.dtype == torch.float32


@torch.inference_mode()
def test_several_threads_may_call_it_at_once(threads):
    threads(2)
    prepared, x = PreparedActivation(activation(24), fused.FusedActivation), signal(24, 6000)
    alone = prepared.after(x[..., :0], [x], True, True)

    @torch.inference_mode()
    def call(_: int) -> bool:
        return torch.equal(prepared.after(x[..., :0], [x], True, True), alone)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(40)))


@pytest.mark.parametrize("broken", ["missing", "unusable", "slower"])
def test_torch_takes_over_and_says_so(broken, monkeypatch, caplog):
    if broken == "missing":
        found = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "numba" else found(name))
    elif broken == "unusable":
        monkeypatch.setitem(sys.modules, "kalle.models.flowvae.fused_activation", None)
    else:
        monkeypatch.setattr(inference, "_activation_seconds", lambda activation, x: float(activation.fused is not None))
    with caplog.at_level(logging.INFO, logger=inference.__name__):
        assert inference.fused_activation.__wrapped__() is None
    (record,) = caplog.records
    assert "by torch" in record.message


def test_a_numba_that_does_not_compile_is_left_to_torch(tmp_path: Path) -> None:
    """Its errors have no common base; compiling switched off raises one of them."""
    code = "from kalle.models.flowvae.inference import fused_activation; assert fused_activation() is None"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"NUMBA_DISABLE_JIT": "1", "NUMBA_CACHE_DIR": str(tmp_path)})
