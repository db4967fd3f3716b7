"""`kalle train flowvae|lm`: composes a configuration and calls `kalle.training`; its help, and the processes of several ranks."""

from __future__ import annotations

import ast
import atexit
import contextlib
import dataclasses
import inspect
import logging
import os
import shutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.training import FlowVAETrainingConfig, LMTrainingConfig, Plan, TrainingResult

logger = logging.getLogger(__name__)

STAGES = ("flowvae", "lm")
DRY_RUN = "--dry-run"
USAGE = """usage: kalle train flowvae data.corpus=DIR out=DIR [KEY=VALUE ...] [--dry-run]
       kalle train lm data.latents=DIR out=DIR [flowvae=DIR] [KEY=VALUE ...] [--dry-run]

--dry-run checks configuration, data and shapes, estimates memory, steps and disk, and writes nothing.

`kalle train flowvae --help` and `kalle train lm --help` list the keys, --help-all explains every one; --cfg job prints the
configuration of a run.
"""


def run(overrides: list[str]) -> int:
    """The first word names the stage; the rest are Hydra overrides. Returns the exit status."""
    from kalle.cli.hydra_entry import folder_override, run_hydra

    if overrides and overrides[0] in ("-h", "--help"):
        sys.stdout.write(USAGE)
        return 0
    if not overrides or overrides[0] not in STAGES:
        got = repr(overrides[0]) if overrides else "nothing"
        raise UserError(
            f"kalle train: got {got}, expected one of {', '.join(STAGES)} and then Hydra overrides such as trainer.max_steps=1000"
        )
    if any(word in ("-h", FLAG, ALL) for word in overrides):
        sys.stdout.write(help_text(overrides[0], ALL in overrides))
        return 0
    stage, words = overrides[0], [word for word in overrides[1:] if word != DRY_RUN]
    if stage == "lm":
        words = folder_override(words, "flowvae")
    return run_hydra(dry_run if DRY_RUN in overrides else train, f"train_{stage}", words)


def train(config: DictConfig) -> TrainingResult:
    """Train as ``config`` (configs/train_flowvae.yaml or train_lm.yaml) says, in as many processes as ``trainer.devices`` requests."""
    from kalle.training import FlowVAETrainingConfig, train_flowvae, train_lm
    from kalle.training.checkpointing import Preempted

    built = training_config(config)
    start_ranks(built.device, built.trainer.devices)
    try:
        if isinstance(built, FlowVAETrainingConfig):
            return train_flowvae(built, metrics=reconstruction_metrics(built))
        return train_lm(built)
    except Preempted as preempted:
        logger.info("%s; saved, run the same command again to continue", preempted)
        raise SystemExit(preempted.exit_code) from None
    except RuntimeError as error:
        if lost_peer(error):
            raise UserError("another rank has ended: expected all to continue; see its message, then run the same command again") from None
        raise


def dry_run(config: DictConfig) -> Plan:
    """Print what `train` would do, and write nothing."""
    from kalle.training import FlowVAETrainingConfig, plan_flowvae, plan_lm

    built = training_config(config)
    plan = plan_flowvae(built) if isinstance(built, FlowVAETrainingConfig) else plan_lm(built)
    counts = f"{plan.parameters / 1e6:.1f} M parameters, {plan.trained / 1e6:.1f} M trained, {plan.precision}"
    sys.stdout.write(f"kalle train {plan.stage}: {counts}\n" + "\n".join(plan.lines()) + "\ndry run: nothing was trained or written\n")
    return plan


