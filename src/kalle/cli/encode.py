"""``kalle encode``: composes a configuration and calls `kalle.data.latents.encode.encode`."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

from kalle.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.data.latents.encode import EncodingConfig

logger = logging.getLogger(__name__)


def run(overrides: list[str]) -> int:
    """Run ``configs/encode.yaml`` with ``overrides``; returns the exit status."""
    from kalle.cli.hydra_entry import folder_override, run_hydra

    return run_hydra(encode_composed, "encode", folder_override(overrides, "flowvae"))


def encode_composed(config: DictConfig) -> dict[str, Any] | None:
    """Encode this rank's share of the corpus that ``config`` names.

    Returns the info.json of the latent folder; None when shards of other ranks are not there yet.
    """
    from kalle.data.latents.encode import encode
    from kalle.data.shared_work import OthersUnfinished, share_of_process
    from kalle.progress import progress_bar

    built = encoding_config(config)
    share = share_of_process(built.rank, built.world_size)
    with progress_bar() as bar:
        task = bar.add_task("encode" if share.world_size == 1 else f"encode, {share}", total=None)

        def show(done: int, total: int) -> None:
            if bar.tasks[task].total is None:
                bar.reset(task, completed=done, total=total)  # what an earlier run has done is no measure of speed
            bar.update(task, completed=done)

        try:
            info = encode(built, show)
        except OthersUnfinished as unfinished:
            logger.info("%s", unfinished)
            return None
    use = f"`kalle train lm data.latents={built.out} flowvae={built.flowvae} out=DIR` learns from them"
    logger.info("the latents are in '%s'; %s", built.out, use)
    return info


def encoding_config(config: DictConfig) -> EncodingConfig:
    """The dataclass that ``config`` describes; a UserError for a missing value or one of the wrong type."""
    from omegaconf import OmegaConf

    from kalle.cli.hydra_entry import part
    from kalle.data.latents.encode import EncodeConfig, EncodingConfig, JoinConfig

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"kalle encode: no value for {', '.join(missing)}, expected flowvae=DIR corpus=DIR out=DIR; add {missing[0]}=DIR")
    values: Any = OmegaConf.to_container(config, resolve=True)
    names = {field.name for field in dataclasses.fields(EncodingConfig)} - {"flowvae", "options"}
    own = {name: values.pop(name) for name in names & values.keys()}
    flowvae, join = values.pop("flowvae", {}), part(JoinConfig, values.pop("join", {}), "join")
    if isinstance(flowvae, dict) and "folder" in flowvae:
        own["flowvae"] = flowvae["folder"]
    return part(EncodingConfig, own | {"options": part(EncodeConfig, values | {"join": join})})
