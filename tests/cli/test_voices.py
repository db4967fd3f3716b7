from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from kalle.audio import read_audio, write_audio
from kalle.checkpoint import read_json, write_json
from kalle.cli.audio_output import PLAYERS, PipedPlayer, play_file
from kalle.cli.main import main
from kalle.cli.voices import similarity_lines
from kalle.errors import UserError
from kalle.evaluation.metrics import MetricError
from kalle.evaluation.similarity import CHECK_TEXTS, check_texts, prompt_audio, voice_similarity
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.voice import Voice


@pytest.fixture
def model(toy_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy weights behind links, with a voices folder of their own; random voices are short."""
    monkeypatch.setattr("kalle.synthesis.voicing.RANDOM_VOICE_SECONDS", 0.2)
    folder = tmp_path / "model"
    for path in toy_weights.rglob("*"):
        if path.is_file():
            link = folder / path.relative_to(toy_weights)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path)
    return folder


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    write_audio(tmp_path / "anna.wav", 0.1 * np.sin(np.arange(40000) / 9.0), 16000)
    return tmp_path / "anna.wav"


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Puts shell scripts in the path, and nothing else."""

    def put(**scripts: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        for name, script in scripts.items():
            (folder / name).write_text(f"#!/bin/sh\n{script}\n")
            (folder / name).chmod(stat.S_IRWXU)
        monkeypatch.setenv("PATH", str(folder))

    return put


def voices(model: Path, command: str, *arguments: object) -> int:
    return main(["voices", command, *map(str, arguments), "--model", str(model)])


def test_create_store_list_show(model: Path, recording: Path, capsys) -> None:
    notes = ("--licence", "CC0", "--consent", "mine", "--language", "en", "--description", "a tone")
    assert voices(model, "create", "--audio", recording, "--text", "A tone of two seconds.", *notes) == 0
    voice = Voice.load(model / "voices" / "anna.safetensors")
    assert (voice.name, voice.licence, voice.consent, voice.language, voice.description) == ("anna", "CC0", "mine", "en", "a tone")
    assert voice.seconds == 2.5
    write_json(model.parent / "config.json", read_json(model / "config.json") | {"voice": "anna"})
    (model / "config.json").unlink()
    (model.parent / "config.json").rename(model / "config.json")
    (model / "voices" / "bad.safetensors").write_bytes(b"no")
    capsys.readouterr()
    assert voices(model, "list") == 0
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if "anna" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["anna (default)", "en", "prompt", "recording", "2.5", "yes", "CC0"]
    assert "damaged: not a voice file" in printed
    assert voices(model, "show", "anna") == 0
    shown = capsys.readouterr().out
    assert f"fits {model}: yes" in shown
    assert "consent: mine" in shown
    assert f"bound to flowvae_encoder: {voice.bound_to['flowvae_encoder']}" in shown


def test_a_voice_is_never_overwritten_silently(model: Path, recording: Path, capsys) -> None:
    assert voices(model, "random", "--seed", 3, "--name", "x") == 0
    before = (model / "voices" / "x.safetensors").read_bytes()
    for arguments in (("random", "--seed", 4, "--name", "x"), ("create", "--audio", recording, "--text", "one", "--name", "x")):
        assert voices(model, *arguments) == 2
        assert "exists: expected a new one; choose another --name or --out, or overwrite it with --force" in capsys.readouterr().err
        assert (model / "voices" / "x.safetensors").read_bytes() == before
    assert voices(model, "random", "--seed", 4, "--name", "x", "--force") == 0
    assert (model / "voices" / "x.safetensors").read_bytes() != before


@pytest.mark.parametrize("name", ["Zo\u00eb", "Zoe\u0308"])
def test_no_second_voice_has_a_name_with_its_accents_written_otherwise(model: Path, capsys, name: str) -> None:
    assert voices(model, "random", "--seed", 3, "--name", "x") == 0
    there = (model / "voices" / "x.safetensors").rename(model / "voices" / "Zoe\u0308.safetensors")
    assert voices(model, "random", "--seed", 4, "--name", name) == 2
    assert "exists: expected a new one" in capsys.readouterr().err
    assert voices(model, "random", "--seed", 4, "--name", name, "--force") == 0
    assert Voice.load(there).seed == 4
    assert list(there.parent.iterdir()) == [there]


@pytest.mark.parametrize("links", [True, False])
def test_a_voice_made_meanwhile_is_not_overwritten(model: Path, capsys, monkeypatch, links: bool) -> None:
    def without_links(*arguments: object) -> None:
        raise OSError(95, "Operation not supported")

    path, make = model / "voices" / "dup.safetensors", Kalle.random_voice

    def meanwhile(self: Kalle, seed: int) -> Voice:
        path.parent.mkdir()
        path.write_bytes(b"another run's")
        return make(self, seed)

    if not links:
        monkeypatch.setattr("kalle.cli.voices.os.link", without_links)
    with monkeypatch.context() as patched:
        patched.setattr(Kalle, "random_voice", meanwhile)
        assert voices(model, "random", "--seed", 3, "--name", "dup") == 2
    assert "exists: expected a new one" in capsys.readouterr().err
    assert path.read_bytes() == b"another run's"
    assert [file.name for file in path.parent.iterdir()] == ["dup.safetensors"]
    assert voices(model, "random", "--seed", 3, "--name", "other") == 0
    assert voices(model, "random", "--seed", 3, "--name", "dup", "--force") == 0
    assert Voice.load(path).seed == Voice.load(path.with_stem("other")).seed == 3
    assert len(list(path.parent.iterdir())) == 2


def test_a_random_voice_is_kalles(model: Path, tmp_path: Path) -> None:
    assert voices(model, "random", "--seed", 3) == 0
    assert voices(model, "random", "--seed", 3, "--out", tmp_path / "deep" / "v.safetensors") == 0
    kept = Voice.load(model / "voices" / "random-3.safetensors")
    np.testing.assert_array_equal(kept.prompt_latents, Kalle.from_pretrained(model, "cpu").random_voice(3).prompt_latents)
    np.testing.assert_array_equal(kept.prompt_latents, Voice.load(tmp_path / "deep" / "v.safetensors").prompt_latents)
    assert (kept.source, kept.seed, kept.name) == ("random", 3, "random-3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["create", "--audio", "none.wav", "--text", "x"], "audio file not found: got 'none.wav'"),
        (["create", "--audio", "ANNA"], r"a prompt without its transcript.*\(--text\)"),
        (["create", "--audio", "ANNA", "--text", "x", "--language", "xx9"], "unknown language: got 'xx9'"),
        (["random", "--seed", "1", "--name", ""], "bad voice name: got ''"),
        (["random", "--seed", "1", "--name", "", "--out", "x.safetensors"], "bad voice name: got ''"),
        (["create", "--audio", "ANNA", "--text", "x", "--name", "../x"], "bad voice name"),
        (["create", "--audio", "ANNA", "--text", "x", "--out", "x.wav"], "got the suffix '.wav', expected .safetensors"),
        (["random", "--seed", "-1"], "bad voice name|bad seed"),
        (["show", "nobody"], "voice file not found: got 'nobody'"),
        (["play", "nobody"], "voice file not found: got 'nobody'"),
        (["play", "ANNA"], "not a voice file"),
        (["check", "--texts", "21"], "bad number of texts: got 21, expected 2 to 20"),
    ],
)
def test_mistakes(model: Path, recording: Path, capsys, arguments: list[str], message: str) -> None:
    import re

    assert voices(model, *[str(recording) if word == "ANNA" else word for word in arguments]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert re.search(message, line)
    assert not (model / "voices").exists()


def test_without_weights(tmp_path: Path, model: Path, capsys) -> None:
    assert voices(tmp_path / "none", "list") == 2
    assert "not a weight folder: there is no folder" in capsys.readouterr().err
    assert voices(model, "random", "--seed", 1) == 0
    capsys.readouterr()
    assert main(["voices", "show", str(model / "voices" / "random-1.safetensors"), "--model", str(tmp_path / "none")]) == 0
    assert "fits: not known (not a weight folder" in capsys.readouterr().out
    assert main(["voices", "list", str(model / "voices" / "random-1.safetensors"), "--model", str(tmp_path / "none")]) == 0
    assert "│ not known │" in capsys.readouterr().out


def test_play_speaks_and_plays(model: Path, tmp_path: Path, capsys, programs) -> None:
    assert voices(model, "random", "--seed", 1) == 0
    programs(aplay='[ "$1" = -q ] && [ -s "$2" ] || exit 3')
    arguments = ("random-1", "--text", "Hi.", "-o", tmp_path / "a.wav")
    assert voices(model, "play", *arguments) == 0
    printed = capsys.readouterr().out
    assert "played with aplay" in printed
    assert len(read_audio(tmp_path / "a.wav"))
    programs(aplay="echo no device >&2; exit 1")
    assert voices(model, "play", *arguments) == 0
    assert f"could not play it (aplay: no device); the audio is in {tmp_path / 'a.wav'}" in capsys.readouterr().out


def test_players(tmp_path: Path, programs) -> None:
    (tmp_path / "a.wav").touch()
    programs()
    assert play_file(tmp_path / "a.wav") == ("no player found (looked for paplay, aplay, afplay, ffplay, play)", False)
    with pytest.raises(UserError, match="no player to hear the stream with"):
        PipedPlayer(16000)
    programs(ffplay="echo audio open failed >&2", play="exit 0")
    assert play_file(tmp_path / "a.wav") == ("played with play", True)
    assert {player.name for player in PLAYERS if player.pipe is None} == {"afplay"}


def test_a_piped_player_gets_every_sample(tmp_path: Path, programs) -> None:
    programs(aplay=f"/bin/cat > {tmp_path / 'heard'}")
    player = PipedPlayer(16000)
    for piece in (np.arange(5), np.arange(5, 9)):
        player.write(piece.astype(np.int16))
    player.close()
    assert player.failure is None
    np.testing.assert_array_equal(np.fromfile(tmp_path / "heard", dtype="<i2"), np.arange(9))
    programs(aplay="echo no device >&2; exit 1")
    broken = PipedPlayer(16000)
    for _ in range(200):
        broken.write(np.zeros(10000, dtype=np.int16))
    broken.close()
    assert "no device" in broken.failure


class Loudness:
    """Stands for an embedder: what it says of audio is known beforehand."""

    def __call__(self, audio: np.ndarray) -> np.ndarray:
        if len(audio) < 100:
            raise MetricError("short")
        return np.array([np.sqrt(np.mean(audio**2)) + 1e-9, np.abs(np.diff(audio)).mean()], dtype=np.float32)

    def describe(self) -> dict[str, object]:
        return {"model": "loudness"}


def test_similarity_is_the_mean_cosine_of_pairs(model: Path) -> None:
    kalle = Kalle.from_pretrained(model, "cpu")
    voice, other = kalle.random_voice(1), kalle.random_voice(2)
    result = voice_similarity(kalle, voice, Loudness(), texts=("One.", "Two.", "Three."), others={"b": other}, seed=5, progress=False)

    def embeddings(spoken: Voice) -> np.ndarray:
        rows = [
            Loudness()(kalle.synthesize(text, spoken, seed=5 + index).audio).astype(float)
            for index, text in enumerate(("One.", "Two.", "Three."))
        ]
        return np.stack([row / np.linalg.norm(row) for row in rows])

    mine, theirs, prompt = embeddings(voice), embeddings(other), Loudness()(prompt_audio(kalle, voice)).astype(float)
    pairs = [mine[0] @ mine[1], mine[0] @ mine[2], mine[1] @ mine[2]]
    assert result.among == pytest.approx(np.mean(pairs), abs=1e-6)
    assert result.among_lowest == pytest.approx(min(pairs), abs=1e-6)
    assert result.to_prompt == pytest.approx((mine @ prompt / np.linalg.norm(prompt)).mean(), abs=1e-6)
    assert result.to_others["b"] == pytest.approx((mine @ theirs.T).mean(), abs=1e-6)
    assert (result.texts, result.failed, sum(result.stop_reasons.values())) == (3, 0, 3)


def test_a_prompt_without_a_voice_is_told(model: Path) -> None:
    kalle = Kalle.from_pretrained(model, "cpu")
    voice = kalle.random_voice(1)
    prompt = len(prompt_audio(kalle, voice))

    class Deaf(Loudness):
        def __call__(self, audio: np.ndarray) -> np.ndarray:
            if len(audio) == prompt:
                raise MetricError("silence")
            return super().__call__(audio)

    result = voice_similarity(kalle, voice, Deaf(), texts=("One.", "Two, three."), progress=False)
    assert result.texts == 2
    assert np.isnan(result.to_prompt)
    assert "similarity to the voice's prompt: it gave no usable audio" in similarity_lines("a", result)


def test_check_prints_what_was_measured(model: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("kalle.evaluation.similarity.speaker_embedder", lambda name: Loudness())
    assert voices(model, "random", "--seed", 1) == 0
    assert voices(model, "check", "random-1", "--texts", 2, "--others", 1, "--device", "cpu") == 0
    printed = capsys.readouterr().out
    assert "texts: 2 spoken" in printed
    assert "similarity among them: 0." in printed or "similarity among them: 1." in printed
    assert "contrast, similarity to random voice 1: " in printed


def test_check_texts() -> None:
    for texts in CHECK_TEXTS.values():
        assert len(set(texts)) == 20
    assert check_texts(None, 3) == CHECK_TEXTS["en"][:3]
    assert check_texts("zh", 20) == CHECK_TEXTS["zh"]
