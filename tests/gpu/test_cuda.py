"""What must be the same on a GPU; the same checks run on the CPU in the fast suite, so that their logic is known to be right."""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kalle.audio import read_audio
from kalle.checkpoint import load_strict
from kalle.cli.main import main
from kalle.convert.release_format import flowvae_config, flowvae_names, lm_config, lm_names
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference"
cuda = pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")])
TOLERANCE = {"cpu": {"rtol": 1e-4, "atol": 1e-5}, "cuda": {"rtol": 1e-3, "atol": 1e-4}}


@pytest.fixture(params=["cpu", cuda])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """The device, with full fp32 products: TF32 keeps ten bits."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def golden(name: str, device: str) -> dict[str, Tensor]:
    return {key: value.to(device) for key, value in load_file(REFERENCE / f"{name}_io.safetensors").items()}


def swapped(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


@torch.no_grad()
def test_flowvae_gives_the_golden_numbers(device: str) -> None:
    config = flowvae_config(json.loads((REFERENCE / "flowvae_tiny.json").read_text()), "flowvae_tiny.json")
    released = torch.load(REFERENCE / "flowvae_tiny.pt", weights_only=True)["generator"]
    model, names = FlowVAE(config), flowvae_names(released, len(config.encoder.strides), len(config.decoder.block_kernel_sizes))
    load_strict(model, {ours: released[theirs] for theirs, ours in names.items()}, "flowvae_tiny")
    model, io = model.to(device).eval(), golden("flowvae_tiny", device)
    posterior = model.encode(io["wav"][:, 0])
    assert posterior.mean.device.type == device
    torch.testing.assert_close(swapped(torch.cat([posterior.mean, posterior.log_std], -1)), io["latents"], **TOLERANCE[device])
    torch.testing.assert_close(swapped(model.to_prior(swapped(io["z"]))), io["flow_z"], **TOLERANCE[device])
    torch.testing.assert_close(model.decode(swapped(io["z"])), io["decoded"][:, 0], **TOLERANCE[device])


@torch.no_grad()
@pytest.mark.parametrize("prompted", [False, True])
def test_lm_gives_the_golden_numbers(device: str, prompted: bool) -> None:
    """Free-running frames feed rounding back, so on CUDA each prediction is compared under the golden frames before it."""
    released = torch.load(REFERENCE / "lm_tiny.pt", weights_only=True)
    lm = KalleLM(lm_config(json.loads((REFERENCE / "lm_tiny.json").read_text()), released, "lm_tiny"))
    load_strict(lm, {ours: released[theirs] for theirs, ours in lm_names(released).items()}, "lm_tiny")
    lm, io = lm.to(device).eval(), golden("lm_tiny", device)
    expected = io["distributions_prompted" if prompted else "distributions_unprompted"][0].T
    mean, log_std = expected.chunk(2, dim=-1)
    frames = mean + io["noise"][: len(mean), 0, 0] * log_std.exp()
    prediction, state = lm.prefill(io["input_ids"][None], io["prompt_latents"] if prompted else None)
    rows = [prediction]
    for frame in frames[:-1]:
        prediction, state = lm.step(frame[None], state)
        rows.append(prediction)
    assert rows[0].mean.device.type == device
    torch.testing.assert_close(torch.cat([row.mean for row in rows]), mean, **TOLERANCE[device])
    torch.testing.assert_close(torch.cat([row.log_std for row in rows]), log_std, **TOLERANCE[device])


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """The golden weights under the released file names."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for source, target in (
        ("flowvae_tiny.pt", "flowvae.pt"),
        ("flowvae_tiny.json", "flowvae.json"),
        ("lm_tiny.pt", "model.pt"),
        ("lm_tiny.json", "lm.json"),
    ):
        shutil.copy(REFERENCE / source, folder / target)
    Tokenizer.bytes().save(folder / "llama3")
    return folder


def test_the_release_s_own_command_speaks(device: str, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("infer_on_device", ROOT / "scripts" / "infer.py")
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    flags = ["--target_text", "Hi.", "--ckpt", str(ckpt), "--seed", "1", "--device", device, "--output", "out.wav"]
    assert script.main(flags) == 0
    assert len(read_audio("out.wav")) > 0


@pytest.mark.parametrize("stage", ["flowvae", "lm"])
def test_one_step_in_half_precision(device: str, stage: str, flowvae_overrides, lm_overrides, toy_weights: Path, tmp_path: Path) -> None:
    overrides = [word for word in (flowvae_overrides if stage == "flowvae" else lm_overrides) if not word.startswith("device=")]
    more = ["precision=bf16-mixed", "trainer.max_steps=1", "trainer.val_check_interval=1", f"device={device}", f"out={tmp_path}"]
    more += [f"flowvae={toy_weights}"] if stage == "lm" else []
    assert main(["train", stage, *overrides, *more]) == 0
    model: torch.nn.Module = (
        FlowVAE.from_pretrained(tmp_path / "weights") if stage == "flowvae" else KalleLM.from_pretrained(tmp_path / "weights")
    )
    assert all(parameter.isfinite().all() for parameter in model.parameters())
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert state["global_step"] == 1
    assert (len(state["optimizer_states"])) == (2 if stage == "flowvae" else 1)
