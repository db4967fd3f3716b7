"""Assemble and build the docs site: `make docs`.

    python scripts/docs_site.py                # build/docs (Markdown) and build/site (HTML); fails at a broken link or an unlisted page
    python scripts/docs_site.py --assemble     # build/docs only

The sources are docs/, the pages of other folders that PAGES names, the notebooks, and three things that are generated: the commands from
their parsers, the configuration from configs/, and the Python reference from docstrings (by mkdocstrings, from the modules named here).
"""

from __future__ import annotations

import argparse
import html
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCS, SOURCE = ROOT / "docs", ROOT / "build" / "docs"
PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "ckpt/kalle-nano/README.md": "kalle-nano.md",
    "ckpt/kalle-nano/voices/ATTRIBUTION.md": "kalle-nano-voices.md",
    "recipes/quickstart/corpus/ATTRIBUTION.md": "recipes/corpus.md",
    **{f"recipes/{path.parent.name}/README.md": f"recipes/{path.parent.name}.md" for path in sorted(ROOT.glob("recipes/*/README.md"))},
}
"""File of the repository -> page of the site, for pages that live outside docs/."""

MEDIA = {".png", ".svg", ".jpg", ".mp3", ".wav", ".ogg"}
FENCE = re.compile(r"(^(?:```|~~~).*?^(?:```|~~~)[ ]*$|`[^`\n]+`)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?P<open>!?\[(?P<text>(?:[^\[\]]|\[[^\]]*\])*)\]\()(?P<target>[^)\s]+)(?P<close>\))")
SOURCE_ATTRIBUTE = re.compile(r'(?P<open>(?:src|href)=")(?P<target>[^"]+)(?P<close>")')
MATH = re.compile(r"\$\$(?P<block>.+?)\$\$|(?<![\\$\w])\$(?P<inline>[^\s$](?:[^$\n]*[^\s$])?)\$(?![\w$])", re.DOTALL)


class BrokenLinkError(Exception):
    """A link of a source leads nowhere."""


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """``change`` applied to what is neither fenced nor inline code."""
    return "".join(part if index % 2 else change(part) for index, part in enumerate(FENCE.split(text)))


def site_path(path: Path) -> Path | None:
    """Where a file of the repository lies on the site, relative to its root; None for what has no place there."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "docs":
        target = inside.relative_to("docs")
        return target.with_suffix(".md") if target.suffix == ".ipynb" else target
    if str(inside) in PAGES:
        return Path(PAGES[str(inside)])
    if str(inside) == "README.md":
        return Path("index.md")
    return Path("media") / inside if inside.suffix in MEDIA else None


def relink(text: str, source: Path, page: Path) -> str:
    """Point the relative links of ``text``, which stands in ``source``, at pages of the site as seen from ``page``.

    A link to a file without a place on the site (code, configuration) becomes its text; media from outside docs/ are copied.
    """

    def new(match: re.Match[str]) -> str:
        address, _, anchor = match["target"].partition("#")
        if not address or re.match(r"[a-z]+:", address):
            return match[0]
        aimed = (source.parent / address).resolve()
        if not aimed.exists():
            raise BrokenLinkError(f"{source.relative_to(ROOT)}: {match['target']} leads nowhere")
        place = site_path(aimed / "README.md" if aimed.is_dir() and site_path(aimed / "README.md") else aimed)
        if place is None or (aimed.is_dir() and not (aimed / "README.md").exists()):
            return match.groupdict().get("text") or match[0]
        if place.parts[0] == "media":
            (SOURCE / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(aimed, SOURCE / place)
        relative = os.path.relpath(place, page.parent)
        return f"{match['open']}{relative}{'#' + anchor if anchor else ''}{match['close']}"

    return outside_code(text, lambda part: SOURCE_ATTRIBUTE.sub(new, LINK.sub(new, part)))


def with_math(text: str) -> str:
    """Formulas between dollars as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    def new(match: re.Match[str]) -> str:
        if match["block"]:
            return convert(match["block"].strip(), display="block")
        return convert(match["inline"], display="inline")

    return outside_code(text, lambda part: MATH.sub(new, part))


