"""The activation for training against alias_free_torch's: values, all gradients, what is kept, and where each way can run."""

from __future__ import annotations

import copy
import importlib.util
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from kalle.errors import UserError
from kalle.models.flowvae import bigvgan, training_activation
from kalle.models.flowvae.bigvgan import AntiAliasedSnake, BigVGANDecoder, set_way
from kalle.models.flowvae.config import BigVGANConfig

CPU = torch.device("cpu")
needs_numba = pytest.mark.skipif(importlib.util.find_spec("numba") is None, reason="needs numba")
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")


def activation(channels: int, way: str = "none") -> AntiAliasedSnake:
    module = AntiAliasedSnake(channels)
    module.way = way
    with torch.no_grad():
        module.act.alpha.copy_(torch.linspace(-2, 1.5, channels))
        module.act.beta.copy_(torch.linspace(1, -1, channels))
    return module


def signals(*shape: int) -> tuple[Tensor, Tensor]:
    """An input and a gradient of the result."""
    generator = torch.Generator().manual_seed(shape[-1])
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def results(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """The value and the gradients of input, alpha and beta."""
    x = x.detach().requires_grad_()
    y = module(x)
    return [y.detach(), *torch.autograd.grad(y, [x, module.act.alpha, module.act.beta], dy)]


def check_results(found: list[Tensor], module: nn.Module, x: Tensor, dy: Tensor, tolerance: float = 3e-5) -> None:
    """Against the library in fp64."""
    exact = copy.deepcopy(module).double()
    exact.way = "none"
    for one, other in zip(found, results(exact, x.double(), dy.double()), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * max(1.0, float(other.abs().max())))


@needs_numba
@pytest.mark.parametrize("strip", [1, 3, 1024])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 11, 24, 97, 2500])
def test_numba_is_the_library_in_value_and_gradients(length: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from kalle.models.flowvae import fused_activation

    monkeypatch.setattr(fused_activation, "_ROW_STRIP", strip)
    module, (x, dy) = activation(3, "numba"), signals(2, 3, length)
    check_results(results(module, x, dy), module, x, dy)


@needs_numba
def test_any_layout_is_differentiated() -> None:
    module, (x, dy) = activation(5, "numba"), signals(2, 5, 120)
    for given, gradient in (
        (x[..., 3:-4], dy[..., 3:-4]),
        (x[..., ::2], dy[..., ::2]),
        (x.transpose(0, 1).contiguous().transpose(0, 1), torch.ones(()).expand(2, 5, 120)),
    ):
        check_results(results(module, given, gradient), module, given, gradient)


@needs_numba
def test_the_gradients_do_not_depend_on_the_threads() -> None:
    module, (x, dy), before = activation(8, "numba"), signals(3, 8, 6000), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = results(module, x, dy)
        torch.set_num_threads(3)
        assert all(torch.equal(one, other) for one, other in zip(results(module, x, dy), alone, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_numba
def test_half_precision_is_single_precision_rounded() -> None:
    module, (x, dy) = activation(3, "numba"), signals(2, 3, 50)
    x, dy = x.bfloat16(), dy.bfloat16()
    half, single = results(module, x, dy), results(module, x.float(), dy.float())
    assert [part.dtype for part in half] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
    assert all(torch.equal(one, other.to(one.dtype)) for one, other in zip(half, single, strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(module(x), half[0])


@needs_numba
def test_only_the_input_is_kept() -> None:
    def kept(module: nn.Module) -> int:
        storages: dict[int, int] = {}
        x = signals(2, 4, 500)[0].requires_grad_()

        def pack(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = module(x)
        del y
        return sum(storages.values())

    signal_bytes = 2 * 4 * 500 * 4
    assert kept(activation(4, "numba")) < 1.1 * signal_bytes
    assert kept(activation(4)) > 8 * signal_bytes


@needs_numba
@pytest.mark.parametrize("frozen", ["act.alpha", "act.beta"])
def test_a_frozen_parameter_gets_no_gradient(frozen: str) -> None:
    module, (x, dy) = activation(3, "numba"), signals(1, 3, 20)
    module.get_parameter(frozen).requires_grad_(False)
    module(x).backward(dy)
    assert {name for name, parameter in module.named_parameters() if parameter.grad is None} == {frozen}


@needs_numba
def test_what_a_pass_cannot_do_is_left_to_the_library() -> None:
    module, (x, _) = activation(3, "numba").double(), signals(1, 3, 20)
    exact = activation(3).double()(x.double())
    assert torch.equal(module(x.double()), exact)
    module.way = "triton"  # chosen for another device
    assert torch.equal(module(x.double()), exact)


@needs_numba
def test_an_input_without_samples_is_refused_as_by_the_library_and_one_without_rows_is_none() -> None:
    module, refusals = activation(3), []
    for module.way in ("none", "numba", "triton"):
        with pytest.raises(RuntimeError) as refused:
            module(torch.zeros(2, 3, 0))
        refusals.append(str(refused.value))
    assert len(set(refusals)) == 1
    module.way = "numba"
    assert [tuple(part.shape) for part in results(module, *signals(0, 3, 5))] == [(0, 3, 5), (0, 3, 5), (3,), (3,)]


@needs_numba
def test_it_can_be_traced_for_compilation() -> None:
    x, _ = signals(1, 3, 20)
    module = activation(3, "numba")
    traced = torch.compile(module, backend="aot_eager", fullgraph=True)
    for one, other in zip(*(torch.autograd.grad(f(x).sum(), list(module.parameters())) for f in (traced, module)), strict=True):
        torch.testing.assert_close(one, other)


def decoder() -> BigVGANDecoder:
    torch.manual_seed(0)
    config = BigVGANConfig(initial_channels=8, strides=(2, 2), block_kernel_sizes=(3,), block_dilations=(1,))
    return BigVGANDecoder(config, latent_dim=4)


@needs_numba
def test_a_decoder_changes_its_way_and_keeps_its_weights() -> None:
    model = decoder()
    z, names, wavs = torch.randn(2, 4, 6), list(model.state_dict()), []
    for way, chosen in (("none", "none"), ("auto", "numba"), ("numba", "numba")):
        assert set_way(model, way, CPU) == chosen
        assert {module.way for module in model.modules() if isinstance(module, AntiAliasedSnake)} == {chosen}
        assert list(model.state_dict()) == names
        wavs.append(model(z))
    assert not torch.equal(wavs[0], wavs[1]), "the way is not taken"
    torch.testing.assert_close(wavs[1], wavs[0])
    assert set_way(model, "auto", torch.device("cuda")) == "none"


@pytest.mark.parametrize(
    ("way", "model", "message"),
    [
        ("triton", decoder, "the device cpu.*set fused_activation=auto"),
        ("numba", decoder, r"pip install .*\[fast\]"),
        ("numba", lambda: nn.Linear(2, 2), "without anti-aliased activations"),
    ],
)
def test_a_way_that_cannot_run_is_refused(
    way: str, model: Callable[[], nn.Module], message: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(training_activation.importlib.util, "find_spec", lambda name: None if name == "numba" else found(name))
    with pytest.raises(UserError, match=message):
        set_way(model(), way, CPU)
    with caplog.at_level(logging.INFO, logger=bigvgan.__name__):
        assert set_way(decoder(), "auto", CPU) == "none"
    assert "no package numba" in caplog.text


INTERPRETED = """
from tests.models.test_training_activation import activation, check_results, signals
import torch
from kalle.models.flowvae.training_activation import fused_snake

def results(module, x, dy):
    x = x.detach().requires_grad_()
    y = fused_snake(x, module.act.alpha.exp(), module.act.beta.exp(), "triton")
    return [y.detach(), *torch.autograd.grad(y, [x, module.act.alpha, module.act.beta], dy)]

for batch, channels, length in [(1, 1, 1), (1, 1, 2), (2, 2, 5), (1, 1, 259)]:
    module, (x, dy) = activation(channels), signals(batch, channels, length)
    check_results(results(module, x, dy), module, x, dy)
module, (x, dy) = activation(2), signals(1, 2, 41)
cut = x[..., 3:-4], dy[..., 3:-4]
check_results(results(module, *cut), module, *cut)
half = x.bfloat16(), dy.bfloat16()
found, single = results(module, *half), results(module, *(part.float() for part in half))
assert [part.dtype for part in found] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float32]
for one, other in zip(found, single):
    torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-5, atol=1e-5)
print("all equal")
"""
ROOT = Path(__file__).parents[2]


@needs_triton
def test_triton_is_the_library_in_its_interpreter() -> None:
    """Short signals, odd lengths, one program and several for a channel, cut and half-precision signals, without a GPU."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT / 'src'}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.stdout == "all equal\n", done.stderr


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from kalle.models.flowvae import triton_activation as kernels

for kernel in (kernels._forward, kernels._backward):
    kinds = {name: "i32" for name in kernel.arg_names} | {name: "*fp32" for name in ("sums", "filters", "alpha", "beta")}
    kinds |= {name: "*bf16" for name in ("x", "y", "dy", "dx")} | {"LANES": "constexpr", "EACH": "constexpr"}
    source = ASTSource(kernel, {name: kinds[name] for name in kernel.arg_names}, {"LANES": kernels.LANES, "EACH": kernels.EACH})
    made = compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": kernels.LANES // 32})
    assert len(made.asm["cubin"]) > 1000
print("compiled")
"""


@needs_triton
@pytest.mark.slow
def test_triton_compiles_for_cuda_without_a_device(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([sys.executable, "-c", COMPILED], capture_output=True, text=True, check=False, env=environment)
    assert done.stdout == "compiled\n", done.stderr


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("length", [1, 5, 259, 20481])
def test_triton_is_the_library_on_a_device(length: int) -> None:
    module = activation(3, "triton").cuda()
    x, dy = (part.cuda() for part in signals(2, 3, length))
    found = results(module, x, dy)
    check_results(found, module, x, dy)
    assert all(torch.equal(one, other) for one, other in zip(results(module, x, dy), found, strict=True)), "not deterministic"
    half = results(module, x.bfloat16(), dy.bfloat16())
    for one, other in zip(half, results(module, x.bfloat16().float(), dy.bfloat16().float()), strict=True):
        torch.testing.assert_close(one, other.to(one.dtype), rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-4, atol=1e-4)
