"""The configuration of a training: plain dataclasses, filled by hand or by Hydra. Every default stands here; configs/ names differences."""

# ruff: noqa: RUF009 - the defaults are frozen dataclasses

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from torch import nn

from kalle.checkpoint import as_tuple, check_fields, check_range, resolve_device
from kalle.data.loading.datamodules import FlowVAEDataModule, LMDataModule, Sources
from kalle.data.loading.datasets import ShortCuts, SpeakerConfig
from kalle.errors import UserError
from kalle.models.discriminators import DiscriminatorConfig
from kalle.models.flowvae import FlowVAEConfig
from kalle.models.lm import KalleLMConfig
from kalle.models.lm_batch import Packing
from kalle.models.lora import LoRAConfig
from kalle.text.tokenizer import Tokenizer
from kalle.training.callbacks import KINDS
from kalle.training.checkpointing import CheckpointConfig
from kalle.training.flowvae import ClipSchedule, FlowVAEObjective
from kalle.training.lm import LMObjective
from kalle.training.optimisation import AdamWConfig, Exponential, OptimizerFactory, SchedulerFactory, WarmupCosine
from kalle.training.update_guard import GuardConfig


@dataclass(frozen=True)
class TrainerConfig:
    """How long a training is, how often it validates, and on how many devices it runs. Names and meanings are Lightning's."""

    max_steps: int = 1_000_000
    """Updates of the whole run; -1 with max_epochs."""
    max_epochs: int | None = -1
    """Passes over the data; -1: as many as the steps take."""
    val_check_interval: int | float = 5000
    """Training batches between two validations."""
    check_val_every_n_epoch: int | None = None
    """With a number val_check_interval counts within an epoch."""
    limit_val_batches: int | float = 1.0
    """Of the validation split: a share, or a number of batches per process."""
    num_sanity_val_steps: int = 0
    """Validation batches tried before the first step."""
    log_every_n_steps: int = 50
    """Updates between two rows of the log."""
    gradient_clip_val: float | None = None
    """Largest gradient norm of the language model; null: no limit. The Flow-VAE has clip.norm."""
    accumulate_grad_batches: int = 1
    """Batches of an update."""
    devices: int | str | list[int] = "auto"
    """Number of devices, their numbers, or auto."""
    num_nodes: int = 1
    """Machines that take part."""
    strategy: str = "auto"
    """auto; ddp: the whole model on every device; fsdp2: the language model sharded over the devices."""
    benchmark: bool = False
    """Let cuDNN try out kernels."""
    deterministic: bool = False
    """Refuse operations that are not deterministic."""

    def __post_init__(self) -> None:
        check_fields(self, "trainer")
        steps, endless = self.max_steps, self.max_steps == -1 and self.max_epochs in (None, -1)
        if steps == 0 or steps < -1 or endless:
            raise UserError(f"trainer.max_steps: got {steps}, expected at least 1 (or -1 with trainer.max_epochs); correct it")
        if self.max_epochs != -1:
            check_range(self, "trainer", "max_epochs", least=1)
        check_range(self, "trainer", "log_every_n_steps")
        counted = ("check_val_every_n_epoch", "accumulate_grad_batches", "num_nodes")
        check_range(self, "trainer", *counted, least=1)
        check_range(self, "trainer", "num_sanity_val_steps", least=-1)
        check_range(self, "trainer", "gradient_clip_val")
        share = isinstance(self.val_check_interval, float)
        check_range(self, "trainer", "val_check_interval", least=0 if share else 1, most=1 if share else math.inf, above=share)
        check_range(self, "trainer", "limit_val_batches", most=1 if isinstance(self.limit_val_batches, float) else math.inf)


@dataclass(frozen=True)
class ProgressConfig:
    """A bar over all steps on a terminal, lines elsewhere."""

    log_every_seconds: float = 30.0
    """Between two lines, where there is no terminal."""

    def __post_init__(self) -> None:
        check_fields(self, "callbacks.progress")
        check_range(self, "callbacks.progress", "log_every_seconds")