def notebook_page(path: Path) -> str:
    """A notebook as Markdown: text, code, and the text and pictures that its cells printed."""
    lines: list[str] = []
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            lines += [text, ""]
            continue
        lines += ["```python", text, "```", ""]
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                lines += [f'<img alt="output of cell {number}" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">', ""]
            else:
                shown = "".join(output.get("text") or data.get("text/plain") or [])
                lines += ["```text", shown.rstrip(), "```", ""] if shown else []
    return "\n".join(lines)


def click_command(name: str) -> Any:
    """The parser of `kalle NAME`, for commands whose options Typer declares."""
    import typer
    from typer.main import get_command

    module = importlib.import_module(f"kalle.cli.{name}")
    app = getattr(module, "app", None)
    if app is None:
        app = typer.Typer()
        app.command()(getattr(module, name))
    return get_command(app)


def plain(text: str | None) -> str:
    """One line for a cell of a table, with its code marked up in HTML, since a bar inside backticks would end the cell."""
    line = html.escape(" ".join((text or "").split()), quote=False).replace("|", "&#124;")
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", line)


def command_section(name: str, command: Any, level: int = 2) -> Iterator[str]:
    """Heading, help, arguments and options of a command, then of its subcommands."""
    yield f"{'#' * level} `kalle {name}`"
    yield ""
    yield html.escape(command.help or "", quote=False)
    yield ""
    rows = []
    for parameter in command.params:
        if parameter.name == "help":
            continue
        if parameter.param_type_name == "argument":
            names = f"`{parameter.metavar or parameter.name.upper()}`"
        else:
            names = ", ".join(f"`{option}`" for option in [*parameter.opts, *parameter.secondary_opts])
        default = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
        known = isinstance(default, str | int | float) and not isinstance(default, bool) and default != ""
        rows.append(f"| {names} | {plain(getattr(parameter, 'help', ''))} | {plain(str(default)) if known else ''} |")
    if rows:
        yield from ["| option | meaning | default |", "|---|---|---|", *rows, ""]
    for sub in getattr(command, "commands", {}).values():
        yield from command_section(f"{name} {sub.name}", sub, level + 1)


def commands_page() -> str:
    """Every command, from the parsers themselves."""
    from kalle.cli.main import COMMANDS, HYDRA_COMMANDS

    lines = ["# Commands", "", "Generated from the commands' own parsers.", "", "| command | |", "|---|---|"]
    lines += [f"| `kalle {name}` | {plain(text)} |" for name, text in COMMANDS.items()]
    for name, text in COMMANDS.items():
        lines.append("")
        if name in HYDRA_COMMANDS:
            lines += [f"## `kalle {name}`", "", f"{text[:1].upper()}{text[1:]}.", ""]
            lines += ["It takes `key=value` arguments. Their names and meanings: [configuration](configuration.md).", ""]
        else:
            lines += command_section(name, click_command(name))
    return "\n".join(lines) + "\n"


def key_table(rows: list[tuple[str, str, str]]) -> list[str]:
    """A table of keys, their defaults and meanings."""
    cells = [f"| `{name}` | {plain(default)} | {plain(meaning)} |" for name, default, meaning in rows]
    return ["| key | default | meaning |", "|---|---|---|", *cells, ""]


def configuration_page() -> str:
    """The keys of the trainings from their dataclasses, and the YAML files with their comments."""
    from kalle.cli.train import keys, nested
    from kalle.training import FlowVAETrainingConfig, LMTrainingConfig

    lines = [
        "# Configuration",
        "",
        "`kalle train`, `kalle encode` and `kalle evaluate` take `key=value` arguments. A key that does not exist is an error that",
    ]
    lines += ["names the valid ones; `???` must be given. `--cfg job` prints the whole configuration of one run.", ""]
    for stage, config in (("flowvae", FlowVAETrainingConfig), ("lm", LMTrainingConfig)):
        top, sections = [], {}
        for name, default, meaning, part in keys(config):
            if part is None:
                top.append((name, default, meaning))
            else:
                sections[name] = list(nested(name, part))
        lines += [f"## `kalle train {stage}`", "", *key_table(top)]
        for name, rows in sections.items():
            lines += [f"### `{name}` of `kalle train {stage}`", "", *key_table(rows)]
    for name in ("encode", "evaluate"):
        lines += [f"## `kalle {name}`", "", "```yaml", (configs() / f"{name}.yaml").read_text(encoding="utf-8").rstrip(), "```", ""]
    lines += ["## Groups", "", "`group=name` chooses a file, `group.key=value` changes one of its values.", ""]
    for path in sorted(configs().glob("*/*.yaml")):
        lines += [f"### `{path.parent.name}={path.stem}`", "", "```yaml", path.read_text(encoding="utf-8").rstrip(), "```", ""]
    return "\n".join(lines)


