"""The wheel holds everything, and works away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    (found,) = out.glob("*.whl")
    return found


def test_contents(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"kalle/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*.py")}
    assert "kalle/configs/train_lm.yaml" in configs
    tracked = subprocess.run(["git", "ls-files", "ckpt/kalle-nano"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    shipped = {f"kalle/{name}" for name in tracked}
    assert shipped
    assert configs | sources <= names
    assert {name for name in names if name.startswith("kalle/ckpt/")} == shipped, "these, and nobody's own voice"
    voice = json.loads((ROOT / "ckpt/kalle-nano/config.json").read_text())["voice"]
    assert f"kalle/ckpt/kalle-nano/voices/{voice}.safetensors" in shipped
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    assert not [name for name in names if name.startswith("tests") or "__pycache__" in name]


def test_installed_elsewhere(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, timeout=250)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, cwd=elsewhere, env=environment, timeout=250, check=False
        )

    where = run("-c", "import kalle; print(kalle.__file__, kalle.__version__)")
    assert where.stdout.startswith(str(target)), where.stdout + where.stderr
    shown = run("-m", "kalle", "--help")
    assert shown.returncode == 0, shown.stderr
    assert "usage: kalle COMMAND" in shown.stdout
    code = "from kalle.cli.hydra_entry import *; print(configs_dir()); print(compose('train_lm', ['lm=nano', 'out=o']).lm.latent_dim)"
    composed = run("-c", code)
    assert composed.stdout.splitlines() == [str(target / "kalle" / "configs"), "64"], composed.stderr
    job = run("-m", "kalle", "train", "flowvae", "--cfg", "job", "flowvae=nano")
    assert job.returncode == 0, job.stderr
    assert "FlowVAEConfig" in job.stdout
