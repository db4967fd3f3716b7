from __future__ import annotations

import io
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kalle.audio import read_audio, write_audio
from kalle.checkpoint import write_json
from kalle.cli.main import main
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
BOOK = "The first sentence is here. The second one follows it.\n\n* * *\n\nHere is a new paragraph. It ends with this one.\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Random weights that never end a sentence, with a voice called "tone"."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = EncoderConfig(channels=(4, 4, 4, 4, 4, 8, 8))
        FlowVAE(
            FlowVAEConfig(latent_dim=4, encoder=encoder, flow=FlowConfig(8, 1, 3, 1), decoder=ISTFTConfig(channels=16, blocks=1))
        ).save_pretrained(folder)
        KalleLM(KalleLMConfig(backbone=BACKBONE, latent_dim=4)).save_pretrained(folder)
    Tokenizer.bytes().save(folder / "tokenizer")
    write_json(folder / "config.json", {"format_version": 1, "stop": {"threshold": 1e-9}})
    wave = 0.1 * np.sin(np.arange(16000) / 9.0)
    Kalle.from_pretrained(folder, "cpu").voice(wave.astype(np.float32), "Tone.").save(folder / "voices" / "tone.safetensors")
    return folder


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "book.txt").write_text(BOOK)
    return tmp_path / "book.txt"


def options(model: Path) -> list[str]:
    return ["--model", str(model), "--device", "cpu", "--voice", "tone", "--max-seconds", "0.4", "--retries", "0"]


def say(model: Path, *arguments: object) -> int:
    return main(["say", *map(str, arguments), *options(model)])


