from __future__ import annotations

import shutil
import subprocess

import pytest

from kalle.cli.main import SCRIPTS, candidates, main


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ev"], ["evaluate"]),
        (["bench", ""], ["train", "synthesis", "streaming"]),
        (["train", ""], ["flowvae", "lm"]),
        (["evaluate", "kind"], ["kind="]),
        (["say", "--temp"], ["--temperature"]),
        (["bench", "streaming", "--chu"], ["--chunk"]),
        (["say", "text"], []),
        (["nothing", ""], []),
        (["--completion", "z"], ["zsh"]),
    ],
)
def test_words_are_completed(words: list[str], found: list[str]) -> None:
    assert sorted(candidates(words)) == sorted(found)


def test_the_script_of_a_shell(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--completion", "bash"]) == 0
    assert capsys.readouterr().out == SCRIPTS["bash"]
    assert main(["--complete", "doc"]) == 0
    assert capsys.readouterr().out == "doctor\n"
    assert main(["--completion", "csh"]) == 2
    assert "expected bash, zsh, fish" in capsys.readouterr().err


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shell_takes_its_script(shell: str) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    options = ["-n"] if shell != "fish" else ["--no-execute"]
    subprocess.run([shell, *options], input=SCRIPTS[shell], text=True, check=True, timeout=60)
