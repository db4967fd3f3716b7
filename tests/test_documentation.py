"""The commands, flags, links and Python of README.md and docs/ exist and work."""

from __future__ import annotations

import importlib
import re
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.main import get_command

from kalle.cli.main import COMMANDS, HYDRA_COMMANDS, main

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    path
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md")), *sorted(ROOT.glob("recipes/**/*.md"))]
    if path.is_file()
]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
REQUIRED = {
    "flowvae": {"data.corpus", "out"},
    "lm": {"data.latents", "out"},
    "encode": {"flowvae", "corpus", "out"},
    "evaluate": {"kind", "testset", "out"},
}


def blocks(*languages: str) -> list[tuple[str, str]]:
    return [
        (path.name, code)
        for path in DOCUMENTS
        for language, code in BLOCK.findall(path.read_text(encoding="utf-8"))
        if language in languages
    ]


def commands() -> list[tuple[str, tuple[str, ...]]]:
    found = []
    for name, code in blocks("bash", "sh", "shell", "console"):
        for line in code.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
                words = words[1:]
            if "|" in words:
                words = words[: words.index("|")]
            if words:
                found.append((name, tuple(words)))
    return found


def kalle_commands() -> list[tuple[str, ...]]:
    """Commands in blocks, and those written inline with their first words only."""
    result = {words[1:] for _, words in commands() if words[0].removeprefix(".venv/bin/") == "kalle" and len(words) > 1}
    return sorted(result)


def test_there_is_documentation_to_check() -> None:
    assert ROOT / "README.md" in DOCUMENTS
    assert len(kalle_commands()) >= 5
    assert blocks("python")


def flags_of(command: Any) -> set[str]:
    """Every option of a command and of its subcommands."""
    own = {option for parameter in command.params for option in [*parameter.opts, *parameter.secondary_opts]}
    return own.union({"--help", "--help-all"}, *(flags_of(sub) for sub in getattr(command, "commands", {}).values()))


def test_inline_commands_exist() -> None:
    for path in DOCUMENTS:
        for text in re.findall(r"`(kalle [^`]+|make [a-z-]+[^`]*)`", path.read_text(encoding="utf-8")):
            first, word, *rest = text.split()
            if first == "make":
                assert word in TARGETS, f"{path.name}: {text}"
            elif word[0].isalpha():
                assert word in COMMANDS or word == "COMMAND", f"{path.name}: {text}"
                if word in COMMANDS and word not in HYDRA_COMMANDS:
                    unknown = {part.split("=")[0] for part in rest if re.match(r"--[a-z]", part)} - flags_of(click_command(word))
                    assert not unknown, f"{path.name}: {text}"


def test_make_targets_exist() -> None:
    used = {words[1] for _, words in commands() if words[0] == "make" and len(words) > 1}
    assert used
    assert used <= TARGETS
    assert all(target in TARGETS for target in ("quickstart", "quickstart-scratch", "test", "test-slow", "test-gpu", "lint", "help"))


def test_makefile_targets_are_described() -> None:
    if shutil.which("make") is None:
        pytest.skip("no make")
    shown = subprocess.run(["make", "help"], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True).stdout
    for target in TARGETS:
        assert re.search(rf"^{target}\s", shown, re.MULTILINE), target


