"""Count the modules of src/kalle: how many, how long, and how many have a single reader.

    python scripts/house_numbers.py [--source src]

A module's readers are the other modules that import it or a name of it; an import inside a function counts. The history section of
docs/architecture.md holds the numbers over time.
"""

from __future__ import annotations

import argparse
import ast
import statistics
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def module_name(path: Path, source: Path) -> str:
    """Dotted name of a file below ``source``."""
    return ".".join(path.relative_to(source).with_suffix("").parts).removesuffix(".__init__")


def imported(path: Path) -> set[str]:
    """Dotted names that the file imports, each ``from a import b`` as both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def main() -> None:
    """Print the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, default=ROOT / "src", help="folder that holds the package kalle")
    source = parser.parse_args().source
    files = {module_name(path, source): path for path in sorted((source / "kalle").rglob("*.py"))}
    lines = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in files.items()}
    readers: dict[str, set[str]] = {name: set() for name in files}
    for name, path in files.items():
        for target in imported(path) & files.keys():
            if target != name:
                readers[target].add(name)
    plain = [name for name, path in files.items() if path.name != "__init__.py"]
    single = [name for name in plain if len(readers[name]) == 1]
    print(f"modules, without __init__     {len(plain)}")
    print(f"lines                         {sum(lines.values())}")
    print(f"median lines of a module      {statistics.median(lines[name] for name in plain):g}")
    print(f"longest                       {max(lines.values())} ({max(lines, key=lines.__getitem__)})")
    print(f"read by exactly one other     {len(single)}")
    print(f"... and under 100 lines       {sum(lines[name] < 100 for name in single)}")


if __name__ == "__main__":
    main()