def training_config(config: DictConfig) -> FlowVAETrainingConfig | LMTrainingConfig:
    """The dataclass that a composed ``config`` describes; a UserError for a missing value or one of the wrong type."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from kalle.cli.hydra_entry import name_classes, readable
    from kalle.training import FlowVAETrainingConfig, LMTrainingConfig

    stage = "lm" if "lm" in config else "flowvae"
    try:
        name_classes(config, LMTrainingConfig if stage == "lm" else FlowVAETrainingConfig)
        missing = sorted(OmegaConf.missing_keys(config), key=lambda name: (name.count("."), name))
        if missing:
            raise UserError(f"no value for {', '.join(missing)}: expected a folder; add {missing[0]}=DIR to the command")
        built: FlowVAETrainingConfig | LMTrainingConfig = instantiate(config, _convert_="all")
    except (InstantiationException, OmegaConfBaseException) as error:
        raise readable(error, f"train_{stage}", []) from None
    return built


def reconstruction_metrics(config: FlowVAETrainingConfig) -> Mapping[str, Any]:
    """The metrics of evaluation that ``callbacks.metrics.names`` means; one that is not installed is named in a warning and left out."""
    from kalle.evaluation.metrics import PESQ, RATE_HZ, STOI, ScoreItem

    makers: dict[str, Callable[[], Any]] = {"stoi": STOI, "pesq_wb": lambda: PESQ("wb"), "pesq_nb": lambda: PESQ("nb")}
    wanted = () if config.callbacks.metrics is None else config.callbacks.metrics.names
    unknown = [name for name in wanted if name not in makers]
    if unknown:
        raise UserError(f"callbacks.metrics.names: got {unknown[0]!r}, expected some of {', '.join(makers)}; correct it")
    if wanted and config.flowvae.sample_rate != RATE_HZ:
        logger.warning("no %s in validation: they are defined at %d Hz, not %d", ", ".join(wanted), RATE_HZ, config.flowvae.sample_rate)
        return {}

    def scorer(name: str) -> Any:
        metric = makers[name]()
        return lambda recording, audio: float(metric(ScoreItem("", audio, "", recording=recording, aligned=True))[name])

    found = {}
    for name in wanted:
        try:
            found[name] = scorer(name)
        except UserError as error:
            logger.warning("no %s in validation: %s", name, error)
    return found


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


FIRST_RANK_SPEAKS_SECONDS = 2.0
"""How long another rank holds back its message: rank 0 reports a mistake that all ranks find, and its exit stops the others."""
PEER_SECONDS = 10.0
"""How long a rank whose peer is gone waits to be ended, so that only the peer's message is seen; also the grace after a signal."""
_POLL_SECONDS = 0.2
_PEER_WORDS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection refused", "NCCL")
_SIGNALLED = 128

_children: list[subprocess.Popen[bytes]] = []


def start_ranks(device: str, devices: Any) -> None:
    """Start the other ranks of a run with ``trainer.devices=devices`` on this machine; this process becomes rank 0.

    Nothing for a lone process.

    UserError inside a sweep: its jobs share this process. The other ranks are ended when this one ends, and the other way round.
    """
    import torch
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from kalle.checkpoint import resolve_device
    from kalle.training.distributed import started_ranks, wanted_ranks

    if started_ranks() is not None:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
            logging.getLogger().setLevel(logging.WARNING)  # rank 0 reports it
        return
    resolved = resolve_device(device)
    gpus = torch.cuda.device_count() if resolved.type == "cuda" else 0
    count = 1 if resolved.index is not None else wanted_ranks(devices, gpus)
    if count == 1 or not HydraConfig.initialized():
        return
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        raise UserError(
            f"a sweep over runs on {count} devices: got trainer.devices={devices}, expected 1 in a sweep; "
            "set trainer.devices=1, or give each job its tasks with hydra/launcher=submitit_slurm (docs/how-to/distributed.md)"
        )
    _start(count, rank_command(HydraConfig.get()))


def rank_command(hydra: Any) -> list[str]:
    """The command of another rank of the training that ``hydra`` (Hydra's own configuration) describes."""
    stage = str(hydra.job.config_name).removeprefix("train_")
    return [sys.executable, "-m", "kalle", "train", stage, *hydra.overrides.hydra, *hydra.overrides.task]


def _start(count: int, command: list[str]) -> None:
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "NODE_RANK": "0"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    for rank in map(str, range(1, count)):
        _children.append(subprocess.Popen(command, env={**os.environ, "RANK": rank, "LOCAL_RANK": rank}))
    atexit.register(_end_with_us)
    threading.Thread(target=_watch, name="ranks", daemon=True).start()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _watch() -> None:
    """End everything when one of the other ranks fails: this process may hang in a collective operation that waits for it."""
    while any(child.poll() is None for child in _children) and not any(child.returncode for child in _children):
        time.sleep(_POLL_SECONDS)
    codes = [child.returncode for child in _children if child.returncode]
    if not codes:
        return
    code = codes[0] if codes[0] > 0 else _SIGNALLED - codes[0]
    if code > _SIGNALLED:
        time.sleep(PEER_SECONDS)  # stopped by a signal, as this process probably was: time to end in order
    _kill_children()
    os._exit(code)


def _kill_children() -> None:
    for child in _children:
        with contextlib.suppress(OSError):
            child.kill()


def _end_with_us() -> None:
    failed = hasattr(sys, "last_value")
    deadline = time.monotonic() + (0 if failed else PEER_SECONDS)
    for child in _children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(max(0.0, deadline - time.monotonic()))
    _kill_children()


def error_prefix() -> str:
    """The prefix of an error message; called right before it is printed, so that an error of all ranks is printed once."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        _kill_children()
        return "error: "
    time.sleep(FIRST_RANK_SPEAKS_SECONDS)
    return f"error: [rank {rank}] "


def lost_peer(error: BaseException) -> bool:
    """Whether ``error`` only reports that another rank has ended.

    Then it first waits to be ended by the launcher, since that rank's message is the one to read.
    """
    from kalle.training.distributed import started_ranks

    if started_ranks() is None or not any(word in str(error) for word in _PEER_WORDS):
        return False
    time.sleep(PEER_SECONDS)
    return True