@cache
def click_command(name: str) -> Any:
    """The parser of `kalle NAME`."""
    module = importlib.import_module(f"kalle.cli.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(getattr(module, name))
    return get_command(app)


def typer_parse(words: tuple[str, ...]) -> None:
    """Parse ``words`` as the command would, without running it; raises what the command line would."""
    name, rest = words[0], list(words[1:])
    command = click_command(name)
    if hasattr(command, "commands") and rest and rest[0] in command.commands:
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(name, rest)


@pytest.mark.parametrize("words", kalle_commands(), ids=" ".join)
def test_command_is_understood(words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert words[0] in COMMANDS
    if words[0] not in HYDRA_COMMANDS:
        typer_parse(words)
        return
    from kalle.cli import hydra_entry

    composed: list[Any] = []

    def instead(function: Any, name: str, overrides: list[str]) -> int:
        flags = {"--cfg", "job", "-m", "--multirun"}
        composed.append(hydra_entry.compose(name, [word for word in overrides if word not in flags]))
        return 0

    monkeypatch.setattr(hydra_entry, "run_hydra", instead)
    assert main(list(words)) == 0
    assert composed
    stage = words[1] if words[0] == "train" else words[0]
    given = {word.split("=")[0] for word in words}
    assert "--cfg" in words or given >= REQUIRED[stage], f"{REQUIRED[stage] - given} would be missing"


@pytest.mark.parametrize(("page", "root"), [("train-lm", "train_lm"), ("train-flowvae", "train_flowvae"), ("evaluate", "evaluate")])
def test_inline_overrides_exist(page: str, root: str) -> None:
    """`key=value` in running text composes."""
    from kalle.cli.hydra_entry import compose

    text = BLOCK.sub("", (ROOT / "docs" / "how-to" / f"{page}.md").read_text(encoding="utf-8"))
    found = {word.split("=")[0]: word for word in re.findall(r"`([a-z_.]+=[a-z0-9_.\-]+)`", text)}
    groups = {path.name for path in (ROOT / "configs").iterdir() if path.is_dir()}
    assert found
    compose(root, sorted(word for key, word in found.items() if key not in groups))


def scripts() -> dict[str, set[str]]:
    """Script named in a command -> the flags it is given somewhere."""
    found: dict[str, set[str]] = {}
    for _, words in commands():
        if words[0].startswith("python") and words[1:2] and words[1].endswith(".py"):
            found.setdefault(words[1], set()).update(word for word in words[2:] if word.startswith("--"))
    return found


@pytest.mark.parametrize("script", sorted(scripts()))
def test_scripts_and_their_flags_exist(script: str) -> None:
    assert (ROOT / script).is_file()
    environment = {"PYTHONPATH": str(ROOT / "src"), "PATH": "/usr/bin:/bin", "HOME": str(ROOT)}
    command = [sys.executable, str(ROOT / script), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=True).stdout
    assert not {flag for flag in scripts()[script] if flag not in shown}


@pytest.mark.parametrize("code", [code for _, code in blocks("python")], ids=lambda code: code.strip().splitlines()[0][:40])
def test_python_runs(code: str, toy_weights: Path, toy_corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the toy weights in the place of every folder of weights that is named, and the toy corpus in that of every corpus."""
    monkeypatch.chdir(tmp_path)
    trained = SimpleNamespace(weights=tmp_path, metrics={})
    monkeypatch.setattr("kalle.training.train_lm", lambda config: trained)  # the configuration is what is shown
    for source, named in (
        (toy_weights, r'(?:from_pretrained\(\s*|model=|flowvae=)"([^"]+)"'),
        (toy_corpus, r'(?:corpus=|TestListConfig\()"([^"]+)"'),
    ):
        for folder in re.findall(named, code):
            shutil.copytree(source, tmp_path / folder, dirs_exist_ok=True)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    for name in re.findall(r'\.save\("([^"]+)"\)', code):
        assert (tmp_path / name).is_file()


def anchors(path: Path) -> set[str]:
    """The fragments that GitHub and the docs site give to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def test_links_lead_somewhere() -> None:
    links = 0
    for path in DOCUMENTS:
        prose = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", path.read_text(encoding="utf-8")))
        for target in re.findall(r"\]\(([^)\s]+)\)|src=\"([^\"]+)\"", prose):
            address, _, fragment = "".join(target).partition("#")
            if "://" in address or address.startswith("mailto:"):
                continue
            aimed = path.parent / address if address else path
            assert aimed.exists(), f"{path.name}: {address}"
            if fragment and aimed.suffix == ".md":
                assert fragment in anchors(aimed), f"{path.name}: {address}#{fragment}"
            links += 1
    assert links > 100


def test_architecture_names_files_that_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    files = [path.as_posix() for folder in ("src", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
    named = set(re.findall(r"[\w/]+\.py\b", text)) - {"cli/NAME.py"}
    assert len(named) > 40
    assert not [name for name in named if not any(file.endswith(f"/{name}") for file in files)]


def test_samples_are_small() -> None:
    assert 0 < sum(path.stat().st_size for path in (ROOT / "docs" / "audio").glob("*.mp3")) < 300_000


@pytest.mark.slow
def test_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    for path in sorted(ROOT.glob("docs/tutorials/*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}).execute()
