"""`encode`: the latents of a prepared corpus, called from a notebook, a test or `kalle encode`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalle.checkpoint import check_fields
from kalle.data.corpus.cuts import load_cuts
from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, Progress, encode_corpus
from kalle.data.shared_work import rank_device, share_of_process
from kalle.models.flowvae import FlowVAE
from kalle.models.speaker import SpeakerMel


@dataclass(frozen=True, kw_only=True)
class EncodingConfig:
    """The corpus, the folder to write, and the share of this process."""

    flowvae: str | Path
    """Weight folder, NAME or NAME/flowvae."""
    corpus: str | Path
    """Folder that `kalle prepare` wrote."""
    out: str | Path
    """Latent folder; encode again to continue after an interruption."""
    options: EncodeConfig = field(default_factory=EncodeConfig)
    splits: Sequence[str] = ("train", "valid", "test")
    device: str = "auto"
    """auto, cpu or cuda; with several processes each has a GPU of its own."""
    rank: int | None = None
    """The part of this process of ``world_size``; None: what torchrun or SLURM say, else all of it."""
    world_size: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "splits", tuple(self.splits))
        check_fields(self, "")


def encode(config: EncodingConfig, report: Progress | None = None) -> dict[str, Any]:
    """Encode this process's share of a corpus; returns the info.json of the complete latent folder.

    ``report`` is called with the numbers of utterances done and of all. OthersUnfinished when shards of other processes are not there
    yet; a UserError for a folder that is no corpus or has no Flow-VAE.
    """
    share = share_of_process(config.rank, config.world_size)
    flowvae = FlowVAE.from_pretrained(config.flowvae, device=rank_device(config.device))
    splits = {split: load_cuts(config.corpus, split) for split in config.splits}
    encoder = CorpusEncoder(flowvae, config.options, SpeakerMel() if config.options.speaker_mels else None)
    return encode_corpus(encoder, splits, config.out, report, share)
