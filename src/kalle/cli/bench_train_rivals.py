"""Who races in ``kalle bench train``: the plain loop, and ours with one more thing switched on each time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule, LoaderSpeed, measure_loader
from kalle.models.batch import Packing
from kalle.models.lm import KalleLM, compile_layers
from kalle.text.tokenizer import Tokenizer
from kalle.training.flowvae import ClipSchedule, FlowVAEObjective, FlowVAETraining
from kalle.training.lm import KalleLMTraining, LMObjective
from kalle.training.optimisation import WarmupCosine
from kalle.training.throughput import Amount, PlainLMTraining, Rival, lm_frames, lm_step_flops, plain_loader, wave_amount

if TYPE_CHECKING:
    from kalle.models.flowvae import FlowVAE

SEED = 0
TOTAL_STEPS = 1_000_000
LONGEST_SHARE = 5
"""Utterances of at most this part of a batch take part."""


@dataclass
class Contest:
    """Rivals, and what their numbers are divided by."""

    rivals: list[Rival]
    frames: Amount
    flops_per_frame: float
    parameters: int
    loader_speed: Callable[[], LoaderSpeed]
    samples_per_frame: int = 1
    """Divides the loader's count of waveform samples into frames."""
    warmup: int = 3


def lm_contest(
    size: str, latents: Path | None, folder: Path, positions: int, workers: int, device: torch.device, compiled: bool
) -> Contest:
    """The plain loop on padded rows, then ours: batches of like length, packed rows, bf16, compiled layers."""
    tokenizer = Tokenizer.bytes()
    config = _configuration("lm", size)
    source = latents if latents is not None else _encoded(folder, config.latent_dim)
    torch.manual_seed(SEED)
    lm = KalleLM(config)
    data = {kind: _lm_data(source, tokenizer, positions, workers, packing=kind == "packed") for kind in ("padded", "packed")}
    dataset = data["padded"].dataset("train")
    lengths = dataset.text_lengths + dataset.audio_lengths
    loaders = {kind: module.train_dataloader for kind, module in data.items()}
    # As many positions a batch as ours have, were it not for the padding.
    plain = partial(plain_loader, dataset, max(1, round(positions / float(lengths.mean()))), SEED)
    rivals = [Rival("plain Lightning, padded", lambda: PlainLMTraining(copy.deepcopy(lm)), plain)]
    ours = [("batches of like length", "padded", None, "32-true", False), ("packed", "packed", Packing(), "32-true", False)]
    ours += [("packed, bf16", "packed", Packing(), "bf16-mixed", False)]
    ours += [("packed, bf16, compiled", "packed", Packing(), "bf16-mixed", True)] if compiled else []
    rivals += [
        Rival(name, partial(_lm_training, lm, packing, fast), loaders[kind], precision) for name, kind, packing, precision, fast in ours
    ]
    batch = next(iter(data["packed"].train_dataloader()))
    per_frame = lm_step_flops(lm, batch) / lm_frames(batch)
    return Contest(
        rivals,
        lm_frames,
        per_frame,
        _parameters(lm),
        lambda: measure_loader(_lm_data(source, tokenizer, positions, workers, packing=True), 40, workers),
    )


