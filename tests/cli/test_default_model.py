"""What speaks, and whereto, when nobody says which model, which voice or which file."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from kalle import checkpoint
from kalle.audio import read_audio
from kalle.checkpoint import read_json, write_json
from kalle.cli.main import main
from kalle.cli.say import free_output
from kalle.errors import UserError
from kalle.models.flowvae import FlowVAE
from kalle.models.lm import KalleLM
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions, SpeechRequest
from kalle.synthesis.voice import kept_voices, voice_path
from kalle.synthesis.weights import FolderConfig
from kalle.text.tokenizer import Tokenizer

SHORT = ("--device", "cpu", "--max-seconds", "0.3", "--retries", "0")


@pytest.fixture
def shipped(toy_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that ships, with the default voice anna and in German; the current folder is empty."""
    monkeypatch.setattr("kalle.synthesis.voicing.RANDOM_VOICE_SECONDS", 0.2)
    folder, here = tmp_path / "package" / "kalle-nano", tmp_path / "here"
    shutil.copytree(toy_weights, folder)
    Kalle.from_pretrained(folder, "cpu").random_voice(5).save(folder / "voices" / "anna.safetensors")
    write_json(folder / "config.json", read_json(folder / "config.json") | {"voice": "anna", "language": "de"})
    monkeypatch.setattr(checkpoint, "shipped_folder", lambda: folder)
    here.mkdir()
    monkeypatch.chdir(here)
    return folder


def test_the_first_command_speaks(shipped: Path, capsys) -> None:
    assert main(["say", "Hello.", "--seed", "1", *SHORT]) == 0
    told = capsys.readouterr()
    (line,) = [line for line in told.err.splitlines() if line.startswith("model: kalle-nano")]
    assert "`kalle download`" in line
    assert "wrote speech.wav" in told.out
    first = Path("speech.wav").read_bytes()
    assert main(["say", "Hello.", "--seed", "1", "--voice", "anna", *SHORT]) == 0
    assert "wrote speech-2.wav" in capsys.readouterr().out
    assert Path("speech.wav").read_bytes() == first == Path("speech-2.wav").read_bytes()


def test_a_made_up_voice_in_spite_of_the_default(shipped: Path, capsys) -> None:
    for words in (["-o", "own.wav"], ["-o", "random.wav", "--voice", "random"], ["-o", "long.wav", "--voice", "random", "--srt"]):
        assert main(["say", "Hello.", "--seed", "1", *SHORT, *words]) == 0
    assert main(["stream", "Hello.", "--seed", "1", *SHORT[:4], "--voice", "random", "-o", "stream.wav"]) == 0
    audio = {name: read_audio(Path(f"{name}.wav"), 16000) for name in ("own", "random", "stream")}
    assert not np.array_equal(audio["own"], audio["random"])
    assert np.allclose(audio["random"], audio["stream"], atol=2e-3)
    kalle = Kalle.from_pretrained("kalle-nano", "cpu")
    assert kalle.folder == shipped
    asked = {"seed": 1, "max_seconds": 0.3, "retries": 0}
    one, other = kalle.synthesize("Hello.", "random", **asked), kalle.synthesize("Hello.", kalle.random_voice(1), **asked)
    assert np.array_equal(one.audio, other.audio)
    (batched,) = kalle.synthesize_batch([SpeechRequest("Hello.", "random", **asked)])
    assert np.allclose(batched.audio, one.audio, atol=1e-4)


def test_without_an_argument_the_library_takes_the_model_that_ships(shipped: Path) -> None:
    assert Kalle.from_pretrained(device="cpu").folder == shipped


