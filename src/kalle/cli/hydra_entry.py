"""The one place where Hydra is started."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import sys
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

Part = TypeVar("Part")


def configs_dir() -> Path:
    """The configuration folder: inside the installed package, or beside ``src`` in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "configs", package.parents[1] / "configs"):
        if candidate.is_dir():
            return candidate
    raise UserError(f"no configuration folder: looked in '{package / 'configs'}' and beside src; install the wheel or work in a checkout")


def node_of(value: Any) -> Any:
    """``value`` as a configuration that builds it again; a dataclass gives its defaults, ``???`` where it has none."""
    from kalle.training.config import plain_values

    if isinstance(value, type):
        hints = typing.get_type_hints(value)
        values = {field.name: _default(field, hints[field.name]) for field in dataclasses.fields(value) if field.init}
        return {"_target_": f"{value.__module__}.{value.__qualname__}", **values}
    if dataclasses.is_dataclass(value):
        values = {field.name: node_of(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"_target_": f"{type(value).__module__}.{type(value).__qualname__}", **values}
    return plain_values(value)


def _default(field: dataclasses.Field[Any], hint: Any) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return node_of(field.default_factory())
    if field.default is not dataclasses.MISSING:
        return node_of(field.default)
    return node_of(hint) if dataclasses.is_dataclass(hint) else "???"


def name_classes(config: DictConfig, cls: type) -> None:
    """Give the objects of ``config`` that stand in place of null the class that the fields of ``cls`` have; the others have theirs."""
    from omegaconf import DictConfig, open_dict

    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        node = config._get_node(field.name) if field.name in config else None
        classes = [choice for choice in (hints[field.name], *typing.get_args(hints[field.name])) if dataclasses.is_dataclass(choice)]
        if not isinstance(node, DictConfig) or node._is_none() or len(classes) != 1:
            continue
        if "_target_" not in node:
            with open_dict(node):
                node["_target_"] = node_of(classes[0])["_target_"]
        name_classes(node, typing.cast(type, classes[0]))


@functools.cache
def register_defaults() -> None:
    """Put the defaults of the dataclasses of a training where Hydra looks for configurations; configs/ names only differences."""
    from hydra.core.config_store import ConfigStore

    from kalle.models.flowvae import FlowVAEConfig
    from kalle.models.lm import KalleLMConfig
    from kalle.models.lora import LoRAConfig
    from kalle.training import config as training
    from kalle.training.optimisation import Exponential, WarmupCosine

    store = ConfigStore.instance()
    chosen_by_file = {"flowvae": ("flowvae", "mel_loss", "scheduler"), "lm": ("lm", "tokenizer", "scheduler", "lora")}
    for stage, cls in (("flowvae", training.FlowVAETrainingConfig), ("lm", training.LMTrainingConfig)):
        store.store(f"{stage}_training", {key: value for key, value in node_of(cls).items() if key not in chosen_by_file[stage]})
    for group, name, part in (
        ("flowvae", "base", FlowVAEConfig), ("lm", "base", KalleLMConfig), ("lora", "default", LoRAConfig),
        ("scheduler", "warmup_cosine", WarmupCosine), ("scheduler", "exponential", Exponential),
    ):  # fmt: skip
        store.store(name, node_of(part), group)


def run_hydra(function: Callable[[DictConfig], Any], config_name: str, overrides: list[str]) -> int:
    """Hand ``overrides`` (also -m, --cfg and launchers; --help prints the keys) to a ``@hydra.main`` around ``function``.

    A key that does not exist, or a value that a part refuses, is a UserError.
    """
    if any(word in ("-h", "--help") for word in overrides):
        sys.stdout.write(keys_with_comments(config_name))
        return 0

    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if config_name.startswith("train_"):
        register_defaults()
    _check_words(overrides)
    job = _Job(function)
    many = any(word in ("-m", "--multirun") for word in overrides)
    if many:
        # Hydra's parser wants all overrides in one row, so the flag, wherever it was written, goes before them.
        overrides = ["--multirun", *folder_per_job([word for word in overrides if word not in ("-m", "--multirun")])]
    entry = hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=config_name)(SweepJob(function) if many else job)
    before = sys.argv
    sys.argv = [f"kalle {config_name}", *overrides]
    try:
        with _errors_propagate():
            entry()
        if job.error is not None:
            raise job.error
    except (HydraException, OmegaConfBaseException) as error:
        raise readable(error, config_name, overrides) from None
    except (ValueError, AssertionError) as error:
        if many or isinstance(error, UserError) or error is job.error:
            raise
        raise readable(error, config_name, overrides) from None  # Hydra's own, for logger=null and its kind
    except SystemExit as end:  # --help and its kind
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = before
    return 0


