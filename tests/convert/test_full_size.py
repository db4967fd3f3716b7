"""The released sizes, 1.24 G + 204 M random weights: converted in little memory, unchanged when converted back, and spoken with."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from kalle.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference"
SHAPES = json.loads((REFERENCE / "released_tensors.json").read_text())
HEAD, EMBEDDING = "base_model.lm_head.weight", "base_model.model.embed_tokens.weight"
NEEDED_DISK_BYTES, NEEDED_MEMORY_BYTES = 20e9, 9e9
MOST_BYTES = 12e9
PARAMETERS = 1_238_979_584
FRAMES, HOP = 5, 1280

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass(frozen=True)
class Run:
    """A finished command. ``own_bytes`` is the peak of its private memory, ``all_bytes`` counts the mapped file's pages too."""

    out: str
    err: str
    own_bytes: int
    all_bytes: int


def run(*command: str | Path) -> Run:
    """Run python with ``command`` and watch its memory in /proc; it must succeed."""
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": "1"}
    )
    own = everything = 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        lines = [line.split() for line in status.read_text().splitlines()] if status.exists() else []
        kilobytes = {line[0]: int(line[1]) for line in lines if line[0] in ("RssAnon:", "RssShmem:", "VmHWM:")}
        own = max(own, 1024 * (kilobytes.get("RssAnon:", 0) + kilobytes.get("RssShmem:", 0)))
        everything = max(everything, 1024 * kilobytes.get("VmHWM:", 0))
        time.sleep(0.02)
    out, err = process.communicate()
    assert process.returncode == 0, err
    return Run(out, err, own, everything)


class RandomTensors:
    """Tensors cut out of one pool of random numbers, each at a place of its own, so that no two are alike."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(1 << 25, generator=self._generator)

    def make(self, name: str, shape: list[int]) -> Tensor:
        """A tensor that a network can compute with: gains and norms near one, the rest small."""
        count = torch.Size(shape).numel()
        start = int(torch.randint(len(self._pool) // 2, (1,), generator=self._generator))
        rows = [self._pool[start : start + min(count, len(self._pool) // 2)]] * -(-count // (len(self._pool) // 2))
        values = torch.cat(rows)[:count].reshape(shape)
        if name.endswith("filter"):
            return values.abs_().add_(0.1).div_(values.sum())
        if name.endswith("weight_g") or "norm.weight" in name:
            return values.mul_(0.01).add_(0.6)
        return values.mul_(0.02)


def write_release(folder: Path, dtype: torch.dtype) -> None:
    """flowvae.pt, model.pt with a backbone in ``dtype`` and a tied head, and a tokenizer."""
    folder.mkdir()
    tensors = RandomTensors()
    torch.save({"generator": {n: tensors.make(n, s) for n, s in SHAPES["flowvae.pt['generator']"].items()}}, folder / "flowvae.pt")
    model = {n: tensors.make(n, s).to(dtype if n.startswith("base_model") else None) for n, s in SHAPES["model.pt"].items() if n != HEAD}
    torch.save({**model, HEAD: model[EMBEDDING]}, folder / "model.pt")
    Tokenizer.bytes().save(folder / "tokenizer")


@pytest.fixture(scope="module", params=["float32", "float16"])
def ckpt(request, tmp_path_factory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("full")
    free = shutil.disk_usage(folder).free
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    available = 1024 * int(meminfo["MemAvailable"].split()[0])
    if free < NEEDED_DISK_BYTES or available < NEEDED_MEMORY_BYTES:
        pytest.skip(
            f"full size needs {NEEDED_DISK_BYTES / 1e9:.0f} GB of disk and {NEEDED_MEMORY_BYTES / 1e9:.0f} GB of memory: "
            f"{free / 1e9:.0f} and {available / 1e9:.0f} GB are free"
        )
    write_release(folder / "ckpt", getattr(torch, request.param))
    yield folder / "ckpt"
    shutil.rmtree(folder)


def assert_same_bytes(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert torch.equal(got[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True, mmap=True)


def test_conversion_and_back_within_12_gb_and_every_byte_kept(ckpt: Path) -> None:
    name, back = ckpt.parent / "name", ckpt.parent / "back"
    config = REFERENCE / "released_flowvae_config.json"
    files = ["--flowvae", ckpt / "flowvae.pt", "--flowvae-config", config, "--lm", ckpt / "model.pt", "--tokenizer", ckpt / "tokenizer"]
    try:
        there = run("-m", "kalle", "convert", "release", *files, "--out", name)
        return_way = run("-m", "kalle", "convert", "to-release", name, "--out", back)
        for step, measured in (("release", there), ("to-release", return_way)):
            print(f"{step}: {measured.own_bytes / 1e9:.2f} GB of its own, {measured.all_bytes / 1e9:.2f} GB with mapped files")
            assert 0 < measured.own_bytes < measured.all_bytes < MOST_BYTES
        assert_same_bytes(load(back / "flowvae.pt")["generator"], load(ckpt / "flowvae.pt")["generator"])
        got, expected = load(back / "model.pt"), load(ckpt / "model.pt")
        assert_same_bytes(got, expected)
        assert sum(tensor.numel() for key, tensor in got.items() if key != HEAD) == PARAMETERS
        assert json.loads((back / "flowvae.json").read_text()) == json.loads(config.read_text())
    finally:
        shutil.rmtree(name, ignore_errors=True)
        shutil.rmtree(back, ignore_errors=True)


@pytest.mark.parametrize("ckpt", ["float32"], indirect=True)
def test_the_script_converts_once_and_speaks_and_so_does_kalle_say(ckpt: Path, tmp_path: Path) -> None:
    seconds = str(FRAMES * HOP / 16000)
    script = [ROOT / "scripts" / "infer.py", "--target_text", "Hi.", "--ckpt", ckpt, "--seed", "1", "--max_seconds", seconds]
    first = run(*script, "--device", "cpu", "--output", tmp_path / "first.wav")
    assert "converting the released files" in first.err
    say = ["-m", "kalle", "say", "Hi.", "--model", ckpt / "kalle-release", "--seed", "1", "--device", "cpu", "--max-seconds", seconds]
    again = run(*say, "--output", tmp_path / "again.wav")
    assert "converting" not in again.err
    one, other = (soundfile.read(tmp_path / f"{name}.wav", dtype="int16")[0] for name in ("first", "again"))
    assert one.shape == (FRAMES * HOP,)
    assert (one == other).all()
    exact = run(*script, "--device", "cpu", "--output", tmp_path / "exact.wav", "--release-exact")
    assert "converting" not in exact.err
    assert soundfile.info(tmp_path / "exact.wav").frames == (FRAMES - 1) * HOP, "the release drops the last frame"