@dataclass(frozen=True)
class EMAConfig:
    """An exponential average of the weights, which is what is validated and exported."""

    decay: float = 0.9999
    """Of the average at every update."""

    def __post_init__(self) -> None:
        check_fields(self, "callbacks.ema")
        check_range(self, "callbacks.ema", "decay", most=1)


@dataclass(frozen=True)
class ReconstructionMediaConfig:
    """Recordings and reconstructions in the logger, as sound and log-mel."""

    utterances: int = 3
    """The first so many of the validation split."""

    def __post_init__(self) -> None:
        check_fields(self, "callbacks.media")
        check_range(self, "callbacks.media", "utterances")


@dataclass(frozen=True)
class MetricsConfig:
    """val/stoi and so on, over the first utterances of the validation split."""

    names: tuple[str, ...] = ("stoi", "pesq_wb", "pesq_nb")
    """Some of stoi, pesq_wb, pesq_nb."""
    utterances: int = 20
    """How many are reconstructed and measured."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "names", as_tuple(self.names))
        check_fields(self, "callbacks.metrics")
        check_range(self, "callbacks.metrics", "utterances", least=1)


@dataclass(frozen=True)
class SpeechMediaConfig:
    """Texts that are spoken at every validation, into the logger, where flowvae is given."""

    texts: tuple[str, ...] = ("Hello, this is a test.", "Your call is important to us.")
    """One sound each."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "texts", as_tuple(self.texts))
        check_fields(self, "callbacks.media")


@dataclass(frozen=True, kw_only=True)
class TrainingCallbacks:
    """Callbacks of a training; null switches one off."""

    progress: ProgressConfig | None = ProgressConfig()
    checkpoint: CheckpointConfig | None = CheckpointConfig()
    guard: GuardConfig | None = GuardConfig()
    """Skips updates that would ruin the weights."""
    lr: bool | None = True
    """Log the learning rate."""
    ema: EMAConfig | None = EMAConfig()

    def __post_init__(self) -> None:
        check_fields(self, "callbacks")


@dataclass(frozen=True, kw_only=True)
class LMCallbacks(TrainingCallbacks):
    """Beside the steps of a language model."""

    media: SpeechMediaConfig | None = SpeechMediaConfig()


@dataclass(frozen=True, kw_only=True)
class FlowVAECallbacks(TrainingCallbacks):
    """Beside the steps of a Flow-VAE."""

    media: ReconstructionMediaConfig | None = ReconstructionMediaConfig()
    metrics: MetricsConfig | None = MetricsConfig()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """How the data of either training is read."""

    mix: str | None = None
    """equal: of each folder of a list as many utterances or crops as of the smallest, drawn again every epoch."""
    shuffle: str = "items"
    """items: all at once; shards: shard by shard, window_shards at a time, for folders on object stores or slow disks."""
    window_shards: int = 8
    """With shuffle=shards: shards that are mixed with each other."""
    cache: bool = False
    """Decode the whole corpus, or read all latents, into memory once."""
    cache_dir: str | None = None
    """Where shards of a URL are kept on this machine; null reads them in pieces, every time."""
    num_workers: int = 2
    """Processes that load batches ahead."""
    pin_memory: bool = False
    """Load batches into page-locked memory, for a GPU."""

    def __post_init__(self) -> None:
        check_fields(self, "data")
        check_range(self, "data", "num_workers")
        check_range(self, "data", "window_shards", least=1)

    def _arguments(self) -> dict[str, Any]:
        return {part.name: getattr(self, part.name) for part in dataclasses.fields(self)}


