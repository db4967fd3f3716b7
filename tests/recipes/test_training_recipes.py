"""The training recipes from end to end, on more than ten minutes of real speech laid out as the corpora they are for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

from kalle.audio import load_channels
from kalle.files import read_jsonl

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "recipes/quickstart/corpus"
MINUTES = 11.0
QUICK = ["device=cpu", "threads=1", "logger=csv", "trainer.val_check_interval=1000", "callbacks.media=null"]


@dataclass(frozen=True)
class Utterance:
    audio: Path
    text: str
    seconds: float


def speech(minutes: float) -> Iterator[Utterance]:
    """Recorded prompts from 1 to 20 s until there are ``minutes`` of them."""
    total = 0.0
    for row in read_jsonl(CORPUS / "transcripts.jsonl"):
        path = CORPUS / row["audio"]
        seconds = soundfile.info(path).duration
        if 1 <= seconds <= 20:
            total += seconds
            yield Utterance(path, row["text"], seconds)
        if total >= 60 * minutes:
            return
    raise AssertionError(f"only {total:.0f} s of speech")


def part_of(number: int) -> str:
    """Every twelfth utterance is held out for validation, another for tests."""
    return {0: "dev-clean", 1: "test-clean"}.get(number % 12, "train-clean-100")


@pytest.fixture(scope="module")
def libritts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora") / "LibriTTS_R"
    for number, one in enumerate(speech(MINUTES)):
        part = part_of(number)
        speaker = {"dev-clean": "84", "test-clean": "61", "train-clean-100": "14"}[part]
        folder = root / part / speaker / "1"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{speaker}_1_{number:06d}_000000"
        samples, rate_hz = load_channels(one.audio)
        soundfile.write(folder / f"{name}.wav", samples[0], rate_hz)
        (folder / f"{name}.normalized.txt").write_text(one.text, encoding="utf-8")
        (folder / f"{name}.original.txt").write_text(one.text, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def emilia(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("corpora") / "Emilia"
    folder = root / "EN" / "EN_B00000" / "EN_B00000_S00000" / "mp3"
    folder.mkdir(parents=True)
    for number, one in enumerate(speech(MINUTES)):
        name = f"EN_B00000_S{number % 3:05d}_W{number:06d}"
        samples, rate_hz = load_channels(one.audio)
        soundfile.write(folder / f"{name}.mp3", samples[0], rate_hz)
        facts = {"id": name, "wav": f"{name}.mp3", "text": one.text, "duration": one.seconds, "language": "en", "dnsmos": 3.4}
        (folder / f"{name}.json").write_text(json.dumps({**facts, "speaker": name[:16]}), encoding="utf-8")
    return root


def recipe(name: str, *words: str, **environment: str) -> str:
    """Run recipes/NAME/run.sh as a user would, in miniature; returns what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    settings = {"SCALE": "nano", "ITEMS": "2", "SCORE": "~metrics.wer ~metrics.sim ~metrics.pesq_nb", "JOBS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(ROOT / "recipes" / name / "run.sh"), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PATH": path, **settings, **environment},
        timeout=1500,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(libritts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What recipes/libritts leaves."""
    out = tmp_path_factory.mktemp("recipes") / "libritts"
    recipe("libritts", str(libritts), str(out), *QUICK, FLOWVAE_STEPS="15", LM_STEPS="15")
    return out


def minutes_of(corpus: Path) -> float:
    return 60 * float(json.loads((corpus / "report.json").read_text())["hours"])


def spoken_items(folder: Path) -> int:
    return sum(json.loads(line)["system"] == "synthesis" for line in (folder / "items.jsonl").read_text().splitlines())


def test_libritts(trained: Path) -> None:
    assert minutes_of(trained / "corpus") > 10
    for name in (
        "doctor/report.md",
        "flowvae/weights/flowvae/model.safetensors",
        "lm/weights/lm/model.safetensors",
        "reconstruction/report.md",
    ):
        assert (trained / name).stat().st_size > 0, name
    assert spoken_items(trained / "synthesis") == 2


def test_libritts_again_does_nothing_anew(trained: Path, libritts: Path) -> None:
    weights = trained / "lm/weights/lm/model.safetensors"
    before = weights.read_bytes()
    said = recipe("libritts", str(libritts), str(trained), *QUICK, FLOWVAE_STEPS="15", LM_STEPS="15")
    assert "unchanged" in said
    assert weights.read_bytes() == before


def test_emilia(trained: Path, emilia: Path, tmp_path: Path) -> None:
    out = tmp_path / "emilia"
    recipe("emilia", str(trained / "flowvae/weights"), str(emilia), str(out), *QUICK, LM_STEPS="15")
    assert minutes_of(out / "corpus") > 10
    config = json.loads((out / "lm/weights/lm/config.json").read_text())
    assert config["speaker"] is not None
    assert 1 <= spoken_items(out / "synthesis") <= 2, "an item is left out whose speaker has no other recording in the split"


@pytest.mark.parametrize("tuning", ["all", "lora"])
def test_finetune_mixes_and_speaks(tuning: str, trained: Path, tmp_path: Path) -> None:
    weights, out = trained / "lm/weights", tmp_path / tuning
    options = {"STEPS": "6", "BASE": str(trained / "latents"), **({"LORA": "4"} if tuning == "lora" else {})}
    said = recipe("finetune_release", str(weights), str(trained / "corpus"), str(out), *QUICK, "data.max_positions=2000", **options)
    assert "an epoch takes" in said
    assert (out / "lm/weights/adapter/adapter.safetensors").is_file() == (tuning == "lora")
    assert spoken_items(out / "before") == spoken_items(out / "after") == 2
