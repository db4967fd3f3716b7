from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from kalle.audio import read_audio, write_audio
from kalle.checkpoint import write_json
from kalle.cli.main import main
from kalle.errors import UserError
from kalle.models.flowvae import EncoderConfig, FlowConfig, FlowVAE, FlowVAEConfig, ISTFTConfig
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.synthesis.kalle import Kalle
from kalle.text.tokenizer import Tokenizer

BACKBONE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 265,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = EncoderConfig(channels=(4, 4, 4, 4, 4, 8, 8))
        FlowVAE(
            FlowVAEConfig(latent_dim=4, encoder=encoder, flow=FlowConfig(8, 1, 3, 1), decoder=ISTFTConfig(channels=16, blocks=1))
        ).save_pretrained(folder)
        KalleLM(KalleLMConfig(backbone=BACKBONE, latent_dim=4)).save_pretrained(folder)
    Tokenizer.bytes().save(folder / "tokenizer")
    write_json(folder / "config.json", {"format_version": 1, "stop": {"threshold": 0.0}})
    return folder


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    write_audio(tmp_path / "prompt.wav", 0.1 * np.sin(np.arange(12000) / 9.0), 16000)
    return tmp_path / "prompt.wav"


def say(model: Path, *arguments: object) -> int:
    return main(["say", *map(str, arguments), "--model", str(model), "--device", "cpu"])


