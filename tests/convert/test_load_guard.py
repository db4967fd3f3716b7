"""torch.load runs what a pickle says unless weights_only is set: it may appear where foreign checkpoints are read, and only so."""

from __future__ import annotations

import ast
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "kalle"


def _loads(tree: ast.AST) -> list[ast.Call]:
    """Calls of torch.load however torch is named, and of a bare load imported from torch."""
    bare = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "torch"
        for alias in node.names
        if alias.name == "load"
    }
    imports = [alias for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
    modules = {alias.asname or alias.name for alias in imports if alias.name == "torch"}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call
        for call in calls
        if (isinstance(call.func, ast.Name) and call.func.id in bare)
        or (isinstance(call.func, ast.Attribute) and call.func.attr == "load" and ast.unparse(call.func.value) in modules)
    ]


def _is_safe(call: ast.Call) -> bool:
    return any(word.arg == "weights_only" and isinstance(word.value, ast.Constant) and word.value.value is True for word in call.keywords)


def test_torch_load_is_safe_and_only_where_checkpoints_are_read():
    found = {path.relative_to(SOURCE): _loads(ast.parse(path.read_text())) for path in SOURCE.rglob("*.py")}
    assert len(found) > 40
    assert [str(path) for path, calls in found.items() if not all(map(_is_safe, calls))] == []
    assert {path.parts[0] for path, calls in found.items() if calls} == {"convert", "evaluation", "training"}


def test_no_other_unpickling():
    forbidden = {"pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load", "torch.jit.load"}
    found = {
        f"{path.relative_to(SOURCE)}: {name}"
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in forbidden
    }
    assert found == set()


def test_the_guard_sees_every_spelling():
    unsafe = [
        "import torch\ntorch.load(p)",
        "import torch as t\nt.load(p, weights_only=False)",
        "from torch import load as read\nread(p)",
        "import torch\ntorch.load(p, weights_only=flag)",
    ]
    assert all(not all(map(_is_safe, _loads(ast.parse(text)))) for text in unsafe)
    safe = _loads(ast.parse("import torch\ntorch.load(p, weights_only=True)"))
    assert len(safe) == 1
    assert _is_safe(safe[0])
