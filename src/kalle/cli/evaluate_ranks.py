"""An evaluation that several processes share, or that continues after an interruption: what its rows depend on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.evaluation.journal import Journal
    from kalle.evaluation.test_list import TestList

RESUME = ("auto", "never")
SUMMARY_KEYS = (
    "out", "device", "progress", "resamples", "bootstrap_seed", "figure_items", "rank", "world_size", "resume", "hydra", "testset",
)  # fmt: skip
"""Keys that decide no row of an item; the items of the list are facts of their own."""


def open_journal(config: DictConfig, test_list: TestList) -> Journal:
    """The journal of the evaluation that ``config`` describes, for this process's share of ``test_list``."""
    from kalle.data.ranks import share_of_process
    from kalle.evaluation.journal import Journal, fingerprint

    if config.resume not in RESUME:
        raise UserError(f"resume: got '{config.resume}', expected one of {', '.join(RESUME)}; correct it")
    share = share_of_process(config.rank, config.world_size)
    mark = fingerprint(_facts(config, test_list))
    return Journal(config.out, mark, share, len(test_list.items), resume=config.resume == "auto")


def _facts(config: DictConfig, test_list: TestList) -> dict[str, Any]:
    from omegaconf import OmegaConf

    from kalle.evaluation.journal import folder_digest
    from kalle.evaluation.report import versions

    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    settings = {key: value for key, value in values.items() if key not in SUMMARY_KEYS}
    source = config.wavs if config.kind == "wavs" else config.model
    items = [{key: value for key, value in asdict(item).items() if key != "loader"} for item in test_list.items]
    digest = folder_digest(source) if Path(source).is_dir() else None
    return {"settings": settings, "items": items, "source": digest, "versions": versions()}
