"""What may import what, seen from outside."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import kalle

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "kalle"
EXTRAS = (
    "lightning",
    "hydra",
    "omegaconf",
    "lhotse",
    "jiwer",
    "matplotlib",
    "gradio",
    "inflect",
    "wetext",
    "wandb",
    "tensorboard",
    "pesq",
    "pystoi",
    "faster_whisper",
    "resemblyzer",
    "transformers",
    "peft",
    "accelerate",
    "datasets",
    "hydra_plugins",
    "submitit",
    "numba",
)
"""Top-level modules that only the extras bring."""
CORE = (
    "audio",
    "checkpoint",
    "convert",
    "errors",
    "extras",
    "files",
    "gaussian",
    "losses",
    "models",
    "progress",
    "seeds",
    "synthesis",
    "text",
)

BLOCK = f"""
import importlib.util
import sys
find_spec = importlib.util.find_spec
# Libraries that ask whether another is there, as transformers does for accelerate, must be told no.
importlib.util.find_spec = lambda name, package=None: None if name.split(".")[0] in {EXTRAS!r} else find_spec(name, package)
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ImportError("blocked: " + name)
sys.meta_path.insert(0, Block())
"""


def modules(under: Sequence[str] = ("",)) -> list[str]:
    found = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        if under == ("",) or parts[0] in under:
            found.append(".".join(["kalle", *(part for part in parts if part != "__init__")]))
    return [name for name in found if name != "kalle.__main__"]


def python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": "/nonexistent"}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=250, check=False)


def test_import_kalle_is_light() -> None:
    heavy = (*EXTRAS, "torch")
    result = python(f"import sys, kalle; print(sorted({{name.split('.')[0] for name in sys.modules}} & set({heavy!r})))")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_speaking_imports_neither_transformers_nor_a_compiler() -> None:
    # hibari-tts takes scipy.fft if it is there.
    heavy = ("transformers", "torch._dynamo", "torch.distributed.tensor", "sympy", "scipy.signal")
    code = f"import sys, kalle; kalle.Kalle.from_pretrained({str(ROOT / 'ckpt/kalle-nano')!r}).synthesize('Yes.', max_seconds=0.4)\n"
    result = python(code + f"print([name for name in {heavy!r} if name in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]", "a command that speaks takes seconds and 190 MB more to start"


def test_the_public_names_load_no_extra() -> None:
    result = python(f"{BLOCK}\nimport kalle\nprint([getattr(kalle, name).__name__ for name in kalle.__all__])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(kalle.__all__)


def test_core_modules_need_no_extra() -> None:
    # Numba and Triton compile what stands at the top of a module; these are imported where the two are there.
    names = sorted({*modules(CORE)} - {"kalle.models.flowvae.fused_activation", "kalle.models.flowvae.triton_activation"})
    assert len(names) > 30
    code = f"{BLOCK}\nimport importlib, traceback\n" + (
        "bad = []\n"
        f"for name in {names!r}:\n"
        "    try: importlib.import_module(name)\n"
        "    except Exception as error: bad.append((name, repr(error)))\n"
        "print(bad)"
    )
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_the_commands_of_the_core_need_no_extra() -> None:
    names = ("say", "stream", "voices", "web", "bench", "calibrate", "download", "doctor", "convert")
    code = f"{BLOCK}\nimport sys\nfrom kalle.cli.main import main\nsys.exit(max(main([name, '--help']) for name in {names}))"
    result = python(code)
    assert result.returncode == 0, result.stderr
    assert "--voice" in result.stdout or "Options" in result.stdout


def test_every_module_imports() -> None:
    names = modules()
    assert len(names) > 80
    result = python(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert result.returncode == 0, result.stderr


def test_public_surface() -> None:
    assert kalle.__all__ == ["Adapter", "DiagGaussian", "FlowVAE", "Kalle", "KalleLM", "Voice", "adapt"]
    assert set(kalle.__all__) <= set(dir(kalle))
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        kalle.Nothing  # noqa: B018


def test_import_contracts_hold() -> None:
    linter = shutil.which("lint-imports", path=str(Path(sys.executable).parent))
    assert linter is not None, "import-linter is part of the dev extra"
    result = subprocess.run(
        [linter, "--no-cache"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": "src", "PATH": "/usr/bin:/bin"},
        timeout=250,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken" in result.stdout