def configs() -> Path:
    """The folder of the configuration files."""
    return ROOT / "configs"


def python_pages() -> Iterator[tuple[str, str]]:
    """One page for the public names, and one for each room of the package; (path below reference/python, Markdown)."""
    import kalle

    package = ROOT / "src" / "kalle"
    lines = ["# Public names", ""]
    for name in kalle.__all__:
        if not name.startswith("_"):
            found = getattr(kalle, name)
            lines += [
                f"## kalle.{name}",
                "",
                f"::: {found.__module__}.{found.__qualname__}",
                "    options: {show_root_heading: false, heading_level: 3}",
                "",
            ]
    yield "index.md", "\n".join(lines)
    rooms = sorted(path for path in package.iterdir() if path.is_dir() and path.name != "cli" and (path / "__init__.py").exists())
    for room in rooms:
        modules = sorted(path for path in room.rglob("*.py") if not path.name.startswith("__"))
        lines = [f"# kalle.{room.name}", ""]
        for module in [room / "__init__.py", *modules]:
            name = ".".join(module.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
            lines += [f"::: {name}", "    options: {heading_level: 2, show_root_heading: true, show_submodules: false}", ""]
        yield f"{room.name}.md", "\n".join(lines)
    lines = ["# Modules at the top", ""]
    for module in sorted(path for path in package.glob("*.py") if not path.name.startswith("__")):
        lines += [f"::: kalle.{module.stem}", "    options: {heading_level: 2, show_root_heading: true}", ""]
    yield "top.md", "\n".join(lines)


def write(page: Path, text: str) -> None:
    """One page of build/docs."""
    path = SOURCE / page
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def assemble() -> None:
    """Write build/docs anew."""
    shutil.rmtree(SOURCE, ignore_errors=True)
    sources = [path for path in sorted(DOCS.rglob("*")) if path.is_file()] + [ROOT / name for name in PAGES]
    for path in sources:
        page = site_path(path)
        assert page is not None, path
        if path.suffix == ".md":
            write(page, with_math(relink(path.read_text(encoding="utf-8"), path, page)))
        elif path.suffix == ".ipynb":
            write(page, with_math(relink(notebook_page(path), path, page)))
        else:
            (SOURCE / page).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, SOURCE / page)
    write(Path("reference/commands.md"), commands_page())
    write(Path("reference/configuration.md"), configuration_page())
    for name, text in python_pages():
        write(Path("reference/python") / name, text)


def listed(node: Any) -> Iterator[str]:
    """The pages of a part of the navigation."""
    if isinstance(node, str):
        yield node
    else:
        for part in node.values() if isinstance(node, dict) else node:
            yield from listed(part)


def unlisted() -> list[str]:
    """The pages in build/docs that the navigation of mkdocs.yml leaves out: nobody would find them."""
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    return sorted({path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.md")} - set(listed(navigation)))


def main() -> None:
    """Assemble, and build with strict links."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assemble", action="store_true", help="write build/docs and stop")
    given = parser.parse_args()
    try:
        assemble()
    except BrokenLinkError as error:
        sys.exit(f"error: {error}")
    if unlisted():
        sys.exit(f"error: pages without a place: got {', '.join(unlisted())}, expected each in nav of mkdocs.yml; add them")
    if not given.assemble:
        tool = Path(sys.executable).with_name("zensical")
        sys.exit(subprocess.run([tool, "build", "--clean", "--strict"], cwd=ROOT, check=False).returncode)


if __name__ == "__main__":
    main()
