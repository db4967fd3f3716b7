"""The parts that both trainings share: start, trainer, the checks of a continued run, and its record."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning
import torch
import yaml
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch import nn

from kalle.checkpoint import CONFIG_NAME, FORMAT_VERSION, read_json, resolve_device, write_json
from kalle.errors import UserError
from kalle.extras import cpu_name
from kalle.files import folder_lock, output_folder, write_atomic
from kalle.training.callbacks import EMA, LogTail, RunProgress, StepSeeds, build_loggers
from kalle.training.checkpointing import (
    LastCheckpoint,
    Preempted,
    check_checkpoint,
    check_no_foreign_checkpoint,
    resume_path,
    saved_log_step,
    step_of,
)
from kalle.training.config import TrainingConfig, plain_values, precision_of
from kalle.training.distributed import FSDP, process_count, sharded_strategy, started_ranks
from kalle.training.optimisation import parameter_counts
from kalle.training.plan import make_plan
from kalle.training.update_guard import UpdateGuard

logger = logging.getLogger(__name__)

INPUT_SPLITS = ("train", "valid")
"""The inputs of a run, opened before anything is built or written."""
WEIGHTS_FOLDER, CHECKPOINTS_FOLDER, CONFIG_FILE = "weights", "checkpoints", "config.yaml"
RECORD_NAME, DIFF_NAME = "run.json", "git.diff"
_DECIDING = ("data", "seed", "objective", "packing")
"""Sections of a configuration that say what a run learns from, and what it learns."""
_LOADING = frozenset({"cache", "cache_dir", "num_workers", "pin_memory", "hop_length", "sample_rate_hz", "tokenizer"})
"""Keys of data that change no batch, or follow from the model."""
PACKAGES = ("torch", "lightning", "transformers", "lhotse", "numpy", "hydra-core")
MAX_DIFF_BYTES = 5_000_000
_GZIP_TRAILER_BYTES = 8
"""Checksum and length of the uncompressed content end a gzip file (RFC 1952, section 2.3.1)."""


@dataclass(frozen=True)
class TrainingResult:
    """A finished training."""

    folder: Path
    """The run: checkpoints, logs, config.yaml and run.json."""
    weights: Path
    """The weight folder inside it."""
    metrics: dict[str, float]
    """The last values of everything logged."""
    module: lightning.LightningModule
    trainer: lightning.Trainer


def begin(config: TrainingConfig) -> None:
    """Set threads and seeds, and silence messages of the libraries."""
    for message in (".*LeafSpec.*", ".*is smaller than the logging interval.*"):  # the latter of every small corpus
        warnings.filterwarnings("ignore", message=message)
    # Its own handler would repeat every line of ours, and we log devices and steps ourselves.
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    lightning.seed_everything(config.seed, workers=True, verbose=False)


def check_optimisation(config: TrainingConfig) -> None:
    """A UserError for an optimizer or a schedule that cannot be built."""
    made: Any = [nn.Parameter(torch.zeros(1))]
    for name, factory in (("optimizer", config.optimizer), ("scheduler", config.schedule)):
        try:
            made = factory(made)
        except (TypeError, ValueError, IndexError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{name}: expected values it can work with ({error}); correct {name}.*") from None


def fit(
    config: TrainingConfig,
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger] | None,
    strategy: str | Strategy = "auto",
) -> TrainingResult:
    """Train ``module`` on ``data``, from the checkpoint that ``config.resume`` means; ``loggers`` in place of those of ``config``."""
    out = Path(config.out)
    with output_folder(out), _only_training(out):
        return _fit(config, module, data, callbacks, loggers, strategy)


def _fit(
    config: TrainingConfig,
    module: lightning.LightningModule,
    data: lightning.LightningDataModule,
    callbacks: Sequence[Callback],
    loggers: Sequence[Logger] | None,
    strategy: str | Strategy,
) -> TrainingResult:
    out, device, precision = Path(config.out), resolve_device(config.device), precision_of(config)
    check_no_foreign_checkpoint(out)
    values, checkpoint = plain_values(config), resume_path(config.resume, out / CHECKPOINTS_FOLDER)
    if checkpoint is not None:
        check_checkpoint(checkpoint, module)
        if not config.allow_changes:
            objective = getattr(config, "objective", None)
            check_unchanged(checkpoint, values, {} if objective is None else plain_values(type(objective)()))
    used = _loggers(config, checkpoint) if loggers is None else list(loggers)
    logged: Any = [*used, LogTail()] if used else False
    trainer = _trainer(config, device, precision, strategy, logged, [*_callbacks(config, used), *callbacks])
    trained, every = parameter_counts(module)
    end = f"step {trainer.max_steps}" if trainer.max_steps > 0 else f"the end of epoch {trainer.max_epochs}"
    logger.info(
        "training %.1f M parameters on %s (%s) to %s, %s; results in '%s'",
        trained / 1e6, device, precision, end, f"continuing from '{checkpoint}'" if checkpoint else "from the start", out,
    )  # fmt: skip
    if trainer.is_global_zero:
        plan = make_plan(config, (every, trained), data, checkpoint)  # type: ignore[arg-type]
        logger.info("%s", "\n".join(plan.lines()[:-1]))
        write_atomic(out / CONFIG_FILE, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
        write_record(out, values, trainer, checkpoint)
    _run(trainer, module, data, checkpoint)
    if checkpoint is not None and step_of(checkpoint) == trainer.global_step:
        logger.info("'%s' was finished: all its %d steps were made before; raise trainer.max_steps to continue", out, trainer.global_step)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return TrainingResult(out, out / WEIGHTS_FOLDER, metrics, module, trainer)


@contextmanager
def _only_training(out: Path) -> Iterator[None]:
    """Hold the lock of the run ``out``; a UserError while another training writes there. Of several processes rank 0 holds it."""
    if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) != "0":
        yield
        return
    with folder_lock(out, "training", wait=False) as holder:
        if holder is not None:
            raise UserError(
                f"another training writes into '{out}': got its lock held by {holder}, expected a folder of our own; "
                "wait for it to end, or choose out=NEW"
            )
        yield


def check_unchanged(checkpoint: Path, values: Mapping[str, Any], objective: Mapping[str, Any]) -> None:
    """A UserError that lists what of data, seed and objective the run of ``checkpoint`` had otherwise than ``values`` has.

    They are compared with the config.yaml of that run, in which keys of the objective that its version did not know yet have the defaults
    ``objective``; one that is not there, or cannot be read, is reported and compares nothing.
    """
    path = checkpoint.absolute().parent.parent / CONFIG_FILE
    try:
        before = _without_targets(yaml.safe_load(path.read_text(encoding="utf-8")))
        assert isinstance(before, dict)
    except (OSError, ValueError, AssertionError, RecursionError, yaml.YAMLError):
        logger.warning("no readable '%s': it is unknown whether the run continues with the data, seed and objective it began with", path)
        return
    changed = []
    for name in _DECIDING:
        old, new = before.get(name), values.get(name)
        pairs = [(name, old, new)]
        if isinstance(old, dict) and isinstance(new, Mapping):
            old = {**objective, **old} if name == "objective" else old
            pairs = [(f"{name}.{key}", old[key], new[key]) for key in new if key in old and key not in _LOADING]
        changed += [f"{key} was {was} and is {now}" for key, was, now in pairs if not _same(was, now)]
    contents, starts = data_contents(values), _earlier(path.with_name(RECORD_NAME))
    recorded = starts[-1].get("data") if starts and isinstance(starts[-1], dict) else None
    if isinstance(recorded, dict):
        changed += [f"what '{folder}' holds" for folder, content in contents.items() if recorded.get(folder, content) != content]
    if changed:
        raise UserError(
            f"'{checkpoint}' was trained with other values: {'; '.join(changed)}; expected the same, for a run is one training; choose "
            "out=NEW, or allow_changes=true to continue with the new ones"
        )


def data_contents(values: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of what says which items each folder of ``values["data"]`` holds: info.json of latents, the checksums of a corpus' cuts.

    A folder elsewhere than on a local disk is left out.
    """
    data = values.get("data") or {}
    given = data.get("latents") or data.get("corpus") or []
    sources = [given] if isinstance(given, str) else list(given)
    folders = [str(source["path"] if isinstance(source, Mapping) else source) for source in sources]
    return {folder: _digest(Path(folder)) for folder in folders if Path(folder).is_dir()}


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    info = folder / "info.json"
    if info.is_file():
        digest.update(info.read_bytes())
    for cuts in sorted(folder.glob("cuts_*.jsonl.gz")):
        with cuts.open("rb") as file:
            file.seek(max(0, cuts.stat().st_size - _GZIP_TRAILER_BYTES))
            digest.update(cuts.name.encode() + file.read())
    return digest.hexdigest()