def test_a_book_becomes_a_file_with_subtitles(model: Path, book: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "new" / "book.wav"
    assert say(model, "--text-file", book, "-o", out, "--seed", 3, "--srt", "--pause", 0.5, "--paragraph-pause", 1) == 0
    captured = capsys.readouterr()
    assert "speaking 4 sentences one by one, as it comes from a file" in captured.err
    assert len(read_audio(out)) == 4 * 6400 + 2 * 8000 + 16000
    assert "audio: 3.60 s at 16000 Hz (4 sentences, 2 paragraphs)" in captured.out
    assert "stop reasons: 4 max_frames" in captured.out
    assert "seed: 3" in captured.out
    assert captured.out.count("words may be missing") == 4
    assert f"not spoken: '* * *' at character {BOOK.index('*') + 1}" in captured.out
    elapsed, audio, rtf = map(float, re.search(r"RTF = synthesis / audio = ([\d.]+) s / ([\d.]+) s = ([\d.]+)", captured.out).groups())
    assert audio == 1.6
    assert rtf == pytest.approx(elapsed / audio, abs=0.01)
    blocks = out.with_suffix(".srt").read_text().split("\n\n")
    assert [block.splitlines()[2] for block in blocks] == [
        "The first sentence is here.",
        "The second one follows it.",
        "Here is a new paragraph.",
        "It ends with this one.",
    ]
    assert blocks[2].splitlines()[1] == "00:00:02,300 --> 00:00:02,700"
    assert sorted(path.name for path in out.parent.iterdir()) == ["book.srt", "book.wav"]


def test_an_interrupted_book_goes_on_to_the_same_file(model: Path, book: Path, tmp_path: Path, capfd, monkeypatch) -> None:
    whole, cut = tmp_path / "whole.flac", tmp_path / "cut.flac"
    assert say(model, "--text-file", book, "-o", whole, "--seed", 3) == 0
    original, calls = Kalle.speak, []

    def interrupted(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments, **named)

    monkeypatch.setattr(Kalle, "speak", interrupted)
    capfd.readouterr()
    assert say(model, "--text-file", book, "-o", cut, "--seed", 3) == 130
    assert capfd.readouterr().err.splitlines()[-1] == (
        f"error: interrupted; 2 of 4 sentences are kept in '{cut}.parts'; run the same command again to continue"
    )
    assert not cut.exists()
    assert say(model, "--text-file", book, "-o", cut) == 0
    assert "4 sentences, 2 paragraphs, 2 of them by an earlier run" in capfd.readouterr().out
    assert len(calls) == 5
    assert cut.read_bytes() == whole.read_bytes()
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.slow
def test_a_killed_process_goes_on_to_the_same_file(model: Path, book: Path, tmp_path: Path) -> None:
    book.write_text(BOOK * 15)
    whole, cut, folder = tmp_path / "whole.wav", tmp_path / "cut.wav", tmp_path / "cut.wav.parts"
    assert say(model, "--text-file", book, "-o", whole, "--seed", 3) == 0
    command = [sys.executable, "-m", "kalle", "say", "--text-file", str(book), "-o", str(cut), "--seed", "3", *options(model)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(folder.glob("0*.json"))) < 10:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    done = len(list(folder.glob("0*.json")))
    assert 10 <= done < 60
    assert not cut.exists()
    assert say(model, "--text-file", book, "-o", cut, "--seed", 3) == 0
    assert cut.read_bytes() == whole.read_bytes()


def test_a_change_is_noticed_and_restart_forgets(model: Path, book: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.wav"
    assert say(model, "--text-file", book, "-o", out, "--seed", 3, "--keep-parts") == 0
    first = out.read_bytes()
    parts = sorted(path.name for path in (tmp_path / "out.wav.parts").iterdir())
    assert parts[:3] == ["00000.json", "00000.safetensors", "00000.wav"]
    assert json.loads((tmp_path / "out.wav.parts" / "00003.json").read_text())["text"] == "It ends with this one."
    capsys.readouterr()
    assert say(model, "--text-file", book, "-o", out, "--seed", 4) == 2
    assert (
        "were spoken otherwise: another seed; give the same to continue, remove the folder to begin again (--restart)"
        in capsys.readouterr().err
    )
    assert out.read_bytes() == first
    assert say(model, "--text-file", book, "-o", out, "--seed", 4, "--restart") == 0
    assert out.read_bytes() != first
    assert not (tmp_path / "out.wav.parts").exists()


def test_a_foreign_folder_is_left_alone(model: Path, book: Path, tmp_path: Path, capsys) -> None:
    mine = tmp_path / "out.wav.parts" / "diary.txt"
    mine.parent.mkdir()
    mine.write_text("dear diary")
    assert say(model, "--text-file", book, "-o", tmp_path / "out.wav", "--restart") == 2
    assert "is in the way" in capsys.readouterr().err
    assert mine.read_text() == "dear diary"


def test_a_long_text_on_the_command_line_is_spoken_sentence_by_sentence(model: Path, tmp_path: Path, capsys) -> None:
    text = "This is one of many sentences. " * 14
    assert say(model, text, "-o", tmp_path / "out.wav", "--seed", 1) == 0
    captured = capsys.readouterr()
    assert "speaking 14 sentences one by one, as it is too long for one request" in captured.err
    assert "14 sentences, 1 paragraphs" in captured.out
    assert say(model, "Two sentences. In one go.", "-o", tmp_path / "out.wav", "--seed", 1) == 0
    assert "sentences" not in capsys.readouterr().out


def test_standard_output_gets_the_file(model: Path, book: Path, tmp_path: Path, capsysbinary, monkeypatch) -> None:
    for arguments in (["--text-file", str(book)], ["Hello there."]):
        assert say(model, *arguments, "-o", tmp_path / "out.wav", "--seed", 3) == 0
        capsysbinary.readouterr()
        assert say(model, *arguments, "-o", "-", "--seed", 3) == 0
        captured = capsysbinary.readouterr()
        assert captured.out == (tmp_path / "out.wav").read_bytes()
        assert b"wrote to standard output" in captured.err
    monkeypatch.setattr("sys.stdin", io.StringIO(BOOK))
    assert say(model, "--text-file", "-", "-o", "-", "--seed", 3) == 0
    assert len(capsysbinary.readouterr().out) > 1000


def test_nothing_spoken_at_all_is_an_error(model: Path, book: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    import kalle.synthesis.kalle as module
    from kalle.synthesis.options import StopRule

    original = module.read_weight_folder
    rule = StopRule(threshold=1e9, min_index=-1)
    monkeypatch.setattr(module, "read_weight_folder", lambda folder: type(original(folder))(stop=rule))
    assert say(model, "--text-file", book, "-o", tmp_path / "out.wav", "--seed", 3) == 2
    assert "nothing was spoken: got 0 frames for each sentence with seed 3" in capsys.readouterr().err
    assert not (tmp_path / "out.wav").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "what to say: got none"),
        (["Hi", "--text-file", "book.txt"], "what to say: got TEXT and --text-file"),
        (["--text-file", "none.txt"], "text file not found: got 'none.txt'"),
        (["--text-file", "."], "is a folder"),
        (["--text-file", "latin.txt"], "'latin.txt' is not UTF-8"),
        (["--text-file", "empty.txt"], "the text is empty"),
        (["--text-file", "stars.txt"], "nothing to speak: got '* * *'"),
        (["a\x00b"], "a control character (U+0000 at character 2)"),
        (["Hi", "--srt", "-o", "-"], "--srt writes beside the output"),
        (["--text-file", "book.txt", "--plot", "x.png"], "--plot draws a single request"),
        (["Hi", "--plot", "x.wav"], "unknown image format: got 'x.wav'"),
        (["--text-file", "book.txt", "--pause", "-1"], "bad --pause: got -1.0"),
        (["--text-file", "book.txt", "--temperature", "-1"], "bad temperature"),
        (["--text-file", "book.txt", "--seed", "-1"], "bad seed: got -1"),
        (["Hi", "--language", "English!"], "unknown language: got 'English!'"),
        (["--text-file", "book.txt", "-o", "out.m4a"], "expected .wav, .flac"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_file(model: Path, book: Path, tmp_path: Path, capsys, monkeypatch, arguments, message) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "latin.txt").write_bytes("Grüße".encode("latin-1"))
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "stars.txt").write_text("* * *")
    before = sorted(tmp_path.rglob("*"))
    given = [*arguments, *([] if "-o" in arguments else ["-o", "new/out.wav"])]
    assert main(["say", *given, *options(model)]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.splitlines()[-1].startswith("error: ")
    assert captured.out == ""
    assert sorted(tmp_path.rglob("*")) == before


def test_show_text_loads_no_model(model: Path, book: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(Kalle, "from_pretrained", lambda *_: pytest.fail("loaded"))
    pytest.importorskip("inflect")
    book.write_text("\ufeffDr. Smith paid $3.50. It was rather late.\n\n***\n\n他有3个苹果。😀 Да, 5.")
    assert main(["say", "--text-file", str(book), "--show-text", "--normalise", "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("original:\nDr. Smith paid $3.50. It was rather late.\n")
    assert "   1 [0:21] Dr. Smith paid $3.50.\n     -> Doctor Smith paid three dollars and fifty cents.\n" in shown
    assert "-> 他有三个苹果。" in shown
    assert "not spoken: '***' at character 44" in shown
    assert main(["say", "It cost $5. Yes, it did.", "--show-text", "--model", str(model)]) == 0
    shown = capsys.readouterr().out
    assert "->" not in shown
    assert "normalisation: off (" in shown
    assert "spoken: at once\n   1 [0:24] It cost $5. Yes, it did." in shown
    assert main(["say", " ", "--show-text"]) == 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("“Ten years,” he said. “He doesn’t walk.”", ["-> Ten years, he said. He doesn't walk."]),
        ('"They have been here."', ["-> They have been here."]),
        ("The children like\nto go.", ["1 [0:24] The children like to go."]),
        ("I asked Ms. Johnson.", ["1 [0:20] I asked Ms. Johnson."]),
        ("STOP at 10:45:30 — *now*!", ["normalisation: on", "-> STOP at ten forty-five and thirty seconds — now!"]),
        ("word " * 25 + "at 10:45:30 sharp.", ["spoken: in 2 sentences", "at ten forty-five and thirty seconds sharp."]),
        ("Agent 007 in 20 000 000", ["-> Agent zero zero seven in twenty million"]),
        ("Hi 😀", ["-> Hi", "warning: these weights never learnt some signs, which are left out: 😀"]),
        ("你好", ["warning: the text looks like language 'zh', and these weights speak en"]),
    ],
)
def test_without_a_model_what_the_shipped_one_speaks_is_shown(text: str, shown: list[str], capsys) -> None:
    pytest.importorskip("inflect")
    assert main(["say", text, "--show-text"]) == 0
    printed = capsys.readouterr().out
    assert [line for line in shown if line not in printed] == []


def test_show_text_as_json(capsys) -> None:
    text = "“Ten years,” he said.\n\n***"
    assert main(["say", text, "--show-text", "--json", "--by-sentences"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert [shown[key] for key in ("text", "language", "language_guessed", "by_sentences")] == [text, "en", False, "that was asked for"]
    (request,) = shown["requests"]
    assert text[request["start"] : request["end"]] == request["text"] == "“Ten years,” he said."
    assert (request["spoken"], request["warnings"]) == ("Ten years, he said.", [])
    assert shown["not_spoken"] == [{"start": 23, "text": "***"}]


def test_a_language_that_the_weights_do_not_speak_is_refused(capsys) -> None:
    assert main(["say", "Hello.", "--language", "zh", "--show-text"]) == 2
    assert "do not speak 'zh': expected en" in capsys.readouterr().err


def test_a_normalised_text_is_spoken_and_shown(model: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("inflect")
    assert say(model, "I have 5.", "-o", tmp_path / "a.wav", "--seed", 1, "--normalise") == 0
    assert "spoken as: I have five." in capsys.readouterr().out
    assert say(model, "I have five.", "-o", tmp_path / "b.wav", "--seed", 1) == 0
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    assert say(model, "У меня 5.", "-o", tmp_path / "c.wav", "--seed", 1, "--normalise") == 0
    assert "warning: not normalised: no rules for language 'ru'" in capsys.readouterr().out


def test_options_of_one_request_reach_it(model: Path, tmp_path: Path, capsys) -> None:
    from kalle.synthesis.release_compat import ReleaseCompatibility

    pytest.importorskip("matplotlib")
    arguments = ["--model", model, "--device", "cpu", "--max-seconds", 0.4, "--seed", 1]
    assert (
        main(["say", "Hi.", "-o", str(tmp_path / "a.wav"), "--plot", str(tmp_path / "a.png"), *map(str, arguments), "--release-exact"]) == 0
    )
    printed = capsys.readouterr().out
    assert "attempts" not in printed
    assert "confidence: 0." in printed
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    kalle = Kalle.from_pretrained(model, "cpu", "float32")
    expected = kalle.synthesize("Hi.", seed=1, max_seconds=0.4, compatibility=ReleaseCompatibility.release())
    write_audio(tmp_path / "b.wav", expected.audio, expected.sample_rate)
    assert (tmp_path / "a.wav").read_bytes() == (tmp_path / "b.wav").read_bytes()
    arguments[arguments.index(0.4)] = 4  # a cap shorter than the text's own is no bad ending
    assert main(["say", "Hi.", "-o", str(tmp_path / "c.wav"), *map(str, arguments), "--retries", "2"]) == 0
    assert re.search(r"attempts: 3 \(seed 1: \w+.*\(kept\)", capsys.readouterr().out)


def test_subtitles_never_overwrite_those_of_another_file(model: Path, book: Path, tmp_path: Path) -> None:
    def subtitled(name: str) -> None:
        assert say(model, "--text-file", book, "-o", tmp_path / name, "--seed", 3, "--srt") == 0

    (tmp_path / "film.srt").write_text("of the film")
    subtitled("film.wav")
    assert (tmp_path / "film.srt").read_text() == "of the film"
    assert (tmp_path / "film.wav.srt").is_file()
    subtitled("book.wav")
    first = (tmp_path / "book.srt").read_text()
    (tmp_path / "book.srt").write_text(first + "edited")
    subtitled("book.flac")
    assert (tmp_path / "book.srt").read_text() == first + "edited"
    assert (tmp_path / "book.flac.srt").read_text() == first
    (tmp_path / "alone.srt").unlink(missing_ok=True)
    for _ in range(2):  # spoken again, its own are replaced
        subtitled("alone.wav")
    assert (tmp_path / "alone.srt").is_file()
    assert not (tmp_path / "alone.wav.srt").exists()
