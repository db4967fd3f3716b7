"""``kalle bench train``: step time, frames a second, padding and memory of training, each way in turn, and the loader alone."""

from __future__ import annotations

import copy
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kalle.cli.main import interruptible
from kalle.errors import UserError

if TYPE_CHECKING:
    import lightning
    import torch

    from kalle.evaluation.limits import Limits

STAGES = ("lm", "flowvae")
SEED, WARMUP = 0, 3
OUT_OF_MEMORY = "needs more memory than the device has"
LONGEST_SHARE = 5
"""Utterances of at most this part of a batch take part: longer ones would keep packed batches from being filled."""


@dataclass
class Variant:
    """One way to train, and its measurements."""

    name: str
    precision: str
    module: Callable[[], lightning.LightningModule]
    """Makes the module, with the same weights every time."""
    data: Callable[[], Any]
    """Makes the data module."""
    frames: Callable[[Any], int]
    """Latent frames of a batch, padding not counted."""
    seconds: list[float] = field(default_factory=list)
    """Wall time of each step, the wait for its batch included."""
    trained: list[int] = field(default_factory=list)
    """Latent frames of each step."""
    padding: list[float] = field(default_factory=list)
    """Share of the positions of each step that held nothing."""
    peak_bytes: int = 0
    flop: Callable[[Any], float] | None = None
    """Operations of a step on a batch in the products of the model's layers, forward and back; None where they are not counted."""
    computed: float = 0.0
    """The sum of ``flop`` over the timed steps."""
    problem: str | None = None
    """Why there is nothing to tell."""

    @property
    def rate(self) -> float | None:
        """Latent frames a second; None without a timed step."""
        return sum(self.trained) / sum(self.seconds) if self.seconds else None

    def row(self, first: Variant, limits: Limits) -> dict[str, Any]:
        """The measurements; ``speedup`` is frames a second over that of ``first``, ``flop_utilisation`` the share of the machine's peak."""
        peak = limits.flop_per_second["bfloat16" if self.precision.startswith("bf16") else "float32"]
        return {
            "name": self.name,
            "precision": self.precision,
            "step_milliseconds": 1000 * statistics.median(self.seconds) if self.seconds else None,
            "frames_per_second": self.rate,
            "speedup": self.rate / first.rate if self.rate and first.rate else None,
            "flop_utilisation": self.computed / sum(self.seconds) / peak if self.computed else None,
            "padding_share": statistics.fmean(self.padding) if self.padding else 0.0,
            "peak_bytes": self.peak_bytes,
            "problem": self.problem if self.rate is None else None,
        }


def train(
    stage: Annotated[str, typer.Argument(help="lm or flowvae.")],
    size: Annotated[str, typer.Option(help="Random weights of this configuration: nano, small or full.")] = "nano",
    data: Annotated[Path | None, typer.Option(help="Latent or corpus folder; without one, the embedded corpus.")] = None,
    positions: Annotated[int, typer.Option(min=64, help="lm: positions in a batch.")] = 2000,
    batch: Annotated[int, typer.Option(min=1, help="flowvae: crops in a batch.")] = 8,
    segment_frames: Annotated[int, typer.Option(min=1, help="flowvae: latent frames of a crop.")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of a turn.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of each way to train, one after the other.")] = 3,
    minutes: Annotated[
        float, typer.Option(help="Share this time out among the turns; each ends with the step in which its share is over.")
    ] = 10.0,
    compiled: Annotated[bool, typer.Option("--compile", help="Also with torch.compile.")] = False,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="CPU threads; by default torch's choice.")] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the rows and the machine to this JSON file.")] = None,
) -> None:
    """Time training steps: padded and packed rows, fp32 and bf16, and the loader alone."""
    if stage not in STAGES:
        raise UserError(f"kalle bench train: got '{stage}', expected {' or '.join(STAGES)}")
    with interruptible(), tempfile.TemporaryDirectory() as folder:
        import torch

        from kalle.checkpoint import resolve_device
        from kalle.cli.bench_common import warn_of_load
        from kalle.data.loading.datamodules import measure_loader
        from kalle.evaluation.limits import load_average, measure_limits

        logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", module="lightning")
        if threads is not None:
            torch.set_num_threads(threads)
        resolved = resolve_device(device)
        if stage == "lm":
            variants = _lm_variants(size, data, Path(folder), positions, workers, compiled)
        else:
            variants = _flowvae_variants(size, data, Path(folder), batch, segment_frames, workers, compiled, resolved)
        warn_of_load(load_average())
        limits = measure_limits(resolved)
        turns, ends = [variant for _ in range(rounds) for variant in variants], time.perf_counter() + 60 * minutes
        for number, variant in enumerate(turns):
            now = time.perf_counter()
            _turn(variant, resolved, steps, now + max(0.0, ends - now) / (len(turns) - number))
        rows = [variant.row(variants[0], limits) for variant in variants]
        typer.echo(f"{'way to train':<24}{'step':>10}{'frames/s':>10}{'x first':>9}{'of peak':>9}{'padding':>9}{'memory':>10}")
        for row in rows:
            typer.echo(_line(row))
        loader = measure_loader(variants[-1].data(), 40, workers)
        typer.echo(f"loader alone ({workers} workers): {loader.items_per_second:.1f} items/s")
        if out is not None:
            _write(out, rows, {**asdict(loader), "workers": workers}, resolved)


