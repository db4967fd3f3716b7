from __future__ import annotations

import errno
import importlib.util
import shutil
from pathlib import Path

import numpy as np
import pytest

from kalle.audio import read_audio, write_audio
from kalle.convert.release import find_tokenizer, release_folder
from kalle.errors import UserError
from kalle.synthesis import ReleaseCompatibility
from kalle.synthesis.kalle import Kalle
from kalle.text.tokenizer import Tokenizer

ROOT = Path(__file__).parents[2]
REFERENCE = ROOT / "tests" / "reference"


@pytest.fixture(scope="module")
def infer():
    spec = importlib.util.spec_from_file_location("infer_script", ROOT / "scripts" / "infer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    """The golden weights under the released file names."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for source, target in (("flowvae_tiny.pt", "flowvae.pt"), ("flowvae_tiny.json", "flowvae.json"), ("lm_tiny.pt", "model.pt")):
        shutil.copy(REFERENCE / source, folder / target)
    shutil.copy(REFERENCE / "lm_tiny.json", folder / "lm.json")
    Tokenizer.bytes().save(folder / "llama3")
    return folder


@pytest.fixture
def prompt(tmp_path: Path) -> Path:
    write_audio(tmp_path / "prompt.wav", 0.1 * np.sin(np.arange(9000) / 9.0), 16000)
    return tmp_path / "prompt.wav"


def test_the_flags_of_the_release_speak_and_convert_once(
    infer, ckpt: Path, prompt: Path, tmp_path: Path, capsys, caplog, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")
    flags = [
        "--target_text",
        "Hi.",
        "--prompt_text",
        "Tone.",
        "--prompt_wav_path",
        str(prompt),
        "--ckpt",
        str(ckpt),
        "--seed",
        "1",
        "--device",
        "cpu",
    ]
    assert infer.main(flags) == 0
    assert "converting the released files" in caplog.text
    assert "wrote output.wav" in capsys.readouterr().out
    first = read_audio("output.wav")
    caplog.clear()
    assert infer.main([*flags, "--output", "again.wav"]) == 0
    assert "converting" not in caplog.text
    np.testing.assert_array_equal(first, read_audio("again.wav"))
    kalle = Kalle.from_pretrained(ckpt / "kalle-release", "cpu")
    expected = kalle.synthesize("Hi.", kalle.voice(prompt, "Tone."), seed=1)
    np.testing.assert_allclose(first, expected.pcm16() / 32768, atol=1e-6)


def test_release_exact_has_every_habit(infer, ckpt: Path, prompt: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.wav"
    flags = ["--target_text", "Hi.", "--prompt_text", "Tone.", "--prompt_wav_path", str(prompt), "--ckpt", str(ckpt), "--device", "cpu"]
    flags += ["--seed", "1", "--max_seconds", "0.8", "--output", str(out)]
    assert infer.main([*flags, "--release-exact"]) == 0
    kalle = Kalle.from_pretrained(ckpt / "kalle-release", "cpu")
    voice = kalle.voice(prompt, "Tone.")
    expected = kalle.synthesize("Hi.", voice, seed=1, max_seconds=0.8, compatibility=ReleaseCompatibility.release())
    exact = read_audio(out)
    np.testing.assert_allclose(exact, expected.pcm16() / 32768, atol=1e-6)
    assert infer.main(flags) == 0
    assert len(exact) != len(read_audio(out)), "the last frame is dropped"


def test_without_a_prompt_and_with_a_given_model(infer, ckpt: Path, tmp_path: Path) -> None:
    model = release_folder(ckpt)
    out = tmp_path / "out.wav"
    assert infer.main(["--target_text", "Hi.", "--model", str(model), "--output", str(out), "--ckpt", "none", "--device", "cpu"]) == 0
    assert len(read_audio(out)) > 0


def test_mistakes_are_one_line_and_leave_nothing(infer, ckpt: Path, prompt: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.wav"
    common = ["--output", str(out), "--ckpt", str(ckpt), "--device", "cpu"]
    for flags, message in (
        (["--target_text", " "], "the text is empty"),
        (["--target_text", "Hi.", "--prompt_wav_path", str(prompt)], "a prompt without its transcript"),
        (["--target_text", "Hi.", "--prompt_text", "Tone."], "a transcript without its recording"),
    ):
        assert infer.main([*flags, *common]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.rstrip().splitlines()[-1].startswith("error: ")
    assert not out.exists()


def test_messages_name_the_script_s_own_flags(infer, ckpt: Path, prompt: Path, tmp_path: Path, capsys) -> None:
    common = ["--target_text", "Hi.", "--output", str(tmp_path / "out.wav"), "--ckpt", str(ckpt), "--device", "cpu"]
    for flags, words in (
        (["--prompt_wav_path", str(prompt)], "(--prompt_text)"),
        (["--prompt_text", "Tone."], "got --prompt_text and no --prompt_wav_path"),
        (["--prompt_wav_path", "none.wav", "--prompt_text", "Tone."], "check --prompt_wav_path"),
    ):
        assert infer.main([*flags, *common]) == 2
        assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: Permission denied: 'x'\n"),
        (OSError("odd"), 2, "error: odd\n"),
        (KeyboardInterrupt(), 130, "error: interrupted; run the same command again\n"),
    ],
)
def test_the_system_s_errors_are_one_line(infer, capfd, monkeypatch, error: BaseException, code: int, line: str) -> None:
    def raising(arguments: list[str]) -> None:
        raise error

    monkeypatch.setattr(infer, "run", raising)
    assert infer.main([]) == code
    assert capfd.readouterr() == ("", line)


def test_missing_released_files_are_named(ckpt: Path) -> None:
    (ckpt / "model.pt").unlink()
    shutil.rmtree(ckpt / "llama3")
    with pytest.raises(UserError, match=r"lacks model\.pt, a folder with tokenizer\.json"):
        release_folder(ckpt)
    assert not (ckpt / "kalle-release").exists()


def test_a_failed_conversion_leaves_no_folder(ckpt: Path) -> None:
    (ckpt / "model.pt").write_bytes(b"no")
    with pytest.raises(UserError):
        release_folder(ckpt)
    assert not list(ckpt.glob("kalle-release*"))


def test_without_its_json_the_published_configuration_is_assumed(ckpt: Path) -> None:
    (ckpt / "flowvae.json").unlink()
    with pytest.raises(UserError, match="misshapen") as caught:
        release_folder(ckpt)
    assert "expected (24, 12, 4)" in str(caught.value), "widths of the published encoder"


def test_the_tokenizer_folder_is_found(ckpt: Path) -> None:
    assert find_tokenizer(ckpt) == ckpt / "llama3"
    Tokenizer.bytes().save(ckpt / "tokenizer")
    assert find_tokenizer(ckpt) == ckpt / "tokenizer"
    assert find_tokenizer(ckpt / "tokenizer") == ckpt / "tokenizer"
    assert find_tokenizer(REFERENCE) is None
