"""Time a training step of our backbone and of transformers' in turns: python scripts/compare_backbones.py nano|small [ROUNDS]."""

from __future__ import annotations

import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaModel

from kalle.cli.hydra_entry import compose
from kalle.cli.train import training_config
from kalle.gaussian import DiagGaussian
from kalle.losses.latent import next_distribution_loss
from kalle.models.lm import KalleLM, KalleLMConfig
from kalle.models.lm_batch import LMBatch, Packing

ROWS = {"nano": 8, "small": 4}


def batch_of(config: KalleLMConfig, rows: int) -> LMBatch:
    """A batch of ``rows`` utterances of usual lengths."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(20, 80, (rows,), generator=generator)
    frames = torch.randint(30, 160, (rows,), generator=generator)
    latents = torch.randn(rows, int(frames.max()), config.latent_dim, generator=generator)
    ids = torch.randint(0, 250, (rows, int(texts.max())), generator=generator)
    return LMBatch(ids, texts, latents, frames, DiagGaussian(latents, torch.zeros_like(latents)))


def seconds(lm: KalleLM, batch: LMBatch, packing: Packing | None) -> float:
    """CPU time of a forward and a backward pass."""
    lm.zero_grad()
    started = time.process_time()
    next_distribution_loss(lm(batch, lm.layout(batch, packing)), batch).total.backward()
    return time.process_time() - started


def main(size: str, rounds: int) -> None:
    """Print the ratio of the two for padded and packed rows; the first round does not count."""
    torch.set_num_threads(1)
    config = training_config(compose("train_lm", [f"lm={size}", "tokenizer=bytes", "out=o", "data.latents=l"])).lm
    theirs, ours = (KalleLM(config).train() for _ in range(2))
    # Without a cache, for with one it would let packed utterances see each other.
    theirs.backbone = LlamaModel(LlamaConfig(**config.backbone, use_cache=False))
    ours.load_state_dict(theirs.state_dict())
    batch = batch_of(config, ROWS[size])
    for packing in (None, Packing(1000)):
        ratios = [seconds(theirs, batch, packing) / seconds(ours, batch, packing) for _ in range(rounds + 1)][1:]
        rows = "padded" if packing is None else "packed"
        sys.stdout.write(f"{size}, {rows}: transformers / ours {statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})\n")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8)