@dataclass(frozen=True, kw_only=True)
class FlowVAEDataConfig(DataConfig):
    """Random crops of a corpus for the Flow-VAE."""

    corpus: Sources
    """A folder that `kalle prepare` wrote, or a folder or URL that `kalle data shard` wrote, or a list of them, each alone or as
    {path: DIR, weight: 2.0} or {path: DIR, share: 0.5} (docs/how-to/shards.md)."""
    segment_samples: int = 51200
    """Samples of a crop, a whole number of frames."""
    batch_size: int = 32
    """Crops of a batch."""
    hop_length: int | None = None
    """Samples of a latent frame; null: the Flow-VAE's."""
    sample_rate_hz: int | None = None
    """null: the Flow-VAE's."""
    short: ShortCuts = "join"
    """join: continue short recordings with others after a silence; pad: with zeros."""
    gap_seconds: tuple[float, ...] = (0.1, 0.3)
    """Shortest and longest of these silences."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "gap_seconds", as_tuple(self.gap_seconds))
        super().__post_init__()
        check_range(self, "data", "segment_samples", "batch_size", "hop_length", "sample_rate_hz", least=1)
        if len(self.gap_seconds) != 2 or not 0 <= self.gap_seconds[0] <= self.gap_seconds[1]:
            raise UserError(f"data.gap_seconds: got {list(self.gap_seconds)}, expected two numbers, 0 <= shortest <= longest; correct it")

    def module(self, flowvae: FlowVAEConfig, seed: int) -> FlowVAEDataModule:
        """The data module for a Flow-VAE, whose frames the crops must be cut in; UserError otherwise."""
        found = {"hop_length": flowvae.hop_length, "sample_rate_hz": flowvae.sample_rate}
        for name, unit in (("hop_length", "samples a frame"), ("sample_rate_hz", "samples a second")):
            given, wanted = getattr(self, name), found[name]
            if given not in (None, wanted):
                raise UserError(f"data.{name} is {given} but the Flow-VAE has {wanted} {unit}; set data.{name}={wanted}")
        return FlowVAEDataModule(**{**self._arguments(), **found}, seed=seed)


@dataclass(frozen=True, kw_only=True)
class LMDataConfig(DataConfig):
    """Texts and latents for the language model."""

    latents: Sources
    """A folder or URL that `kalle encode` wrote, or a list of them, each alone or as {path: DIR, weight: 2.0} or
    {path: DIR, share: 0.5} (docs/how-to/shards.md)."""
    max_positions: int = 24000
    """Text, latents and padding of a batch together; with packing there is no padding."""
    drop_longer_than: int | None = 2048
    """Positions of one utterance; longer ones are left out and counted."""
    max_items: int | None = None
    """Utterances of a batch, at most."""
    buckets: int = 30
    """Groups of like length that batches are made of."""
    speaker: SpeakerConfig | None = None
    """Crops for a model with a speaker encoder: data=lm_speaker."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "data", "max_positions", "drop_longer_than", "max_items", "buckets", least=1)

    def module(self, tokenizer: Tokenizer, seed: int, packing: bool) -> LMDataModule:
        """The data module that reads texts with ``tokenizer``."""
        return LMDataModule(**self._arguments(), tokenizer=tokenizer, seed=seed, packing=packing)


@dataclass(frozen=True)
class TokenizerConfig:
    """Where a tokenizer comes from."""

    folder: str | None = None
    """Folder of tokenizer.json, such as `kalle convert tokenizer` makes of Llama 3's; null: bytes."""

    def __post_init__(self) -> None:
        check_fields(self, "tokenizer")

    def load(self) -> Tokenizer:
        """Load the tokenizer, or make that of bytes."""
        return Tokenizer.bytes() if self.folder is None else Tokenizer.load(self.folder)