def _without_targets(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_targets(item) for key, item in value.items() if key != "_target_"}
    return [_without_targets(item) for item in value] if isinstance(value, list) else value


def _same(was: Any, now: Any) -> bool:
    both_texts = isinstance(was, str) and isinstance(now, str)
    return was == now or (both_texts and Path(was).resolve() == Path(now).resolve())


def _callbacks(config: TrainingConfig, loggers: Sequence[Logger]) -> list[Callback]:
    parts, out = config.callbacks, Path(config.out)
    found: list[Callback] = [StepSeeds(config.seed)]
    found += [] if parts.progress is None else [RunProgress(parts.progress.log_every_seconds)]
    found += [] if parts.checkpoint is None else [LastCheckpoint(out / CHECKPOINTS_FOLDER, parts.checkpoint)]
    found += [] if parts.guard is None else [UpdateGuard(out / "bad_batches", parts.guard)]
    found += [LearningRateMonitor()] if parts.lr and loggers else []
    found += [] if parts.ema is None else [EMA(parts.ema.decay)]
    return found


def _loggers(config: TrainingConfig, checkpoint: Path | None) -> list[Logger]:
    # A run killed before its first checkpoint continues too, from nothing.
    anew = 0 if config.resume == "auto" else None
    step = anew if checkpoint is None else saved_log_step(checkpoint)
    return build_loggers(config.loggers, str(config.out), step, config.wandb_offline)