def _check_words(overrides: list[str]) -> None:
    """A UserError for a word that gives a value to no key, which Hydra asserts is none."""
    for word in overrides:
        key = word.partition("=")[0].lstrip("+~").partition("@")[0]
        if not key.strip():
            raise UserError(f"bad override: got '{word}', expected KEY=VALUE; `--help` shows the keys")


def keys_with_comments(config_name: str) -> str:
    """The file of a configuration with its comments, without what only Hydra reads."""
    text = (configs_dir() / f"{config_name}.yaml").read_text(encoding="utf-8")
    return re.sub(r"^(defaults|hydra):.*\n(?:[ -].*\n)*\n?", "", text, flags=re.MULTILINE)


def folder_override(overrides: list[str], name: str) -> list[str]:
    """``overrides`` with ``name=DIR`` spelt out as ``name.folder=DIR``: Hydra takes ``name=`` for a choice in the group of that name."""
    return [f"{name}.folder={word.removeprefix(f'{name}=')}" if word.startswith(f"{name}=") else word for word in overrides]


def folder_per_job(overrides: list[str]) -> list[str]:
    """``overrides`` of a sweep with the one folder ``out=DIR`` replaced by DIR/0, DIR/1, …: two runs in a folder would continue each other.

    An ``out`` that is swept itself or made of references stays as it is.
    """
    given = [word for word in overrides if word.startswith("out=")]
    if len(given) != 1 or "," in given[0] or "${" in given[0]:
        return overrides
    folder = given[0].removeprefix("out=")
    words = [f"out={folder}/${{hydra:job.num}}" if word is given[0] else word for word in overrides]
    return words if any(word.startswith("hydra.sweep.dir=") for word in words) else [*words, f"hydra.sweep.dir={folder}"]


