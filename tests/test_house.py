"""The house rules that a parser can check."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "src" / "kalle").rglob("*.py"))


def parsed() -> Iterator[tuple[Path, ast.Module]]:
    for path in FILES:
        yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def test_there_is_something_to_check() -> None:
    assert len(FILES) > 80


def test_no_print() -> None:
    found = [
        f"{path}:{call.lineno}"
        for path, tree in parsed()
        for call in calls(tree)
        if isinstance(call.func, ast.Name) and call.func.id == "print"
    ]
    assert not found


def test_pickles_are_never_executed() -> None:
    """Every torch.load says weights_only=True, and training resumes with it too."""
    loads = [(path, call) for path, tree in parsed() for call in calls(tree) if ast.unparse(call.func) == "torch.load"]
    fits = [(path, call) for path, tree in parsed() for call in calls(tree) if ast.unparse(call.func) == "trainer.fit"]
    assert loads
    assert fits
    for path, call in loads + fits:
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("weights_only") == "True", f"{path}:{call.lineno}"


def test_public_functions_have_docstrings_and_types() -> None:
    bare = []
    for path, tree in parsed():
        bare += [str(path)] if ast.get_docstring(tree) is None and (ROOT / path).read_text().strip() else []
        for node in tree.body:
            bodies = (
                [node] if isinstance(node, ast.FunctionDef) else [n for n in getattr(node, "body", []) if isinstance(n, ast.FunctionDef)]
            )
            for function in bodies:
                if function.returns is None and not function.name.startswith("__"):
                    bare.append(f"{path}:{function.name} has no return type")
                if isinstance(node, ast.FunctionDef) and not function.name.startswith("_") and ast.get_docstring(function) is None:
                    bare.append(f"{path}:{function.name} has no docstring")
    assert not bare


def test_docstrings_are_statements() -> None:
    """None begins with "What": it says what the thing is or does."""
    found = [
        f"{path}:{node.lineno}"
        for path, tree in parsed()
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and str(node.value.value).startswith("What ")
    ]
    assert not found


def test_no_absolute_paths_of_anybody() -> None:
    absolute = re.compile(r"(?<![\w.:/}])/(home|root|tmp|Users|opt|mnt)/")
    texts = [
        path
        for folder in ("src", "configs", "docs", "scripts", "recipes")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml", ".md")
    ]
    assert len(texts) > 100
    assert absolute.search("see /home/somebody/x")
    assert not [path for path in texts if absolute.search(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("name", ["lightning", "hydra", "omegaconf", "lhotse"])
def test_heavy_libraries_stay_in_their_rooms(name: str) -> None:
    rooms = {
        "lightning": ("training", "data/loading", "cli"),
        "hydra": ("cli",),
        "omegaconf": ("cli",),
        "lhotse": ("data", "evaluation/test_list.py"),
    }[name]
    outside = []
    for path, tree in parsed():
        inside = path.relative_to("src/kalle").as_posix()
        imported = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        imported += [node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        if any(module.split(".")[0] == name for module in imported) and not inside.startswith(rooms):
            outside.append(inside)
    assert not outside


def test_no_two_public_classes_have_one_name() -> None:
    """A newcomer who reads a name in a traceback or a signature finds one class."""
    places: dict[str, list[str]] = {}
    for path, tree in parsed():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places.setdefault(node.name, []).append(str(path))
    assert {name: found for name, found in places.items() if len(found) > 1} == {}


def test_no_two_modules_have_one_name_but_a_command_and_its_work() -> None:
    """`cli/NAME.py` is the command, and another NAME.py what it does; no third one, and no pair elsewhere.

    A model and its training (lm) and the configurations of models and of trainings (config) are one thing each.
    """
    places: dict[str, list[str]] = {}
    for path, _ in parsed():
        if path.stem != "__init__":
            places.setdefault(path.stem, []).append(str(path.parent.relative_to("src/kalle")))
    doubled = {name: found for name, found in places.items() if len([place for place in found if place != "cli"]) > 1}
    assert set(doubled) <= {"lm", "config"}


def test_no_two_test_files_have_one_name() -> None:
    """pytest imports them by their name alone, and takes the second for the first."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))
