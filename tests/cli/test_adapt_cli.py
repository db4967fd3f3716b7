"""`kalle adapt`, and what speaks with its files."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from kalle.audio import read_audio, write_audio
from kalle.cli.main import main
from kalle.errors import UserError
from kalle.synthesis.adapter import Adapter
from kalle.synthesis.voice import Voice

RATE_HZ = 16000
QUICK = ("--steps", "3", "--lr", "0.01", "--device", "cpu")


@pytest.fixture
def model(toy_weights: Path, tmp_path: Path) -> Path:
    return shutil.copytree(toy_weights, tmp_path / "weights")


@pytest.fixture
def reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recording; the files of the command go beside it."""
    monkeypatch.chdir(tmp_path)
    time = np.arange(RATE_HZ // 2) / RATE_HZ
    for name, low in (("ref", 150), ("other", 260)):
        write_audio(tmp_path / f"{name}.wav", 0.3 * np.sin(2 * np.pi * (low + 900 * time) * time), RATE_HZ)
    return tmp_path / "ref.wav"


def run(model: Path, *arguments: object) -> int:
    return main(["adapt", *map(str, arguments), "--model", str(model)])


class Loudness:
    """Stands for a speaker embedder."""

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        return np.array([np.abs(audio).mean() + 1e-9, np.abs(np.diff(audio)).mean()], dtype=np.float32)

    def describe(self) -> dict[str, object]:
        return {"model": "loudness"}


@pytest.mark.parametrize("flag", ["-o", "--voice", "--report"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_learnt(
    model: Path, reference: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flag: str
) -> None:
    monkeypatch.setattr("kalle.cli.adapt.load_model", lambda *_: pytest.fail("went on to work"))
    assert run(model, reference, "--text", "one two", *QUICK, flag, "ref.wav/x.safetensors") == 2
    assert "choose another path" in capsys.readouterr().err


def test_learn_speak_and_show(model: Path, reference: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("kalle.evaluation.similarity.speaker_embedder", lambda name: Loudness())
    held_out = ("--validate", "other.wav", "--validate-text", "four", "--sim-texts", "1", "--report", "r.json")
    assert run(model, reference, "--text", "one two", *QUICK, "--voice", "v.safetensors", "-o", "a.safetensors", *held_out) == 0
    out, err = capsys.readouterr()
    assert re.search(r"3 of 3 steps in [\d.]+ s, peak learning rate 0.01", out)
    for name in ("KL of the recording", "KL of another recording", "similarity of 1 texts to the recording", "similarity to another"):
        assert re.search(rf"{name}.*: -?\d+\.\d+ before, -?\d+\.\d+ after", out), name
    assert "step 3/3, loss" in err
    report = json.loads(Path("r.json").read_text())
    assert report["kl"]["after"] < report["kl"]["before"]
    assert len(report["losses"]) == 3
    assert report["similarity"]["before"] <= 1
    assert Adapter.load("a.safetensors").digest == Voice.load("v.safetensors").adapter.digest

    say = ["say", "four", "--model", str(model), "--seed", "1", "--max-seconds", "0.2", "--device", "cpu"]
    prompt = ["--prompt-audio", "ref.wav", "--prompt-text", "one two"]
    assert main([*say, "-o", "voice.wav", "--voice", "v.safetensors"]) == 0
    assert main([*say, "-o", "adapter.wav", *prompt, "--adapter", "a.safetensors"]) == 0
    assert main([*say, "-o", "plain.wav", *prompt]) == 0
    assert main([*say, "-o", "drawn.wav", "--adapter", "a.safetensors"]) == 0
    voice, adapter, plain = (read_audio(Path(f"{name}.wav")) for name in ("voice", "adapter", "plain"))
    np.testing.assert_array_equal(voice, adapter)
    assert not np.array_equal(voice, plain)
    capsys.readouterr()
    assert main(["voices", "show", "v.safetensors", "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "adapter: low rank 8, 3 steps" in shown
    assert "kind: prompt + adapter" in shown
    assert f"fits {model}: yes" in shown
    assert re.search(r"KL of the recording: \d+\.\d+ before, \d+\.\d+ with the adapter", shown)


def test_defaults_and_modes(model: Path, reference: Path, capsys) -> None:
    assert run(model, reference, "--text", "one", *QUICK, "--sim-texts", 0) == 0
    assert Adapter.load("ref.adapter.safetensors").rank == 8
    assert run(model, reference, "--text", "one", *QUICK, "--sim-texts", 0, "--full", "--force") == 0
    assert Adapter.load("ref.adapter.safetensors").kind == "full"
    assert "storing the change in fp16 lost" in capsys.readouterr().out
    assert (
        run(model, reference, "other.wav", "--text", "one", "--text", "two", *QUICK, "--lora", 2, "--sim-texts", 0, "-o", "b.safetensors")
        == 0
    )
    assert Adapter.load("b.safetensors").notes["texts"] == ["one", "two"]
    assert run(model, reference, "--text", "one", *QUICK, "--voice", "only.safetensors", "--seconds", "1e-6", "--sim-texts", 0) == 0
    assert "1 of 3 steps" in capsys.readouterr().out


def test_similarity_is_left_out_where_nothing_measures_it(model: Path, reference: Path, capsys, monkeypatch) -> None:
    def missing(name: str) -> None:
        raise UserError("it needs Resemblyzer")

    monkeypatch.setattr("kalle.evaluation.similarity.speaker_embedder", missing)
    assert run(model, reference, "--text", "one", *QUICK) == 0
    out, err = capsys.readouterr()
    assert "no speaker similarity: it needs Resemblyzer" in err
    assert "similarity" not in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.wav", "--text", "x"], "audio file not found: got 'none.wav'"),
        (["ref.wav", "other.wav", "--text", "x"], "recordings and transcripts don't pair: got 2 and 1"),
        (["ref.wav", "--text", "x", "--full", "--lora", "4"], "two ways to learn: got --full and --lora 4"),
        (["ref.wav", "--text", "x", "--steps", "0"], "bad --steps: got 0"),
        (["ref.wav", "--text", "x", "--lora", "0"], "bad --lora: got 0"),
        (["ref.wav", "--text", "x", "--seconds", "0"], "bad --seconds: got 0.0"),
        (["ref.wav", "--text", "x", "--validate", "other.wav"], "--validate and --validate-text don't pair: got 1 and 0"),
        (["ref.wav", "--text", "x", "-o", "a.pt"], "got the suffix '.pt', expected .safetensors"),
        (["ref.wav", "--text", "x", "-o", "there.safetensors"], "'there.safetensors' exists"),
        (["ref.wav", "--text", " "], "the prompt text is empty"),
    ],
)
def test_mistakes(model: Path, reference: Path, capsys, arguments: list[str], message: str) -> None:
    Path("there.safetensors").touch()
    assert run(model, *arguments, "--sim-texts", 0, "--device", "cpu") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert message in line


def test_another_model_refuses(model: Path, reference: Path, tmp_path: Path, capsys) -> None:
    from kalle.models.lm import KalleLM

    both = ("--voice", "v.safetensors", "-o", "a.safetensors")
    assert run(model, reference, "--text", "one", *QUICK, "--sim-texts", 0, *both) == 0
    KalleLM(KalleLM.from_pretrained(model).config).save_pretrained(model)
    say = ["say", "four", "-o", "x.wav", "--model", str(model), "--device", "cpu"]
    for options in (["--voice", "v.safetensors"], ["--adapter", "a.safetensors"]):
        assert main([*say, *options]) == 2
        assert "the adapter does not fit: it was made for the language model" in capsys.readouterr().err
    assert main(["voices", "show", "v.safetensors", "--model", str(model)]) == 0
    assert f"fits {model}: no: the adapter does not fit" in capsys.readouterr().out
    assert main([*say, "--adapter", "v.safetensors"]) == 2
    assert "it is a voice: give it as the voice" in capsys.readouterr().err