def test_a_sentence_becomes_a_file(model: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "out.wav"
    assert say(model, "Hello.", "-o", out, "--seed", 4, "--max-seconds", 0.8) == 0
    printed = capsys.readouterr().out
    assert len(read_audio(out)) == 12800
    assert str(out) in printed
    assert "0.80 s at 16000 Hz (10 frames)" in printed
    assert "seed: 4" in printed
    assert "stop reason: max_frames (cut at the length cap of 10 frames" in printed
    elapsed, audio, rtf = map(float, re.search(r"RTF = synthesis / audio = ([\d.]+) s / ([\d.]+) s = ([\d.]+)", printed).groups())
    assert rtf == pytest.approx(elapsed / audio, abs=0.01)
    expected = Kalle.from_pretrained(model, "cpu").synthesize("Hello.", seed=4, max_seconds=0.8)
    np.testing.assert_allclose(read_audio(out), expected.pcm16() / 32768, atol=1e-6)


def test_the_printed_seed_gives_the_file_again(model: Path, tmp_path: Path, capsys) -> None:
    assert say(model, "Hello.", "-o", tmp_path / "a.wav", "--max-seconds", 0.4) == 0
    seed = re.search(r"seed: (\d+)", capsys.readouterr().out)[1]
    assert say(model, "Hello.", "-o", tmp_path / "b.wav", "--max-seconds", 0.4, "--seed", seed) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_text_from_standard_input(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello.\n"))
    assert say(model, "-", "-o", tmp_path / "a.wav", "--max-seconds", 0.4, "--seed", 1) == 0
    assert say(model, "Hello.", "-o", tmp_path / "b.wav", "--max-seconds", 0.4, "--seed", 1) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()


def test_prompt_and_voice_file_speak_alike(model: Path, tmp_path: Path, recording: Path) -> None:
    common = ("--max-seconds", 0.4, "--seed", 1)
    assert say(model, "Hello.", "-o", tmp_path / "a.flac", "--prompt-audio", recording, "--prompt-text", "Tone.", *common) == 0
    Kalle.from_pretrained(model, "cpu").voice(recording, "Tone.").save(tmp_path / "tone.safetensors")
    assert say(model, "Hello.", "-o", tmp_path / "b.flac", "--voice", tmp_path / "tone.safetensors", *common) == 0
    assert say(model, "Hello.", "-o", tmp_path / "c.flac", *common) == 0
    assert (tmp_path / "a.flac").read_bytes() == (tmp_path / "b.flac").read_bytes() != (tmp_path / "c.flac").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["  "], "the text is empty"),
        (["Hi", "--prompt-audio", "PROMPT"], "a prompt without its transcript"),
        (["Hi", "--prompt-audio", "PROMPT", "--prompt-text", " "], "the prompt text is empty"),
        (["Hi", "--prompt-text", "Tone."], "a transcript without its recording"),
        (["Hi", "--prompt-audio", "none.wav", "--prompt-text", "Tone."], "audio file not found: got 'none.wav'"),
        (["Hi", "--prompt-audio", "TEXT", "--prompt-text", "Tone."], "unreadable audio"),
        (["Hi", "--voice", "none"], "voice file not found"),
        (["Hi", "--voice", "TEXT"], "not a voice file"),
        (["Hi", "--voice", "none", "--prompt-text", "Tone."], "two voices"),
        (["Hi", "--temperature", "-1"], "bad temperature: got -1.0"),
        (["Hi", "--temperature", "nan"], "bad temperature: got nan"),
        (["Hi", "--seed", "-1"], "bad seed: got -1"),
        (["Hi", "--max-seconds", "0"], "bad --max-seconds: got 0.0"),
        (["Hi", "--device", "abacus"], "unknown device: got 'abacus'"),
        (["word " * 400, "--at-once"], "leave out --at-once"),
        (["Hi", "--voice", "PROMPT"], "make a voice of a recording"),
        (["Hi", "--dtype", "int3"], "unknown dtype: got 'int3'"),
        (["Hi", "--model", "EMPTY"], "not a weight folder: no Flow-VAE (flowvae/) in 'empty'"),
        (["Hi", "--model", "none"], "no such weight folder: got 'none'"),
        (["Hi", "--model", "ckpt/kalle-release"], "`kalle download`"),
        (["Hi", "--seed", "x"], "--seed"),
        (["Hi", "-o", "out.m4a"], "expected .wav, .flac, .mp3, .opus or .ogg"),
        (["Hi", "-o", "-", "--play"], "two places to hear it"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(
    model: Path, tmp_path: Path, recording: Path, capsys, monkeypatch, arguments, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text").write_text("words")
    (tmp_path / "empty").mkdir()
    before = sorted(tmp_path.rglob("*"))
    places = {"PROMPT": str(recording), "TEXT": "text", "EMPTY": "empty"}
    given = [places.get(argument, argument) for argument in arguments]
    defaults = {"-o": "out.wav", "--model": str(model), "--device": "cpu"}
    given += [part for option, value in defaults.items() if option not in given for part in (option, value)]
    assert main(["say", *given]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_a_plot_that_fails_leaves_the_report(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise UserError("cannot write the plot: no room")

    monkeypatch.setattr("kalle.evaluation.figures.save_speech_figure", full)
    assert say(model, "Hi.", "-o", tmp_path / "a.wav", "--max-seconds", 0.4, "--plot", tmp_path / "a.png") == 2
    captured = capsys.readouterr()
    assert f"wrote {tmp_path / 'a.wav'}" in captured.out
    assert re.search(r"^seed: \d+$", captured.out, re.MULTILINE)
    assert "plot:" not in captured.out
    assert captured.err == "error: cannot write the plot: no room\n"


def test_options_without_effect_are_told(model: Path, tmp_path: Path, capsys) -> None:
    short = ("Hi.", "-o", tmp_path / "a.wav", "--max-seconds", 0.4, "--seed", 1)
    assert say(model, *short) == 0
    assert capsys.readouterr().err == ""
    assert say(model, *short, "--restart", "--keep-parts", "--rolling", "--pause", 5) == 0
    told = "warning: without effect on a text that is spoken in one request: --pause, --rolling, --restart, --keep-parts\n"
    assert capsys.readouterr().err == told
    assert say(model, *short, "--pause", 5, "--srt", "--retries", 0) == 0
    assert "without effect" not in capsys.readouterr().err


def test_ctrl_c_is_one_line(model: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Kalle, "synthesize", interrupted)
    capfd.readouterr()
    assert say(model, "Hi", "-o", tmp_path / "out.wav") == 130
    assert capfd.readouterr() == ("", "error: interrupted; run the same command again\n")
    assert list(tmp_path.iterdir()) == []


def test_a_speech_that_never_began_is_an_error(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    import kalle.synthesis.kalle as module
    from kalle.synthesis.options import StopRule

    original = module.read_weight_folder
    rule = StopRule(threshold=1e9, min_index=-1)
    monkeypatch.setattr(module, "read_weight_folder", lambda folder: type(original(folder))(stop=rule))
    assert say(model, "Hi", "-o", tmp_path / "out.wav") == 2
    assert "before its first frame" in capsys.readouterr().err
    assert not (tmp_path / "out.wav").exists()


def test_guidance_is_that_of_the_library_in_one_request_and_in_sentences(model: Path, tmp_path: Path, capsys) -> None:
    out, kalle = tmp_path / "out.wav", Kalle.from_pretrained(model, "cpu")
    assert say(model, "Hello.", "-o", out, "--seed", 4, "--max-seconds", 0.8, "--guidance", 2.5) == 0
    expected = kalle.synthesize("Hello.", seed=4, max_seconds=0.8, guidance=2.5)
    assert not np.array_equal(expected.audio, kalle.synthesize("Hello.", seed=4, max_seconds=0.8).audio)
    np.testing.assert_allclose(read_audio(out), expected.pcm16() / 32768, atol=1e-6)
    assert say(model, "Hello.", "-o", out, "--guidance", -1) == 2
    assert "bad guidance: got -1.0" in capsys.readouterr().err
    audio = []
    for guidance in (1.0, 2.5):
        assert say(model, "Hello.", "-o", out, "--seed", 4, "--max-seconds", 0.8, "--guidance", guidance, "--srt") == 0
        audio.append(read_audio(out))
    assert not np.array_equal(*audio)


def test_json_quiet_and_the_formats(model: Path, tmp_path: Path, capsys) -> None:
    common = ("--seed", 4, "--max-seconds", 0.8)
    assert say(model, "Hello.", "-o", tmp_path / "a.mp3", *common, "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert len(read_audio(tmp_path / "a.mp3")) == 12800
    assert say(model, "Hello.", "-o", tmp_path / "a.opus", *common, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["output"], facts["seed"], facts["frames"], facts["stop_reason"]) == (str(tmp_path / "a.opus"), 4, 10, "max_frames")
    assert facts["attempts"] == [{"seed": 4, "stop_reason": "max_frames", "frames": 10, "kept": True}]
    assert say(model, "One. Two three four five six.", "--by-sentences", "-o", tmp_path / "b.flac", *common, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert [sentence["text"] for sentence in facts["sentences"]] == ["One. Two three four five six."]
    assert (tmp_path / "b.flac").stat().st_size > 1000


def test_play_keeps_no_file_that_was_not_asked_for(model: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    player = tmp_path / "bin" / "aplay"
    player.parent.mkdir()
    player.write_text(f'#!/bin/sh\n/bin/cp "$2" {tmp_path}/heard.wav\n')
    player.chmod(0o700)
    monkeypatch.setenv("PATH", str(player.parent))
    common = ("Hello.", "--seed", 4, "--max-seconds", 0.8, "--play")
    assert say(model, *common) == 0
    assert "played with aplay" in capsys.readouterr().err
    assert len(read_audio(tmp_path / "heard.wav")) == 12800
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "heard.wav"]
    assert say(model, *common, "-o", "a.flac") == 0
    assert len(read_audio(tmp_path / "a.flac")) == 12800
    player.write_text("#!/bin/sh\necho no device >&2; exit 1\n")
    assert say(model, *common) == 2
    assert "could not be played and was not kept" in capsys.readouterr().err
    assert say(model, *common, "-o", "b.wav") == 0
    assert "the audio is in b.wav" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["say", "stream"])
def test_the_output_does_not_replace_the_prompt(model: Path, recording: Path, capsys, command: str) -> None:
    before = recording.read_bytes()
    prompt = ["--prompt-audio", str(recording), "--prompt-text", "Tone."]
    assert main([command, "Hi.", "-o", str(recording), *prompt, "--model", str(model)]) == 2
    assert "choose another --output" in capsys.readouterr().err
    assert recording.read_bytes() == before


def test_an_unreadable_prompt_is_one_line_for_every_command(model: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "noise.wav").write_bytes(b"RIFF" + bytes(200))
    prompt = ["--prompt-audio", str(tmp_path / "noise.wav"), "--prompt-text", "Tone."]
    common = ["--model", str(model), "--device", "cpu"]
    for arguments in (
        ["say", "Hi.", "-o", str(tmp_path / "a.wav"), *prompt],
        ["stream", "Hi.", "-o", str(tmp_path / "a.wav"), *prompt],
        ["voices", "create", "--audio", str(tmp_path / "noise.wav"), "--text", "Tone.", "--out", str(tmp_path / "a.safetensors")],
        ["adapt", str(tmp_path / "noise.wav"), "--text", "Tone.", "--sim-texts", "0"],
    ):
        assert main([*arguments, *common]) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ")
        assert "noise.wav" in error
