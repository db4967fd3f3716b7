"""`kalle train … --help`: every key with its default, and what the dataclasses say of it."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import shutil
import textwrap
import typing
from collections.abc import Iterator
from typing import Any

FLAG, ALL = "--help", "--help-all"
_MOST_USED = ("data",)
"""Sections whose keys are explained without --help-all."""


def help_text(stage: str, everything: bool) -> str:
    """The help of ``kalle train STAGE``: top-level keys, those of the most used sections, and with ``everything`` all the others."""
    from kalle.cli.hydra_entry import configs_dir
    from kalle.training import FlowVAETrainingConfig, LMTrainingConfig

    cls = FlowVAETrainingConfig if stage == "flowvae" else LMTrainingConfig
    source = "data.corpus" if stage == "flowvae" else "data.latents"
    files = sorted(path for path in configs_dir().glob("*/*.yaml") if _belongs(path.parent.name, path.stem, stage))
    groups: dict[str, list[str]] = {}
    for path in files:
        groups.setdefault(path.parent.name, []).append(path.stem)
    groups["scheduler"] = ["warmup_cosine", "exponential"]
    lines = [f"usage: kalle train {stage} {source}=DIR out=DIR [KEY=VALUE ...] [--dry-run] [-m] [--cfg job] [{ALL}]", ""]
    lines += [f"{group}={'|'.join(names)}" for group, names in sorted(groups.items())]
    lines.append("")
    rest: dict[str, list[str]] = {}
    for name, default, doc, part in keys(cls):
        if part is None:
            lines += _entry(name, default, doc, everything)
        elif everything or name in _MOST_USED:
            explained = [key for key in nested(name, part) if everything or key[0].count(".") == 1]
            lines += [line for key in explained for line in _entry(*key, everything)]
        else:
            rest[name] = [key.removeprefix(f"{name}.") for key, _, _ in nested(name, part)]
    if rest:
        lines += ["", f"{ALL} explains these too:"]
    for name, found in rest.items():
        lines += textwrap.wrap(f"{name}. {' '.join(found)}", _width(), subsequent_indent="  ", break_on_hyphens=False)
    return "\n".join(lines) + "\n"


def keys(cls: type) -> Iterator[tuple[str, str, str, type | None]]:
    """Name, default, explanation and, where it is one, the dataclass of each field of ``cls``."""
    hints, documented = typing.get_type_hints(cls), _docs(cls)
    for field in dataclasses.fields(cls):
        choices = (hints[field.name], *typing.get_args(hints[field.name]))
        part: Any = next((choice for choice in choices if dataclasses.is_dataclass(choice)), None)
        default: Any = None if field.default is dataclasses.MISSING else field.default
        if part is None and dataclasses.is_dataclass(default):
            part = type(default)
        yield field.name, _written(default, field.default is dataclasses.MISSING), documented.get(field.name, ""), part


def nested(prefix: str, cls: type) -> Iterator[tuple[str, str, str]]:
    """`keys` of ``cls`` and of the dataclasses in it, by their dotted names."""
    for name, default, doc, part in keys(cls):
        if part is None:
            yield f"{prefix}.{name}", default, doc
        else:
            yield from nested(f"{prefix}.{name}", part)


def _docs(cls: type) -> dict[str, str]:
    """The docstring below each field, those of base classes included."""
    found: dict[str, str] = {}
    for base in reversed([each for each in cls.__mro__ if dataclasses.is_dataclass(each)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0]
        assert isinstance(body, ast.ClassDef)
        for statement, after in zip(body.body, body.body[1:], strict=False):
            if not isinstance(statement, ast.AnnAssign) or not isinstance(statement.target, ast.Name):
                continue
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                found[statement.target.id] = " ".join(str(after.value.value).split())
    return found


def _written(value: Any, missing: bool) -> str:
    if missing:
        return "???"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"[{','.join(_written(each, False) for each in value)}]" if isinstance(value, tuple) else f"{value}"


def _entry(name: str, default: str, doc: str, everything: bool) -> list[str]:
    """One line, cut to the terminal unless ``everything`` is wanted."""
    key = f"{name}={default}"
    if not doc:
        return [key]
    if everything:
        return textwrap.wrap(f"{key:<34} {doc}", _width(), subsequent_indent=35 * " ", break_on_hyphens=False)
    line = f"{key:<34} {doc}"
    return [line if len(line) <= _width() else f"{line[: _width() - 1].rstrip()}…"]


def _width() -> int:
    return max(80, shutil.get_terminal_size().columns)


def _belongs(group: str, option: str, stage: str) -> bool:
    other = "lm" if stage == "flowvae" else "flowvae"
    groups = {"flowvae": ("flowvae", "mel_loss"), "lm": ("lm", "tokenizer", "data")}[stage]
    if group == "experiment":
        return other not in option.split("_") and not (stage == "flowvae" and option in ("sft", "lora"))
    return group in groups or group == "trainer"