class SweepJob:
    """One job of a sweep. What it returns may have to come from another machine, so only the run's metrics do, not its trainer."""

    def __init__(self, function: Callable[[DictConfig], Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function

    def __call__(self, config: DictConfig) -> dict[str, float] | None:
        """Run; returns the metrics of a training."""
        import logging

        logging.getLogger().setLevel(logging.INFO)  # a launcher's process has not been set up by the command line
        metrics = getattr(self.function(config), "metrics", None)
        return {str(name): float(value) for name, value in metrics.items() if isinstance(value, float)} if metrics else None


class _Job:
    """Keeps the exception of a single run, for Hydra would print all overrides before it lets it go.

    Not for sweeps, whose launchers may send the function to another machine.
    """

    def __init__(self, function: Callable[[DictConfig], Any]) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.error: Exception | None = None
        self.command = list(sys.argv)

    def __call__(self, config: DictConfig) -> Any:
        # With several devices, Lightning starts the other processes by this process's own command.
        hydras, sys.argv = sys.argv, self.command
        try:
            return self.function(config)
        except Exception as error:
            self.error = error
            return None
        finally:
            sys.argv = hydras


@contextmanager
def _errors_propagate() -> Iterator[None]:
    """Hydra prints errors and exits unless HYDRA_FULL_ERROR is set; we want the exception, and the environment back afterwards."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HYDRA_FULL_ERROR"]
        else:
            os.environ["HYDRA_FULL_ERROR"] = before


def part(cls: type[Part], values: Any, key: str = "") -> Part:
    """``cls``, a dataclass, with ``values`` for its fields; ``key`` is what the configuration calls it, empty for the whole.

    UserError for values that are no object, for one that it has no field for, and for a field without a value.
    """
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    if not isinstance(values, dict):
        raise _no_object(key, values)
    names = {str(name): f"{key}.{name}" if key else str(name) for name in [*fields, *values]}
    unknown = [names[str(name)] for name in values if name not in fields]
    if unknown:
        raise UserError(
            f"unknown configuration key: got '{unknown[0]}', expected one of: {', '.join(names[name] for name in fields)}; correct it"
        )
    none = dataclasses.MISSING
    needed = [names[name] for name, field in fields.items() if field.default is none and field.default_factory is none]
    missing = [name for name in needed if name.removeprefix(f"{key}.") not in values]
    if missing:
        raise UserError(f"no value for {', '.join(missing)}: expected one in the command; add {missing[0]}=…")
    return cls(**values)


def _no_object(key: str, got: Any) -> UserError:
    return UserError(f"{key}: got {got}, expected an object {{...}}; set one key in it, as {key}.KEY=VALUE")


def _no_list(key: str, got: Any) -> UserError:
    return UserError(f"{key}: got {got}, expected a list [...]; correct it")


def compose(config_name: str, overrides: list[str]) -> DictConfig:
    """Compose a configuration without running anything."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    if config_name.startswith("train_"):
        register_defaults()
    _check_words(overrides)
    with initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
        try:
            return hydra_compose(config_name, overrides)
        except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:  # the last two for trainer=null and its kind
            raise readable(error, config_name, overrides) from None


def readable(error: Exception, config_name: str, overrides: list[str]) -> Exception:
    """Translate an error of Hydra for the user: a UserError, or ``error`` itself where it wraps a bug of ours."""
    causes = _causes(error)
    for cause in causes:
        if isinstance(cause, UserError):
            return cause
    text = "\n".join(map(str, causes))
    key = re.search(r"is not in struct\n\s*full_key: (\S+)", text) or re.search(r"Could not override '([^']+)'", text)
    if key is not None:
        return _unknown(key[1], config_name, overrides)
    if "Config group override must be" in text:
        for group, _, value in (word.lstrip("+").partition("=") for word in overrides):
            if (names := _choices(group)) and value not in names:
                return _unknown_choice(f"{group}/{value}", "")
    choice = re.search(r"Could not (?:find|load) '([^']+)'", text)
    if choice is not None:
        return _unknown_choice(choice[1], text)
    merged = re.search(r"Cannot merge \w+ with \w+\s+full_key: (\S+)\s+object_type=(\w+)", text)
    if merged is not None:
        given = next((word.partition("=")[2] for word in overrides if word.lstrip("+").startswith(f"{merged[1]}=")), "another type")
        return _no_list(merged[1], given) if merged[2] == "list" else _no_object(merged[1], given)
    missing = re.search(r"Missing mandatory value: (\S+)", text)
    if missing is not None:
        return UserError(f"no value for {missing[1]}: expected one in the command; add {missing[1]}=…")
    if type(error).__name__ == "InstantiationException":
        last = causes[-1]
        if not isinstance(last, ValueError | TypeError) and "Misconfiguration" not in type(last).__name__:
            return error
        path = re.search(r"full_key: (\S+)", str(error))
        added = re.search(r"unexpected keyword argument '(\w+)'", str(last))
        if added is not None:  # with +, which Hydra lets pass
            name = f"{path[1]}.{added[1]}" if path else added[1]
            return UserError(
                f"unknown configuration key: got '{name}', expected one of: {_valid(config_name, name, overrides)}; correct it"
            )
        part = path or re.search(r"target '([^']+)'", str(error))
        return UserError(f"configuration {config_name}: {part[1] if part else 'a part'} refuses its values: {last}; correct them")
    return UserError(f"configuration {config_name}: {' '.join(str(error).split())}; see `--cfg job` for the whole configuration")


def _unknown_choice(path: str, text: str) -> UserError:
    """``path`` is GROUP/NAME, for which Hydra found no file; ``text`` is its message, which may list the names that there are."""
    listed = re.search(r"Available options in '([^']+)':\n((?:\t.*\n?)+)", text)
    group = listed[1] if listed else path.partition("/")[0]
    names = listed[2].split() if listed else _choices(group)
    name = path.removeprefix(group).removeprefix("/")
    if not names:
        return UserError(f"no configuration: got '{path}', expected a file of that name in the configuration folder; correct the command")
    return UserError(f"{group}: got '{name}', expected one of {', '.join(names)}; correct it")


def _choices(group: str) -> list[str]:
    """The names of ``group``, in the configuration folder and among the defaults of the dataclasses."""
    from hydra.core.config_store import ConfigStore

    with suppress(OSError):
        stored = ConfigStore.instance().list(group)
        return sorted({name.removesuffix(".yaml") for name in stored} | {file.stem for file in (configs_dir() / group).glob("*.yaml")})
    return sorted(file.stem for file in (configs_dir() / group).glob("*.yaml"))


def _unknown(key: str, config_name: str, overrides: list[str]) -> UserError:
    node, prefix, following = _deepest(config_name, key, overrides)
    if following is not None and _is_object(config_name, [*prefix, following]):  # an experiment may have set one to null
        value = next((word.partition("=")[2] for word in overrides if word.lstrip("+").startswith(f"{key}=")), "…")
        for name in reversed(key.split(".")[len(prefix) + 1 :]):
            value = f"{{{name}: {value}}}"
        parent = ".".join([*prefix, following])
        return UserError(f"{parent} is null in this configuration: got {key}, expected the whole of it; give {parent}={value}")
    return UserError(f"unknown configuration key: got '{key}', expected one of: {_listed(node, prefix)}; correct it")


def _causes(error: BaseException) -> list[BaseException]:
    """``error`` and what it was raised from, outermost first."""
    chain: list[BaseException] = []
    following: BaseException | None = error
    while following is not None and following not in chain:
        chain.append(following)
        following = following.__cause__ or following.__context__
    return chain


def _is_object(config_name: str, names: list[str]) -> bool:
    """Whether the dataclass of a training has an object at ``names``, which may be null."""
    from kalle.training import FlowVAETrainingConfig, LMTrainingConfig

    found: Any = {"train_flowvae": FlowVAETrainingConfig, "train_lm": LMTrainingConfig}.get(config_name)
    for name in names:
        hint = typing.get_type_hints(found).get(name) if found is not None else None
        found = next((choice for choice in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(choice)), None)
    return found is not None


def _valid(config_name: str, key: str, overrides: list[str]) -> str:
    """The valid keys at the deepest existing level of ``key``, under the groups that ``overrides`` choose."""
    node, prefix, _ = _deepest(config_name, key, overrides)
    return _listed(node, prefix)


def _listed(node: DictConfig, prefix: list[str]) -> str:
    return ", ".join(".".join([*prefix, str(name)]) for name in node if str(name) != "_target_")


def _deepest(config_name: str, key: str, overrides: list[str]) -> tuple[DictConfig, list[str], str | None]:
    """The deepest existing object on the way to ``key``, under the groups that ``overrides`` choose, its place, and the part of ``key``
    that is null in it, where one is."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig

    GlobalHydra.instance().clear()
    groups = [word for word in overrides if (configs_dir() / word.split("=")[0].lstrip("+")).is_dir()]
    with initialize_config_dir(version_base="1.3", config_dir=str(configs_dir())):
        node: Any = None
        for words in ([*groups, *(word for word in overrides if word.endswith("=null"))], groups, []):
            with suppress(HydraException, ValueError, AssertionError):
                node = hydra_compose(config_name, words)
                break
    prefix: list[str] = []
    for part in key.split(".")[:-1]:
        child = node._get_node(part) if part in node else None
        if not isinstance(child, DictConfig) or child._is_none():
            return node, prefix, part if child is not None and child._is_none() else None
        node = child
        prefix.append(part)
    return node, prefix, None
