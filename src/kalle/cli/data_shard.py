"""``kalle data shard``: a prepared corpus as shards of FLAC."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

logger = logging.getLogger(__name__)


def shard(
    corpus: Annotated[Path, typer.Argument(metavar="CORPUS", help="folder that `kalle prepare` wrote")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="folder for the shards; an interrupted run continues in it")],
    split: Annotated[list[str] | None, typer.Option(help="split to write, once for each; all by default")] = None,
    items: Annotated[int, typer.Option(help="cuts in a shard at most")] = 1000,
    megabytes: Annotated[float, typer.Option(help="size of a shard at most, counted as 16-bit samples; FLAC takes about half")] = 250.0,
    rate: Annotated[int, typer.Option(help="sample rate of the shards in Hz; other cuts are resampled")] = 16000,
) -> None:
    """Write the waveforms of a corpus as lhotse Shar shards, for fast, nearly sequential reading from disks and object stores."""
    from kalle.data.corpus.cuts import load_cuts, splits_of
    from kalle.data.latents.waves import WaveShardConfig, write_wave_shards
    from kalle.progress import progress_bar

    config = WaveShardConfig(items, megabytes, rate)
    splits = {name: load_cuts(corpus, name) for name in split or splits_of(corpus) or ["train"]}
    with progress_bar() as bar:
        task = bar.add_task("shard", total=None)
        info = write_wave_shards(splits, out, config, lambda done, total: bar.update(task, completed=done, total=total))
    for name, facts in info["splits"].items():
        logger.info(
            "%s: %d cuts, %.1f minutes in %d shards, %.1f MB", name, facts["utterances"], facts["seconds"] / 60, facts["shards"],
            facts["bytes"] / 1e6,
        )  # fmt: skip
