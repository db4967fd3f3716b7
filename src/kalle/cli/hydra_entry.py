"""The one place where Hydra is started."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig


def configs_dir() -> Path:
    """The configuration folder: inside the installed package, or beside ``src`` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parents[1] / "configs"):
        if candidate.is_dir():
            return candidate
    raise UserError(f"no configuration folder: looked in '{package / 'configs'}' and beside src; install the wheel or work in a checkout")


def run_hydra(function: Callable[[DictConfig], Any], config_name: str, overrides: list[str]) -> int:
    """Hand ``overrides`` (also -m, --cfg, --help and launchers) to a ``@hydra.main`` around ``function``.

    A key that does not exist is a UserError that lists the valid ones.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    problems: list[UserError] = []

    def job(job_config: DictConfig) -> Any:
        try:
            return function(job_config)
        except UserError as error:
            # Hydra would print a line of its own before passing it on, and the rule is one line.
            problems.append(error)
            return None

    entry = hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=config_name)(job)
    before = sys.argv
    sys.argv = [f"kalle {config_name}", *overrides]
    try:
        with _errors_propagate():
            entry()
    except (HydraException, OmegaConfBaseException) as error:
        raise _readable(error, config_name, overrides) from None
    finally:
        sys.argv = before
    if problems:
        raise problems[0]
    return 0


def folder_override(overrides: list[str], key: str) -> list[str]:
    """``overrides`` with ``key=DIR`` spelt out as ``key.folder=DIR``: Hydra would take DIR for a choice in the group of that name."""
    short = f"{key}="
    return [f"{key}.folder={word.removeprefix(short)}" if word.startswith(short) else word for word in overrides]


class _errors_propagate:
    """Hydra prints errors and exits unless HYDRA_FULL_ERROR is set; we want the exception, and the environment back afterwards."""

    def __enter__(self) -> None:
        import os

        self.before = os.environ.get("HYDRA_FULL_ERROR")
        os.environ["HYDRA_FULL_ERROR"] = "1"

    def __exit__(self, *_: object) -> None:
        import os

        if self.before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = self.before


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a configuration without running anything."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    with initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
        try:
            return hydra_compose(config_name, overrides)
        except (HydraException, OmegaConfBaseException) as error:
            raise _readable(error, config_name, overrides) from None


def _readable(error: Exception, config_name: str, overrides: list[str]) -> UserError:
    first = str(error.__cause__ or error).splitlines()[0]
    text = " ".join(str(error).splitlines()[:1])
    match = re.search(r"Key '([^']+)' is not in struct", str(error.__cause__ or "")) or re.search(
        r"Could not override '([^']+)'", str(error)
    )
    if match is None:
        return UserError(f"configuration {config_name}: {text}; see `--cfg job` for the whole configuration")
    wanted = next((o.split("=")[0].lstrip("+~") for o in overrides if match[1] in o.split("=")[0]), match[1])
    return UserError(f"unknown configuration key: got '{wanted}', expected one of: {', '.join(_siblings(config_name, wanted))} ({first})")


def _siblings(config_name: str, key: str) -> list[str]:
    """The valid keys at the deepest existing level of ``key``."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import DictConfig

    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
        node: Any = hydra_compose(config_name)
    prefix: list[str] = []
    for part in key.split(".")[:-1]:
        if not isinstance(node, DictConfig) or part not in node or not isinstance(node._get_node(part), DictConfig):
            break
        node = node._get_node(part)
        prefix.append(part)
    return [".".join([*prefix, str(name)]) for name in node if str(name) != "_target_"]
