"""``kalle evaluate``: score reconstructions, synthesis or a folder of wavs on a test list."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.evaluation import Metric, Result, Settings
    from kalle.evaluation.journal import Journal
    from kalle.evaluation.test_list import TestItem, TestList

logger = logging.getLogger(__name__)
KINDS = ("reconstruction", "synthesis", "wavs")
LIST_SUFFIXES = (".jsonl", ".jsonl.gz", ".lst")


def run(overrides: list[str]) -> int:
    """Run ``configs/evaluate.yaml`` with ``overrides``; returns the exit status. ``testset=PATH`` means ``testset.path=PATH``."""
    from kalle.cli.hydra_entry import run_hydra

    return run_hydra(evaluate, "evaluate", [testset_path(override) for override in overrides])


def testset_path(override: str) -> str:
    """``testset=VALUE`` as ``testset.path='VALUE'`` where VALUE is a path and not a name of configs/testset."""
    from kalle.cli.hydra_entry import configs_dir

    key, _, value = override.partition("=")
    named = (configs_dir() / "testset" / f"{value}.yaml").is_file()
    if key != "testset" or named or not (Path(value).exists() or "/" in value or value.endswith(LIST_SUFFIXES)):
        return override
    quoted = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"testset.path='{quoted}'"


def evaluate(config: DictConfig) -> Result | None:
    """Score this rank's share of what ``config`` describes and log the report.

    Returns the result; None when items of other ranks are not scored yet.
    """
    from omegaconf import OmegaConf

    from kalle.cli.evaluate_ranks import open_journal
    from kalle.data.ranks import OthersUnfinished
    from kalle.errors import UserError
    from kalle.evaluation.test_list import read_test_list
    from kalle.files import output_folder

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"kalle evaluate: no value for {', '.join(missing)}, expected kind=, testset= and out=; add {missing[0]}=VALUE")
    if config.kind not in KINDS:
        raise UserError(f"kind: got '{config.kind}', expected one of {', '.join(KINDS)}; correct the override")
    needed = "wavs" if config.kind == "wavs" else "model"
    if config[needed] is None:
        raise UserError(f"kind={config.kind}: got no {needed}, expected {needed}=DIR; add it")
    test_list = read_test_list(config.testset.path, config.testset.min_words, config.testset.limit)
    out = Path(config.out)
    try:
        with output_folder(out), open_journal(config, test_list) as journal:
            result = _score(config, test_list, journal)
    except OthersUnfinished as unfinished:
        logger.info("%s", unfinished)
        return None
    logger.info("%s", (out / "report.md").read_text(encoding="utf-8"))
    if result.errors:
        logger.warning("%d items could not be scored; see error in %s", result.errors, out / "items.jsonl")
    return result


def _score(config: DictConfig, test_list: TestList, journal: Journal) -> Result:
    from kalle.cli.ranks import rank_device
    from kalle.evaluation import evaluate_reconstruction, evaluate_wavs
    from kalle.models.flowvae import FlowVAE

    settings, items, out = evaluation_settings(config, test_list), test_list.items, Path(config.out)
    if config.kind == "reconstruction":
        flowvae = FlowVAE.from_pretrained(config.model, rank_device(config.device))
        sample, seed, metrics = config.reconstruction.sample, config.reconstruction.seed, build_metrics(config, items)
        return evaluate_reconstruction(flowvae, items, metrics, out, sample=sample, seed=seed, settings=settings, journal=journal)
    if config.kind == "synthesis":
        return _score_synthesis(config, items, settings, journal)
    metrics = build_metrics(config, items)
    return evaluate_wavs(config.wavs, items, metrics, out, aligned=config.aligned, settings=settings, journal=journal)


def _score_synthesis(config: DictConfig, items: Sequence[TestItem], settings: Settings, journal: Journal) -> Result:
    from kalle.cli.ranks import rank_device
    from kalle.errors import UserError
    from kalle.evaluation import SpeakingConfig, evaluate_synthesis
    from kalle.synthesis.kalle import Kalle

    options = config.synthesis
    speaking = SpeakingConfig(options.prompts, tuple(options.seeds), options.temperature)
    if options.prompt_text is not None and options.prompt_audio is None:
        raise UserError("synthesis.prompt_text: got a transcript and no recording, expected synthesis.prompt_audio=FILE too; add it")
    kalle = Kalle.from_pretrained(config.model, str(rank_device(config.device)), config.dtype)
    voice = None if options.prompt_audio is None else kalle.voice(options.prompt_audio, options.prompt_text)
    metrics = build_metrics(config, items)
    return evaluate_synthesis(kalle, items, metrics, config.out, config=speaking, voice=voice, settings=settings, journal=journal)


def evaluation_settings(config: DictConfig, test_list: TestList) -> Settings:
    """What all kinds share, with the test list and the model recorded."""
    from kalle.evaluation import Settings

    context: Mapping[str, Any] = {
        "model": config.model,
        "testset": str(test_list.source),
        "min_words": config.testset.min_words,
        "limit": config.testset.limit,
        "left_out": test_list.left_out,
    }
    return Settings(config.resamples, config.bootstrap_seed, config.figure_items, config.progress, config.score_recordings, context)


def build_metrics(config: DictConfig, items: Sequence[TestItem]) -> list[Metric]:
    """The metrics of ``config``, built by Hydra; WER learns the languages of the list. UserError for one that cannot be built."""
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    from kalle.errors import UserError

    languages = sorted({item.language for item in items})
    metrics: list[Metric] = []
    for name, node in config.metrics.items():
        try:
            metrics.append(instantiate(node, **({"languages": languages} if name == "wer" else {}), _convert_="all"))
        except InstantiationException as error:
            if isinstance(error.__cause__, UserError):
                raise error.__cause__ from None
            raise UserError(f"metrics.{name}: {' '.join(str(error.__cause__ or error).split())}; see configs/evaluate.yaml") from None
    return metrics