def test_the_language_of_the_folder_is_taken(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    words = FolderConfig.words
    monkeypatch.setattr(FolderConfig, "words", lambda self, *given: seen.append(self.language_of(*given)) or words(self, *given))
    for flags in ([], ["--language", "en"]):
        assert main(["say", "Hello.", *SHORT, *flags]) == 0
    assert sorted(set(seen)) == ["de", "en"]


def test_released_weights_come_first(shipped: Path, toy_weights: Path, capsys) -> None:
    shutil.copytree(toy_weights, Path("ckpt") / "kalle-release")
    assert main(["voices", "list"]) == 0
    told = capsys.readouterr()
    assert "no voices in 'ckpt/kalle-release'" in told.out
    assert told.err == ""
    assert main(["voices", "list", "--model", "kalle-nano"]) == 0
    assert "anna (default)" in capsys.readouterr().out


def test_without_any_weights(shipped: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(checkpoint, "shipped_folder", lambda: None)
    for words in (["say", "Hello."], ["say", "Hello.", "--model", "kalle-nano"], ["voices", "list"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: no weights: this installation lacks kalle-nano")
        assert "`kalle download`" in error


def test_the_shipped_folder_is_in_the_package_or_the_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tmp_path / "src" / "kalle" / "checkpoint.py"
    monkeypatch.setattr(checkpoint, "__file__", str(module))
    assert checkpoint.shipped_folder() is None
    for root in (tmp_path, tmp_path / "src" / "kalle"):
        write_json(root / "ckpt" / "kalle-nano" / "config.json", {})
        assert checkpoint.shipped_folder() == root / "ckpt" / "kalle-nano"


def test_a_file_of_ones_own_is_never_taken(tmp_path: Path) -> None:
    assert free_output(False, tmp_path) == tmp_path / "speech.wav"
    (tmp_path / "speech.wav").touch()
    (tmp_path / "speech-2.wav").touch()
    (tmp_path / "speech-2.wav.parts").mkdir()
    (tmp_path / "speech-3.wav.parts").mkdir()
    assert free_output(True, tmp_path) == tmp_path / "speech-3.wav", "an interrupted run continues; no file is overwritten"
    assert free_output(False, tmp_path) == tmp_path / "speech-4.wav", "and a short text does not take its place"


def test_no_stored_voice_is_called_random(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="bad voice name: got 'random'"):
        voice_path(tmp_path, "random")


def test_the_weights_language_is_for_texts_in_its_script() -> None:
    italian, asked = FolderConfig(language="it"), GenerationOptions(language="en")
    assert italian.language_of("Buongiorno.", GenerationOptions()) == "it"
    assert italian.language_of("Доброе утро.", GenerationOptions()) is None, "left to be guessed"
    assert italian.language_of("Buongiorno.", asked) == "en"
    assert FolderConfig().language_of("Good morning.", GenerationOptions()) is None


def test_nothing_is_written_into_the_installed_package(shipped: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    module = shipped.parent / "checkpoint.py"
    monkeypatch.setattr(checkpoint, "__file__", str(module))
    before = sorted(shipped.rglob("*"))
    assert main(["voices", "random", "--seed", "5", "--name", "clara", "--device", "cpu"]) == 0
    assert Path("clara.safetensors").is_file()
    assert kept_voices(shipped) == Path("voices"), "those of the page, too"
    Path("voices").mkdir()
    Path("clara.safetensors").rename("voices/clara.safetensors")
    assert main(["calibrate", "kalle-nano", "--latents", str(tmp_path)]) == 2
    assert "is part of the installed package" in capsys.readouterr().err
    assert sorted(shipped.rglob("*")) == before
    assert main(["say", "Hello.", "--voice", "clara", "-o", str(tmp_path / "c.wav"), *SHORT]) == 0


def test_the_name_of_the_model_that_ships_is_a_weight_folder_everywhere(shipped: Path) -> None:
    assert checkpoint.part_folder("kalle-nano", "lm") == checkpoint.part_folder("kalle-nano/lm", "lm") == shipped / "lm"
    assert FlowVAE.from_pretrained("kalle-nano").config.latent_dim == KalleLM.from_pretrained("kalle-nano").config.latent_dim
    assert Tokenizer.load("kalle-nano/tokenizer").vocab_size == Kalle.from_pretrained("kalle-nano", "cpu").tokenizer.vocab_size
    assert checkpoint.weight_folder("other") == Path("other")
    shutil.copytree(shipped, "kalle-nano")
    assert checkpoint.part_folder("kalle-nano", "lm") == Path("kalle-nano/lm"), "a folder here comes first"
