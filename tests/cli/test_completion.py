from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kalle.cli.main import SCRIPTS, candidates, main


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["ev"], ["evaluate"]),
        (["bench", ""], ["train", "load", "synthesis", "streaming", "compute", "crossover"]),
        (["train", ""], ["flowvae", "lm"]),
        (["evaluate", "kind"], ["kind="]),
        (["train", "lm", "ob"], ["objective="]),
        (["train", "flowvae", "fl"], ["flowvae="]),
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


@pytest.fixture
def kalle_on_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the command and two files, which is the current one and on the PATH."""
    (tmp_path / "kalle").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m kalle "$@"\n')
    (tmp_path / "kalle").chmod(0o755)
    (tmp_path / "recording one.wav").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    return tmp_path


COMPLETED = [
    ("kalle ev", "evaluate"),
    ("kalle evaluate kin", "kind="),
    ("kalle say --temp", "--temperature"),
    ("kalle say reco", "recording one.wav"),
]


def in_bash(line: str) -> str:
    words = line.split(" ")
    ask = f"COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; _kalle; printf '%s' \"$COMPREPLY\""
    code = f"{SCRIPTS['bash']}\ncompopt() {{ :; }}\n{ask}"
    return subprocess.run(["bash", "--norc", "-c", code], capture_output=True, text=True, check=True, timeout=120).stdout


def in_fish(line: str) -> str:
    code = f"{SCRIPTS['fish']}\ncomplete -C '{line}'"
    done = subprocess.run(["fish", "--no-config", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()[0].partition("\t")[0]


@pytest.mark.parametrize(("line", "completed"), COMPLETED[:3])
@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_a_shell_completes(shell: str, line: str, completed: str, kalle_on_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not here")
    assert (in_bash if shell == "bash" else in_fish)(line) == completed


def test_zsh_completes_words_keys_and_files(kalle_on_path: Path) -> None:
    pexpect = pytest.importorskip("pexpect")
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not here")
    (kalle_on_path / "c.zsh").write_text(SCRIPTS["zsh"])
    with pexpect.spawn("zsh", ["-f", "-i"], encoding="utf-8", timeout=120, dimensions=(40, 200)) as shell:
        shell.sendline("PS1='> '; autoload -Uz compinit; compinit -D -u; source ./c.zsh; echo rea''dy")
        shell.expect("ready")
        for line, completed in COMPLETED:
            shell.sendcontrol("u")
            shell.send(f"{line}\t")
            shell.expect_exact(completed.removeprefix(line.split(" ")[-1]).replace(" ", "\\ "))