def _line(row: Mapping[str, Any]) -> str:
    """One row of the table."""
    if row["problem"] is not None:
        return f"{row['name']:<24}{row['problem']}"
    rate = f"{row['step_milliseconds']:>7.0f} ms{row['frames_per_second']:>10.0f}"
    ratio, share = (
        f"{'-':>9}" if row[key] is None else format(row[key], kind) for key, kind in (("speedup", ">9.2f"), ("flop_utilisation", ">9.1%"))
    )
    return f"{row['name']:<24}{rate}{ratio}{share}{row['padding_share']:>9.1%}{row['peak_bytes'] / 2**20:>7.0f} MB"


def _turn(variant: Variant, device: torch.device, steps: int, ends: float) -> None:
    """``steps`` timed steps behind some that are not, as far as they begin before ``ends`` on the clock; a way that needs more memory
    than the device has is not tried again."""
    import lightning
    import torch
    from lightning.pytorch.callbacks import Callback

    from kalle.evaluation.benchmark import PeakMemory

    class StepClock(Callback):
        """Times from the end of one step to the end of the next."""

        last = 0.0

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            now = time.perf_counter()
            # Where there is no time to warm up, the last of several slow steps tells more than nothing.
            last_chance = now >= ends and not variant.seconds and self.last > 0
            if trainer.global_step > WARMUP or last_chance:
                variant.seconds.append(now - self.last)
                variant.trained.append(variant.frames(batch))
                variant.computed += 0.0 if variant.flop is None else variant.flop(batch)
                share = trainer.callback_metrics.get("train/padding_share")
                variant.padding += [] if share is None else [float(share)]
            self.last = now
            trainer.should_stop = trainer.should_stop or now >= ends

    precision: Any = variant.precision
    trainer = lightning.Trainer(
        max_steps=WARMUP + steps, max_epochs=-1, accelerator="gpu" if device.type == "cuda" else "cpu", devices=1,
        precision=precision, callbacks=[StepClock()], logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, limit_val_batches=0,
    )  # fmt: skip
    if variant.problem == OUT_OF_MEMORY or (variant.problem or "").startswith("failed"):
        return
    variant.problem = "no step was timed: give it more --minutes"
    with PeakMemory(device) as memory:
        try:
            trainer.fit(variant.module(), variant.data().train_dataloader(), weights_only=True)
        except torch.OutOfMemoryError:
            variant.problem = OUT_OF_MEMORY
        except Exception as error:
            # Kernels that have run nowhere yet must not cost the other rows.
            if not variant.name.endswith("triton"):
                raise
            variant.problem = f"failed: {' '.join(str(error).split())[:200]}"
    variant.peak_bytes = max(variant.peak_bytes, memory.bytes)


