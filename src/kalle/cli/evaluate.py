"""``kalle evaluate``: score reconstructions, synthesis or a folder of wavs on a test list."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.evaluation import EvaluateConfig, Metric, Result, SpeakingConfig

logger = logging.getLogger(__name__)
LIST_SUFFIXES = (".jsonl", ".jsonl.gz", ".lst")


def run(overrides: list[str]) -> int:
    """Run ``configs/evaluate.yaml`` with ``overrides``; returns the exit status. ``testset=PATH`` means ``testset.path=PATH``."""
    from kalle.cli.hydra_entry import run_hydra

    return run_hydra(evaluate_composed, "evaluate", [testset_path(override) for override in overrides])


def testset_path(override: str) -> str:
    """``testset=VALUE`` as ``testset.path='VALUE'`` where VALUE is a path and not a name of configs/testset."""
    from kalle.cli.hydra_entry import configs_dir

    key, _, value = override.partition("=")
    named = (configs_dir() / "testset" / f"{value}.yaml").is_file()
    if key != "testset" or named or not (Path(value).exists() or "/" in value or value.endswith(LIST_SUFFIXES)):
        return override
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"testset.path='{quoted}'"


def evaluate_composed(config: DictConfig) -> Result | None:
    """Run the evaluation that Hydra composed and log its report; None when items of other ranks are not scored yet."""
    from kalle.evaluation import evaluate
    from kalle.evaluation.asr import keep_freed_memory
    from kalle.evaluation.report import terminal_report

    keep_freed_memory()  # a short list is scored in this process
    filled = filled_config(config)
    result = evaluate(filled)
    if result is None:
        return None
    out = Path(filled.out)
    logger.info("%s\n\nmore in %s", terminal_report(result), out / "report.md")
    if result.errors:
        logger.warning("%d rows could not be scored; see error in %s", result.errors, out / "items.jsonl")
    return result


def filled_config(config: DictConfig) -> EvaluateConfig:
    """The dataclass that ``config`` describes. UserError for a value that is missing or not allowed."""
    from omegaconf import OmegaConf

    from kalle.cli.hydra_entry import part
    from kalle.errors import UserError
    from kalle.evaluation import EvaluateConfig, ReconstructionConfig, TestListConfig

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"kalle evaluate: no value for {', '.join(missing)}, expected kind=, testset= and out=; add {missing[0]}=VALUE")
    values: Any = OmegaConf.to_container(config, resolve=True)
    nodes = values.pop("metrics", {})
    if not isinstance(nodes, dict):
        raise UserError(f"metrics: got {nodes}, expected an object {{...}}; take one out with ~metrics.NAME")
    for name, node in nodes.items():
        if not isinstance(node, dict | None):
            raise UserError(f"metrics.{name}: got {node}, expected an object {{...}} or null; take it out with ~metrics.{name}")
    parts: dict[str, Any] = {
        "testset": part(TestListConfig, values.pop("testset", {}), "testset"),
        "reconstruction": part(ReconstructionConfig, values.pop("reconstruction", {}), "reconstruction"),
        "synthesis": _speaking(values.pop("synthesis", {})),
        "metrics": partial(build_metrics, nodes),
    }
    return part(EvaluateConfig, values | parts)


def _speaking(values: dict[str, Any]) -> SpeakingConfig:
    """The part ``synthesis``: what it does not know itself is a generation option."""
    from kalle.cli.hydra_entry import part
    from kalle.evaluation import SpeakingConfig
    from kalle.synthesis.options import GenerationOptions

    if not isinstance(values, dict):
        return part(SpeakingConfig, values, "synthesis")  # refuses it
    own = ({field.name for field in dataclasses.fields(SpeakingConfig)} - {"options"}) & values.keys()
    options = GenerationOptions().changed(**{str(name): value for name, value in values.items() if name not in own})
    return SpeakingConfig(options=options, **{name: values[name] for name in own})


def build_metrics(nodes: dict[str, Any], languages: Sequence[str]) -> list[Metric]:
    """The metrics that ``nodes`` name, built by Hydra; WER learns the languages of the list. UserError for one that cannot be built."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    from kalle.errors import UserError

    metrics: list[Metric] = []
    for name, node in nodes.items():
        if node is None:  # a protocol that leaves it out
            continue
        try:
            metrics.append(instantiate(node, **({"languages": languages} if name == "wer" else {}), _convert_="all"))
        except InstantiationException as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise UserError(f"metrics.{name}: {' '.join(str(error.__cause__ or error).split())}; see configs/evaluate.yaml") from None
    return metrics