@dataclass(frozen=True)
class WeightsFolder:
    """Where weights come from."""

    folder: str | None = None
    """NAME, or NAME/flowvae."""

    def __post_init__(self) -> None:
        check_fields(self, "flowvae")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The part that both trainings share."""

    stage: ClassVar[str]

    out: str | Path
    """Folder of checkpoints, logs and, at the end, weights/."""
    seed: int = 0
    """Of weights, order and noise; the same seed gives the same run."""
    device: str = "auto"
    """auto, cpu or cuda."""
    precision: str | int = "auto"
    """fp32 on a CPU, bf16 with fp32 losses on CUDA; or one of Lightning's, such as 32-true or bf16-mixed."""
    resume: str = "auto"
    """auto: continue from the newest whole checkpoint of out/checkpoints when there is one; never; or a checkpoint. A cosine schedule
    ends with trainer.max_steps, so another trainer.max_steps moves the learning rate of every step to come; scheduler.total_steps=N
    keeps it."""
    allow_changes: bool = False
    """Continue a run though its data, seed or objective differ from those it began with."""
    logger: str | tuple[str, ...] | None = "tensorboard"
    """Some of tensorboard, csv, wandb; all; or null."""
    wandb_offline: bool = True
    """wandb needs neither network nor account; false uploads."""
    threads: int | None = None
    """CPU threads; null leaves torch's choice."""
    compile: bool = False
    """torch.compile; the first steps then take minutes."""
    init: str | None = None
    """Weight folder to start from; its model replaces the one described here."""
    freeze: tuple[str, ...] = ()
    """Parameters left as they are, by patterns of names such as encoder.* or backbone.embed_tokens.*."""
    trainer: TrainerConfig = TrainerConfig()
    optimizer: OptimizerFactory
    scheduler: SchedulerFactory
    callbacks: TrainingCallbacks

    def __post_init__(self) -> None:
        object.__setattr__(self, "freeze", as_tuple(self.freeze))
        check_fields(self, "")
        check_range(self, "", "seed", most=2**32 - 1)
        check_range(self, "", "threads", least=1)
        for name in ("lm", "flowvae", "discriminators"):
            _check_parts(getattr(self, name, None), name)

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names of the loggers."""
        if self.logger is None or self.logger == "all":
            return () if self.logger is None else KINDS
        return (self.logger,) if isinstance(self.logger, str) else tuple(self.logger)

    @property
    def schedule(self) -> SchedulerFactory:
        """The scheduler, told how many updates the run has."""
        if isinstance(self.scheduler, WarmupCosine) and self.scheduler.total_steps is None:
            return dataclasses.replace(self.scheduler, total_steps=self.trainer.max_steps)
        return self.scheduler


@dataclass(frozen=True, kw_only=True)
class FlowVAETrainingConfig(TrainingConfig):
    """Training of a Flow-VAE on a corpus; the defaults are the paper's model, weights and schedule (BigVGAN's where it names none)."""

    stage: ClassVar[str] = "flowvae"

    data: FlowVAEDataConfig
    flowvae: FlowVAEConfig = FlowVAEConfig()
    discriminators: DiscriminatorConfig | None = DiscriminatorConfig()
    """null: reconstruction and KL alone."""
    objective: FlowVAEObjective = FlowVAEObjective()
    mel_loss: nn.Module | None = None
    """(real, fake), both (B, S), to a scalar; null: the L1 distance of log-mels at one scale."""
    fused_activation: Literal["auto", "none", "numba", "triton"] = "auto"
    """How the paper's decoder computes its activations: none: by alias_free_torch; numba (CPU, extra fast) or triton (CUDA): in one pass
    that keeps only its input for the backward pass; auto: numba on a CPU that has it, else none."""
    optimizer: OptimizerFactory = AdamWConfig(1e-4, (0.8, 0.99))
    scheduler: SchedulerFactory = Exponential()
    clip: ClipSchedule = ClipSchedule()
    callbacks: FlowVAECallbacks = FlowVAECallbacks()

    def __post_init__(self) -> None:
        super().__post_init__()
        clip, batches = self.trainer.gradient_clip_val, self.trainer.accumulate_grad_batches
        if clip is not None:
            raise UserError(f"trainer.gradient_clip_val: got {clip}, expected null: the Flow-VAE clips for itself; set clip.norm={clip}")
        if batches != 1:
            raise UserError(
                f"trainer.accumulate_grad_batches: got {batches}, expected 1: the Flow-VAE steps and clips (clip.norm) at every batch; "
                f"raise data.batch_size to {batches} times itself"
            )


@dataclass(frozen=True, kw_only=True)
class LMTrainingConfig(TrainingConfig):
    """Training of a language model on the latents of a corpus; the defaults are those of the authors' scripts."""

    stage: ClassVar[str] = "lm"

    data: LMDataConfig
    lm: KalleLMConfig | None = None
    """null: the model of init."""
    tokenizer: TokenizerConfig | Tokenizer = TokenizerConfig()
    init_text: str | None = None
    """Hugging Face folder of Llama text weights (config.json, *.safetensors) to start from: its config.json replaces lm.backbone, and rows
    for the tokenizer's additional tokens are drawn like its own. The latent layers start from random weights."""
    flowvae: WeightsFolder = WeightsFolder()
    """flowvae=DIR: the Flow-VAE that made the latents; lets samples be played, and is copied beside the result."""
    lora: LoRAConfig | None = None
    """lora=default: adapters alone train, exported merged and, for `kalle say --adapter`, as weights/adapter."""
    compact_vocabulary: bool | str = "auto"
    """Train and keep optimizer state only for the text tokens of the corpus; auto: for large vocabularies."""
    decay_all: bool = True
    """Weight decay on everything, as the authors' scripts; false: not on norms, biases and the text embedding."""
    packing: bool = False
    """Put utterances one behind the other into rows, each seeing itself alone, in place of padding."""
    row_positions: int | None = 2048
    """With packing: longest row; null: a batch is one row."""
    attention: str = "sdpa"
    """sdpa; on CUDA also flex, which keeps packed utterances apart without a mask."""
    activation_checkpointing: bool = False
    """Less memory for a third more work."""
    objective: LMObjective = LMObjective()
    optimizer: OptimizerFactory = AdamWConfig(5e-5)
    scheduler: SchedulerFactory = WarmupCosine()
    trainer: TrainerConfig = TrainerConfig(gradient_clip_val=1.0)
    callbacks: LMCallbacks = LMCallbacks()

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "", "row_positions", least=1)
        if self.compact_vocabulary not in (True, False, "auto"):
            raise UserError(f"compact_vocabulary: got {self.compact_vocabulary!r}, expected true, false or auto; correct it")
        if self.init is not None and self.init_text is not None:
            raise UserError(f"init: got init='{self.init}' and init_text='{self.init_text}', expected one of them; leave one out")
        if self.init is None and self.lm is None:
            raise UserError("lm: got neither lm nor init, expected the configuration of a model or weights to start from; give one")
        if self.compile and self.objective.alignment_weight:
            raise UserError(
                f"got compile=true and objective.alignment_weight={self.objective.alignment_weight}, expected one of them: "
                "the attention that follows the text is read by hooks, which a compiled layer need not run; leave one out"
            )

    @property
    def rows(self) -> Packing | None:
        """How the rows of a batch are packed, None for padded ones."""
        return Packing(self.row_positions) if self.packing else None


def _check_parts(config: Any, key: str) -> None:
    """`check_fields` of a model's configuration and of the dataclasses in it."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        check_fields(config, key)
        for part in dataclasses.fields(config):
            _check_parts(getattr(config, part.name), f"{key}.{part.name}")


def precision_of(config: TrainingConfig) -> str:
    """The precision of Lightning's that ``config`` means on its device."""
    if config.precision == "auto":
        return "bf16-mixed" if resolve_device(config.device).type == "cuda" else "32-true"
    return str(config.precision)


def plain_values(value: Any) -> Any:
    """``value`` as JSON values: dataclasses become objects, what is no plain value the name of its type."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {part.name: plain_values(getattr(value, part.name)) for part in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, bool | int | float | str | None) else f"{type(value).__module__}.{type(value).__qualname__}"
