"""The optional parts of the package: which packages each needs, how to install what is missing; the processor and the commit."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

from kalle.errors import UserError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

DISTRIBUTION = "kalle-tts"
FOR_DEVELOPERS = frozenset({"dev", "docs"})
MODULES = {"hydra-core": "hydra", "hydra-submitit-launcher": "hydra_plugins"}
"""Packages whose module has another name than the package with hyphens as underscores."""


def requirements() -> dict[str, list[Requirement]]:
    """The requirements of each extra, under "" those of the core; empty where kalle was never installed."""
    from packaging.requirements import Requirement

    installed = _installed()
    needed: dict[str, list[Requirement]] = {}
    for line in (installed.requires if installed is not None else None) or []:
        requirement = Requirement(line)
        extras = installed.metadata.get_all("Provides-Extra") or [] if installed is not None else []
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            needed.setdefault("", []).append(requirement)
            continue
        for extra in extras:
            if requirement.marker.evaluate({"extra": extra}):
                needed.setdefault(extra, []).append(requirement)
    return needed


def install_command(extra: str) -> str:
    """The command that adds ``extra`` to this installation: to a checkout, a wheel, or a release of an index."""
    installed = _installed()
    origin = json.loads((installed.read_text("direct_url.json") or "{}") if installed is not None else "{}")
    url = str(origin.get("url", ""))
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        return "pip install -e '.[{}]'{}".format(extra, "" if Path.cwd() == checkout else f" in {checkout}")
    return f"pip install '{DISTRIBUTION}[{extra}] @ {url}'" if url else f"pip install '{DISTRIBUTION}[{extra}]'"


def require(module: str, extra: str, purpose: str) -> None:
    """A UserError that says how to install ``extra`` when ``module``, which ``purpose`` needs, is missing."""
    if importlib.util.find_spec(module) is None:
        raise UserError(f"{purpose} needs the package {module}, which is not installed: run {install_command(extra)}")


def missing_extra(module: str) -> UserError | None:
    """The error for a ``module`` that was not found, where an extra brings it; None for others."""
    top = module.partition(".")[0]
    for extra, needed in requirements().items():
        if extra and extra not in FOR_DEVELOPERS and any(module_of(requirement.name) == top for requirement in needed):
            return UserError(f"this needs the package {top}, which is not installed: run {install_command(extra)}")
    return None


def module_of(package: str) -> str:
    """The name under which ``package`` is imported."""
    return MODULES.get(package.lower(), package.lower().replace("-", "_"))


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    rows = info.read_text(encoding="utf-8", errors="replace").splitlines() if info.is_file() else []
    names = [row.partition(":")[2].strip() for row in rows if row.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def checkout_commit() -> str | None:
    """The commit of the checkout that this package runs from, with "+" where files of it were changed; None elsewhere."""
    here = Path(__file__)

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # the checkout of somebody else may hold the environment
        return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _installed() -> Distribution | None:
    try:
        return distribution(DISTRIBUTION)
    except PackageNotFoundError:
        return None