def _lm_variants(size: str, latents: Path | None, folder: Path, positions: int, workers: int, compiled: bool) -> list[Variant]:
    """Padded rows in batches of like length, packed rows, then in bf16, then compiled."""
    import torch

    from kalle.models.lm import KalleLM, compile_layers
    from kalle.models.lm_batch import LMBatch, Packing
    from kalle.text.tokenizer import Tokenizer
    from kalle.training import AdamWConfig, LMDataConfig, LMObjective, WarmupCosine
    from kalle.training.lm import KalleLMTraining

    config = _configuration("lm", size)
    source, shorter = latents or _encoded(folder, config.latent_dim), max(1, positions // LONGEST_SHARE)
    values = LMDataConfig(latents=str(source), max_positions=positions, drop_longer_than=shorter, cache=True, num_workers=workers)
    torch.manual_seed(SEED)
    lm = KalleLM(config)

    def module(packing: Packing | None, fast: bool) -> KalleLMTraining:
        own = copy.deepcopy(lm)
        if fast:
            compile_layers(own)
        return KalleLMTraining(own, AdamWConfig(1e-4), WarmupCosine(100, 10**6), LMObjective(), SEED, packing=packing)

    tokenizer = Tokenizer.bytes()

    def frames(batch: LMBatch) -> int:
        return int(batch.latent_lengths.sum())

    def flop(batch: LMBatch) -> float:
        positions = int(batch.text_lengths.sum() + batch.latent_lengths.sum())
        return 6.0 * lm.backbone.config.layer_parameters * positions

    ways: list[tuple[str, str, Packing | None, bool]] = [("padded", "32-true", None, False), ("packed", "32-true", Packing(), False)]
    ways += [("packed, bf16", "bf16-mixed", Packing(), False)]
    ways += [("packed, bf16, compiled", "bf16-mixed", Packing(), True)] if compiled else []
    return [
        Variant(
            name, precision, partial(module, packing, fast), partial(values.module, tokenizer, SEED, packing is not None), frames, flop=flop
        )
        for name, precision, packing, fast in ways
    ]


def _flowvae_variants(
    size: str,
    corpus: Path | None,
    folder: Path,
    batch: int,
    segment_frames: int,
    workers: int,
    compiled: bool,
    device: torch.device,
) -> list[Variant]:
    """The adversarial step in fp32 and in bf16, each also with fused activations where the decoder has them, then compiled."""
    import torch

    from kalle.models.discriminators import DiscriminatorConfig, Discriminators
    from kalle.models.flowvae import BigVGANConfig, FlowVAE
    from kalle.models.flowvae.bigvgan import set_way
    from kalle.models.flowvae.training_activation import why_not
    from kalle.models.lm_batch import WaveBatch
    from kalle.training import AdamWConfig, ClipSchedule, FlowVAEDataConfig, FlowVAEObjective, WarmupCosine
    from kalle.training.flowvae import FlowVAETraining

    config, source = _configuration("flowvae", size), corpus or _prepared(folder)
    samples = segment_frames * config.hop_length
    values = FlowVAEDataConfig(corpus=str(source), segment_samples=samples, batch_size=batch, cache=True, num_workers=workers)
    torch.manual_seed(SEED)
    flowvae, discriminators = FlowVAE(config), Discriminators(DiscriminatorConfig(width=1.0 if size == "full" else 0.25))

    def module(way: str, fast: bool) -> FlowVAETraining:
        networks = copy.deepcopy(flowvae), copy.deepcopy(discriminators)
        set_way(networks[0], way, device)
        made = FlowVAETraining(
            networks[0], AdamWConfig(1e-4), WarmupCosine(100, 10**6), FlowVAEObjective(), ClipSchedule(), networks[1], seed=SEED
        )
        if fast:
            made.compile_networks()
        return made

    def frames(batch: WaveBatch) -> int:
        return batch.wav.numel() // config.hop_length

    fused = "triton" if device.type == "cuda" else "numba"
    has_fused = isinstance(config.decoder, BigVGANConfig) and why_not(fused, device) is None
    ways = [
        (f"{name}, {way}" if way != "none" else name, precision, way, False)
        for name, precision in (("fp32", "32-true"), ("bf16", "bf16-mixed"))
        for way in (("none", fused) if has_fused else ("none",))
    ]
    ways += [("bf16, compiled", "bf16-mixed", "none", True)] if compiled else []
    data = partial(values.module, config, SEED)
    return [Variant(name, precision, partial(module, way, fast), data, frames) for name, precision, way, fast in ways]


def _configuration(part: str, size: str) -> Any:
    from kalle.cli.bench_common import Size, configuration

    if size not in tuple(Size):
        raise UserError(f"--size: got '{size}', expected {', '.join(Size)}")
    return configuration(part, Size(size))


def _prepared(folder: Path) -> Path:
    """The embedded corpus: real texts and lengths."""
    from kalle.data.corpus.items import PrepareOptions
    from kalle.data.corpus.lists import embedded_folder, read_embedded
    from kalle.data.corpus.prepare import prepare_corpus

    return prepare_corpus(read_embedded(embedded_folder()), folder / "corpus", PrepareOptions(max_seconds=120.0)).folder


def _encoded(folder: Path, latent_dim: int) -> Path:
    """Latents of the embedded corpus under a small random encoder of ``latent_dim`` dimensions."""
    import dataclasses

    import torch

    from kalle.data.latents.encode import EncodingConfig, encode
    from kalle.models.flowvae import FlowVAE

    torch.manual_seed(SEED)
    FlowVAE(dataclasses.replace(_configuration("flowvae", "nano"), latent_dim=latent_dim)).save_pretrained(folder / "weights")
    corpus, weights = _prepared(folder), folder / "weights"
    encode(EncodingConfig(flowvae=weights, corpus=corpus, out=folder / "latents", splits=("train", "valid"), device="cpu"))
    return folder / "latents"


def _write(out: Path, rows: list[dict[str, Any]], loader: dict[str, Any], device: torch.device) -> None:
    import torch

    from kalle.checkpoint import device_name
    from kalle.cli.bench_common import write

    write(out, {"torch": torch.__version__, "device": device_name(device), "threads": torch.get_num_threads(), "loader": loader}, rows)
