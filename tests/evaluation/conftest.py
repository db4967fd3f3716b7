from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kalle.audio import Audio, write_audio
from kalle.evaluation.test_list import TestItem, read_test_list
from kalle.models.flowvae import EncoderConfig, FlowConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.synthesis.kalle import Kalle
from kalle.text.tokenizer import Tokenizer

RATE_HZ = 16000
TEXTS = ("please leave a message now", "the number you have dialled", "thank you for calling us today")


def speechlike(seconds: float = 2.0, seed: int = 0) -> Audio:
    """Harmonics under a syllable-like envelope, with a pause: enough for PESQ and STOI to find speech."""
    generator = np.random.default_rng(seed)
    t = np.arange(int(seconds * RATE_HZ)) / RATE_HZ
    pitch_hz = 110 + 40 * generator.random()
    voiced = sum(np.sin(2 * np.pi * pitch_hz * k * t + generator.random()) / k for k in range(1, 30))
    envelope = (0.5 + 0.5 * np.sin(2 * np.pi * 3 * t)) * (np.sin(2 * np.pi * 0.7 * t) > -0.6)
    return (0.1 * voiced * envelope + 1e-3 * generator.standard_normal(t.size)).astype(np.float32)


class EchoTranscriber:
    """Knows what each length of audio says; anything else it hears as nothing."""

    def __init__(self) -> None:
        self.known: dict[int, str] = {}

    def __call__(self, audio: Audio, language: str) -> str:
        return self.known.get(len(audio), "")

    def describe(self) -> dict[str, object]:
        return {"model": "echo"}


@pytest.fixture
def speech() -> Callable[..., Audio]:
    return speechlike


@pytest.fixture
def transcriber() -> EchoTranscriber:
    return EchoTranscriber()


@pytest.fixture
def test_list(tmp_path: Path, transcriber: EchoTranscriber) -> Path:
    """Three recordings of one speaker, of different lengths, whose texts the transcriber knows; a JSONL list."""
    rows = []
    for index, text in enumerate(TEXTS):
        audio = speechlike(1.6 + 0.4 * index, index)
        transcriber.known[len(audio)] = text
        write_audio(tmp_path / "corpus" / f"{index}.wav", audio, RATE_HZ)
        rows.append({"id": f"a/{index}", "text": text, "audio": f"{index}.wav", "speaker": "one"})
    path = tmp_path / "corpus" / "list.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def items(test_list: Path) -> list[TestItem]:
    return read_test_list(test_list).items


@pytest.fixture(scope="session")
def flowvae() -> FlowVAE:
    torch.manual_seed(0)
    encoder = EncoderConfig(channels=(4, 4, 4, 8, 8, 8, 8), residual_layers=2)
    flow = FlowConfig(hidden_channels=8, couplings=2, wavenet_layers=1)
    return FlowVAE(FlowVAEConfig(latent_dim=8, encoder=encoder, flow=flow, decoder=ISTFTConfig(channels=16, blocks=1))).eval()


@pytest.fixture(scope="session")
def kalle(flowvae: FlowVAE) -> Kalle:
    torch.manual_seed(0)
    tokenizer = Tokenizer.bytes()
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    backbone = {**size, "head_dim": 16, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": 2048}
    return Kalle(flowvae, KalleLM(KalleLMConfig(backbone=backbone, latent_dim=8)).eval(), tokenizer)


@pytest.fixture
def funasr_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A package funasr whose AutoModel holds small modules where the real one holds a model, its VAD and its punctuation."""
    site = tmp_path / "site"
    (site / "funasr").mkdir(parents=True)
    (site / "funasr" / "__init__.py").write_text(
        "import torch\n"
        "class AutoModel:\n"
        "    def __init__(self, model, vad_model=None, punc_model=None, **options):\n"
        "        def made(name):\n"
        "            torch.manual_seed(len(name))\n"
        "            return torch.nn.Linear(2, 2)\n"
        "        self.model, self.vad_model, self.punc_model = (\n"
        "            None if name is None else made(name) for name in (model, vad_model, punc_model)\n"
        "        )\n"
    )
    (site / "funasr-9.9.dist-info").mkdir()
    (site / "funasr-9.9.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: funasr\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "funasr", raising=False)
    yield
    sys.modules.pop("funasr", None)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.skip("there is no Chromium on the path")
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    with api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=[*flags, "--disable-sync"])
        yield opened
        opened.close()
