"""``kalle encode``: from a prepared corpus to a folder of latents."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from kalle.data.latents.encode import EncodeConfig

logger = logging.getLogger(__name__)


def run(overrides: list[str]) -> int:
    """Run ``configs/encode.yaml`` with ``overrides``; returns the exit status."""
    from kalle.cli.hydra_entry import folder_override, run_hydra

    return run_hydra(encode, "encode", folder_override(overrides, "flowvae"))


def encode(config: DictConfig) -> dict[str, Any] | None:
    """Encode this rank's share of the corpus that ``config`` names.

    Returns the info.json of the latent folder; None when shards of other ranks are not there yet.
    """
    from omegaconf import OmegaConf

    from kalle.data.corpus.cuts import load_cuts
    from kalle.data.latents.encode import CorpusEncoder, encode_corpus
    from kalle.data.ranks import OthersUnfinished, rank_device, share_of_process
    from kalle.errors import UserError
    from kalle.models.flowvae import FlowVAE
    from kalle.models.speaker import SpeakerMel
    from kalle.progress import progress_bar

    OmegaConf.resolve(config)
    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise UserError(f"kalle encode: no value for {', '.join(missing)}, expected flowvae=DIR corpus=DIR out=DIR; add {missing[0]}=DIR")
    options, share = encode_config(config), share_of_process(config.rank, config.world_size)
    flowvae = FlowVAE.from_pretrained(config.flowvae.folder, device=rank_device(config.device))
    splits = {split: load_cuts(config.corpus, split) for split in config.splits}
    encoder = CorpusEncoder(flowvae, options, SpeakerMel() if options.speaker_mels else None)
    with progress_bar() as bar:
        task = bar.add_task("encode" if share.world_size == 1 else f"encode, {share}", total=None)
        try:
            return encode_corpus(encoder, splits, config.out, lambda done, total: bar.update(task, completed=done, total=total), share)
        except OthersUnfinished as unfinished:
            logger.info("%s", unfinished)
            return None


def encode_config(config: DictConfig) -> EncodeConfig:
    """The part of ``config`` that says how to encode, as the dataclass."""
    from omegaconf import OmegaConf

    from kalle.data.latents.encode import EncodeConfig, JoinConfig

    values = OmegaConf.to_container(config, resolve=True)
    assert isinstance(values, dict)
    names = {field.name for field in dataclasses.fields(EncodeConfig)} - {"join"}
    return EncodeConfig(join=JoinConfig(**values["join"]), **{str(key): value for key, value in values.items() if key in names})