def flowvae_contest(
    size: str, corpus: Path | None, folder: Path, batch: int, segment_frames: int, workers: int, device: torch.device, compiled: bool
) -> Contest:
    """The adversarial step in fp32, then in bf16, then compiled."""
    from torch.utils.flop_counter import FlopCounterMode

    from kalle.models.discriminators import DiscriminatorConfig, Discriminators
    from kalle.models.flowvae import FlowVAE

    source = corpus if corpus is not None else _prepared(folder)
    config = _configuration("flowvae", size)
    torch.manual_seed(SEED)
    flowvae = FlowVAE(config)
    judges = Discriminators(DiscriminatorConfig(width=1.0 if size == "full" else 0.25))

    def data() -> FlowVAEDataModule:
        return FlowVAEDataModule(
            str(source), segment_frames * config.hop_length, batch, hop_length=config.hop_length, seed=SEED, cache=True, num_workers=workers
        )

    loader = data().train_dataloader
    variants = [("fp32", "32-true", False), ("bf16", "bf16-mixed", False)] + ([("bf16, compiled", "bf16-mixed", True)] if compiled else [])
    rivals = [Rival(name, partial(_flowvae_training, flowvae, judges, fast), loader, precision) for name, precision, fast in variants]
    wav = next(iter(loader())).wav
    with FlopCounterMode(display=False) as counter:
        heard = flowvae(wav).wav
        judges(heard)
        judges(wav)
    # Forward and backward of the Flow-VAE and of the judges' own step (real and generated), the judges again for the generator.
    flops = 3 * counter.get_total_flops()
    frames = wave_amount(config.hop_length)
    per_frame = flops / (wav.numel() // config.hop_length)
    return Contest(rivals, frames, per_frame, _parameters(flowvae), lambda: measure_loader(data(), 40, workers), config.hop_length)


def _lm_training(lm: KalleLM, packing: Packing | None, compiled: bool) -> KalleLMTraining:
    own = copy.deepcopy(lm)
    if compiled:
        compile_layers(own)
    return KalleLMTraining(own, *_optimisation(), objective=LMObjective(), seed=SEED, packing=packing)


def _flowvae_training(flowvae: FlowVAE, judges: Any, compiled: bool) -> FlowVAETraining:
    own, own_judges = copy.deepcopy(flowvae), copy.deepcopy(judges)
    if compiled:
        for module in (own.encoder, own.decoder, own_judges):
            module.compile()
    return FlowVAETraining(own, *_optimisation(), objective=FlowVAEObjective(), clip=ClipSchedule(), discriminators=own_judges, seed=SEED)


def _optimisation() -> tuple[Any, Any]:
    return partial(torch.optim.AdamW, lr=1e-4), WarmupCosine(warmup_steps=100, total_steps=TOTAL_STEPS)


def _lm_data(latents: Path, tokenizer: Tokenizer, positions: int, workers: int, packing: bool) -> LMDataModule:
    # Longer utterances would keep packed batches from being filled, see PackedPlan.
    shorter = max(1, positions // LONGEST_SHARE)
    return LMDataModule(
        str(latents), tokenizer, positions, drop_longer_than=shorter, seed=SEED, packing=packing, cache=True, num_workers=workers
    )


def _configuration(part: str, size: str) -> Any:
    from kalle.cli.bench import Size, configuration
    from kalle.errors import UserError

    if size not in tuple(Size):
        raise UserError(f"--size: got '{size}', expected {', '.join(Size)}")
    return configuration(part, Size(size))


def _prepared(folder: Path) -> Path:
    """The embedded corpus: real texts and lengths."""
    from kalle.data.corpus.check import PrepareOptions
    from kalle.data.corpus.lists import embedded_folder, read_embedded
    from kalle.data.corpus.prepare import prepare_corpus

    return prepare_corpus(read_embedded(embedded_folder()), folder / "corpus", PrepareOptions(max_seconds=120.0)).folder


def _encoded(folder: Path, latent_dim: int) -> Path:
    """Latents of the embedded corpus under a small random encoder of ``latent_dim`` dimensions."""
    import dataclasses

    from kalle.data.corpus.cuts import load_cuts
    from kalle.data.latents.encode import CorpusEncoder, EncodeConfig, encode_corpus
    from kalle.models.flowvae import FlowVAE

    corpus = _prepared(folder)
    torch.manual_seed(SEED)
    flowvae = FlowVAE(dataclasses.replace(_configuration("flowvae", "nano"), latent_dim=latent_dim))
    encode_corpus(
        CorpusEncoder(flowvae, EncodeConfig()), {split: load_cuts(corpus, split) for split in ("train", "valid")}, folder / "latents"
    )
    return folder / "latents"


def _parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
