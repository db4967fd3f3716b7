"""Which packages are installed, in which versions, and whether they can be imported."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from kalle.cli.doctor_findings import Finding

DISTRIBUTION = "kalle-tts"
OLDEST_PYTHON = (3, 11)
FOR_DEVELOPERS = ("dev",)
IMPORT_NAMES = {"hydra-core": "hydra", "huggingface-hub": "huggingface_hub", "hibari-tts": "hibari.g2p"}
"""Packages whose module has another name than the package, with hyphens as underscores."""
NOT_IMPORTED = ("setuptools",)
IMPORT_SECONDS = 300
_MARK = "imported:"
_IMPORT = f"""
import importlib, json, sys
for name in sys.argv[1:]:
    try:
        importlib.import_module(name)
        problem = None
    except BaseException as error:
        problem = f"{{type(error).__name__}}: {{error}}"
    print({_MARK!r} + json.dumps([name, problem]), flush=True)
"""
# Nothing that is imported only to see whether it works should look for news on the network.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "GRADIO_ANALYTICS_ENABLED": "False", "WANDB_MODE": "offline", "NO_ALBUMENTATIONS_UPDATE": "1"}
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*([^;]*?)\s*(?:;.*extra\s*==\s*['\"]([^'\"]+)['\"].*)?$")


def python_findings() -> Iterator[Finding]:
    """The interpreter, the system and kalle itself."""
    from kalle import __version__

    fine = sys.version_info >= OLDEST_PYTHON
    oldest = ".".join(map(str, OLDEST_PYTHON))
    remedy = None if fine else f"install Python {oldest} or newer and make the environment again"
    yield Finding("versions", "kalle", __version__)
    yield Finding("versions", "python", platform.python_version(), "ok" if fine else "problem", remedy, essential=True)
    yield Finding("versions", "system", f"{platform.system()} {platform.release()} {platform.machine()}")


def requirements() -> dict[str, dict[str, str]]:
    """What kalle needs: {extra ("" for the core): {package: version specifier}}; empty where kalle was never installed."""
    found: dict[str, dict[str, str]] = {}
    try:
        lines = importlib.metadata.requires(DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is not None:
            package, specifier, extra = match.groups()
            found.setdefault(extra or "", {})[package.lower()] = specifier
    return found


def tested_versions() -> dict[str, str]:
    """The set of versions that was tested, where the source tree with its constraints.txt is at hand."""
    import kalle

    path = Path(kalle.__file__).resolve().parents[2] / "constraints.txt"
    if not path.is_file():
        return {}
    pairs = (line.split("==") for line in path.read_text(encoding="utf-8").splitlines() if "==" in line)
    return {name.strip().lower(): version.strip() for name, version in pairs}


def core_findings() -> Iterator[Finding]:
    """Every package that speaking needs."""
    needed = requirements().get("", {})
    if not needed:
        yield Finding("versions", DISTRIBUTION, "not installed as a package, so its requirements are not known", "note", "pip install -e .")
    yield from _package_findings("versions", needed, f"pip install -U {DISTRIBUTION}", True, import_problems(_modules(needed)))


def extra_findings(quick: bool) -> Iterator[Finding]:
    """Every package of the optional parts; ``quick`` doesn't try to import them, which takes seconds."""
    for extra, packages in requirements().items():
        if extra and extra not in FOR_DEVELOPERS:
            problems = {} if quick else import_problems(_modules(packages))
            found = list(_package_findings(extra, packages, f"pip install '{DISTRIBUTION}[{extra}]'", False, problems))
            yield _summary(extra, found, quick)
            yield from (finding for finding in found if finding.status != "ok")


def import_problems(modules: Sequence[str]) -> dict[str, str | None]:
    """For each module why it can't be imported, or None; each in turn in a process of its own, which a broken library may crash."""
    found: dict[str, str | None] = {}
    left = list(modules)
    while left:
        said, ending = _import(left)
        found |= said
        left = [name for name in left if name not in said]
        if left:
            found[left.pop(0)] = ending
    return found


def _import(modules: Sequence[str]) -> tuple[dict[str, str | None], str]:
    """What the process said of each module before it ended, and how it ended."""
    command = [sys.executable, "-P", "-c", _IMPORT, *modules]
    try:
        result = subprocess.run(command, capture_output=True, text=True, env=os.environ | _OFFLINE, timeout=IMPORT_SECONDS, check=False)
        output, ending = result.stdout, f"the import ended the process with exit code {result.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else (error.stdout or "")
        ending = f"the import took more than {IMPORT_SECONDS} s"
    lines = (line.removeprefix(_MARK) for line in output.splitlines() if line.startswith(_MARK))
    return dict(json.loads(line) for line in lines), ending


def _modules(packages: dict[str, str]) -> list[str]:
    installed = [name for name in packages if name not in NOT_IMPORTED and _version(name) is not None]
    return [_module(name) for name in installed]


def _module(package: str) -> str:
    return IMPORT_NAMES.get(package, package.replace("-", "_"))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_findings(
    section: str, packages: dict[str, str], install: str, essential: bool, problems: dict[str, str | None]
) -> Iterator[Finding]:
    tested = tested_versions()
    for package, specifier in packages.items():
        version, broken = _version(package), problems.get(_module(package))
        if version is None:
            yield Finding(section, package, "missing", "problem", install, essential)
        elif broken is not None:
            value = f"{version}, cannot be imported: {' '.join(broken.split())[:200]}"
            yield Finding(section, package, value, "problem", f"pip install --force-reinstall {package}", essential)
        elif not _allowed(version, specifier):
            yield Finding(section, package, f"{version}, expected {specifier}", "problem", f"pip install '{package}{specifier}'", essential)
        elif package in tested and tested[package] != version:
            value = f"{version} (tested with {tested[package]})"
            yield Finding(section, package, value, "note", "if something fails: pip install -c constraints.txt -e .")
        else:
            yield Finding(section, package, version)


def _allowed(version: str, specifier: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(specifier).contains(version, prereleases=True)


def _summary(extra: str, found: list[Finding], quick: bool) -> Finding:
    problems = [finding for finding in found if finding.status == "problem"]
    if not problems:
        return Finding("optional parts", extra, "installed, not imported (--quick)" if quick else "works")
    if all(finding.value == "missing" for finding in found):
        return Finding("optional parts", extra, "not installed", "note", problems[0].remedy)
    return Finding("optional parts", extra, f"{len(problems)} of {len(found)} packages are missing or broken", "note")