def _trainer(
    config: TrainingConfig, device: torch.device, precision: str, strategy: str | Strategy, loggers: Any, callbacks: list[Callback]
) -> lightning.Trainer:
    given, started = config.trainer, started_ranks()
    devices = [device.index] if device.index is not None else given.devices
    passed: dict[str, Any] = {name: value for name, value in vars(given).items() if name not in ("devices", "num_nodes", "strategy")}
    if strategy == FSDP:
        strategy = sharded_strategy(process_count(given.devices, given.num_nodes, device))
    try:
        return lightning.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=devices if started is None else started[0],
            num_nodes=given.num_nodes if started is None else started[1],
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            logger=loggers,
            callbacks=callbacks,
            default_root_dir=str(config.out),
            **passed,
            use_distributed_sampler=False,  # our samplers split over ranks themselves
            enable_checkpointing=True,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, TypeError) as error:  # Lightning's own exception is a TypeError or ValueError too
        raise UserError(f"trainer: Lightning refuses its values: {' '.join(str(error).split())}; correct trainer.* or precision") from None


def _run(trainer: lightning.Trainer, module: lightning.LightningModule, data: Any, checkpoint: Path | None) -> None:
    """Fit; raises Preempted after a signal of the cluster, KeyboardInterrupt after Ctrl-C."""
    try:
        trainer.fit(module, datamodule=data, ckpt_path=None if checkpoint is None else str(checkpoint), weights_only=True)
    except Preempted:
        raise
    except (RuntimeError, SystemExit) as error:
        # Lightning answers Ctrl-C with exit code 1, and data workers that got it too die under the trainer.
        requested = any(getattr(callback, "stop_requested", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
        if not isinstance(error.__context__, KeyboardInterrupt) and not (trainer.interrupted and requested):
            raise
        raise KeyboardInterrupt from None


def check_weights_finite(model: nn.Module) -> None:
    """A UserError when ``model`` has NaN or infinite values, which nothing could use."""
    tensors = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    broken = [name for name, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]
    if broken:
        raise UserError(
            f"the trained weights have NaN or infinite values in {len(broken)} tensors, such as {broken[0]}: expected numbers, so nothing "
            "is exported; resume from an earlier checkpoint with a lower optimizer.lr, and leave callbacks.guard on"
        )


def describe(weights: Path, sample_rate: int | None) -> None:
    """Write the weight folder's own config.json, and say where the weights are and what they are for."""
    parts = [part for part in ("flowvae", "lm", "tokenizer") if (weights / part).is_dir()]
    values = {"format_version": FORMAT_VERSION, "parts": parts}
    write_json(weights / CONFIG_NAME, values if sample_rate is None else {**values, "sample_rate": sample_rate})
    use = f"`kalle encode flowvae={weights} corpus=DIR out=DIR` makes latents with them"
    if "lm" in parts:
        use = (
            f"speak with `kalle say --model {weights} TEXT`"
            if "flowvae" in parts
            else "add flowvae=DIR to the training for a folder that speaks"
        )
    logger.info("the weights are in '%s'; %s", weights, use)


def write_record(out: Path, config: dict[str, Any], trainer: lightning.Trainer, checkpoint: Path | None) -> None:
    """Append this start to ``out``/run.json; changes to tracked files that git has not seen go to ``out``/git.diff.

    The file is ``{"starts": [...]}``, one entry a start or resume, newest last. A run.json that is no such file is moved to run.json.old.
    """
    path = out / RECORD_NAME
    starts = _earlier(path)
    git, difference = git_state(Path(__file__).parent)
    if git is not None and difference:
        git["diff"] = DIFF_NAME if not starts else f"git-{len(starts)}.diff"
        write_atomic(out / git["diff"], difference[:MAX_DIFF_BYTES])
        git["diff_cut"] = len(difference) > MAX_DIFF_BYTES
    start = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "resumed_from": None if checkpoint is None else str(checkpoint),
        "command": sys.argv,
        "folder": str(Path.cwd()),
        "seed": config["seed"],
        "versions": run_versions(),
        "git": git,
        "machine": run_machine(trainer),
        "data": data_contents(config),
        "config": config,
    }
    write_json(path, {"starts": [*starts, start]})


def _earlier(path: Path) -> list[Any]:
    if not path.is_file():
        return []
    try:
        starts = read_json(path)["starts"]
        assert isinstance(starts, list)
    except (UserError, KeyError, TypeError, AssertionError):
        os.replace(path, path.with_suffix(".json.old"))
        return []
    return starts


def run_versions() -> dict[str, str]:
    """Versions of Python, kalle and what it trains with; packages that are not installed are left out."""
    import kalle

    found = {"python": platform.python_version(), "kalle": kalle.__version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def run_machine(trainer: lightning.Trainer) -> dict[str, Any]:
    """Host, processors, accelerators and the number of processes."""
    return {
        "host": platform.node(),
        "system": platform.platform(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
    }


def git_state(folder: Path) -> tuple[dict[str, Any] | None, bytes]:
    """Commit and uncommitted changes of the checkout that ``folder`` lies in; (None, b"") outside one or without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if commit is None:
        return None, b""
    # An installed package may lie inside an unrelated checkout, such as an environment in a project's folder.
    if _git(folder, "ls-files", "--error-unmatch", str(Path(__file__))) is None:
        return None, b""
    status = _git(folder, "status", "--porcelain") or b""
    untracked = [line[3:] for line in status.decode(errors="replace").splitlines() if line.startswith("??")]
    difference = _git(folder, "diff", "HEAD", "--no-color") or b""
    return {"commit": commit.decode().strip(), "dirty": bool(status.strip()), "untracked": untracked}, difference


def _git(folder: Path, *arguments: str) -> bytes | None:
    try:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return None
