"""The data modules of both trainings, and a loader that counts the batches it has handed out, so that a run continues within an epoch."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import lightning
import numpy as np
import torch.distributed
from torch.utils.data import DataLoader, Dataset, Sampler

from kalle.data.corpus.cuts import load_cuts
from kalle.data.latents.mix import check_common, mix_of, mix_parts, mixed_info, weights_of
from kalle.data.latents.shards import read_info
from kalle.data.latents.storage import Folder
from kalle.data.latents.waves import ShardWaves, is_wave_shards
from kalle.data.loading.datasets import CropDataset, JoinedWaves, LatentDataset, ShortCuts, SpeakerConfig, WaveReader, Waves, WholeDataset
from kalle.data.loading.samplers import (
    BatchSampler,
    BudgetBatchSampler,
    ConstantSampler,
    FixedSizeBatchSampler,
    PackedBatchSampler,
    RankSampler,
    one_each,
    windows_of,
)
from kalle.errors import UserError
from kalle.models.lm_batch import LMBatch, WaveBatch
from kalle.text.tokenizer import Tokenizer


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) outside distributed training."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def as_is(batch: Any) -> Any:
    """The batch, which the data set has already put together."""
    return batch


class ResumableLoader(DataLoader):
    """Hands out what ``dataset[list of samples]`` returns, and can continue in the middle of an epoch.

    `state_dict` counts the batches that were handed out, not those that workers have prepared ahead; the trainer stores it in its
    checkpoints, and `load_state_dict` makes the next iteration start behind them.
    """

    def __init__(self, dataset: Dataset, sampler: Sampler, *, num_workers: int = 0, pin_memory: bool = False) -> None:
        super().__init__(
            dataset,
            batch_size=None,
            sampler=sampler,
            collate_fn=as_is,
            num_workers=num_workers,
            pin_memory=pin_memory,
            persistent_workers=num_workers > 0,
        )
        self._delivered = 0
        self._epoch = 0

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator on purpose: Lightning makes its first iterator before it tells the sampler the epoch, so the epoch's batches
        # are not to be looked up before the first one is read.
        if isinstance(self.sampler, RankSampler):
            self._delivered, self._epoch = self.sampler.start, self.sampler.epoch
        batches = super().__iter__()
        # PyTorch asks the sampler for its iterator more than once while it starts workers, so only here is the start used up.
        if isinstance(self.sampler, RankSampler):
            self.sampler.start = 0
        for batch in batches:
            self._delivered += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Epoch and number of batches handed out; empty for validation loaders, which always start anew."""
        if not isinstance(self.sampler, RankSampler):
            return {}
        return self.sampler.state_dict(self._delivered if self._epoch == self.sampler.epoch else 0)

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue after the batches that ``state`` counts."""
        if isinstance(self.sampler, RankSampler):
            self.sampler.load_state_dict(state)
            self._delivered, self._epoch = self.sampler.start, self.sampler.epoch


logger = logging.getLogger(__name__)
TRAIN, VALID, TEST = "train", "valid", "test"
_WELL_FILLED = 0.75
Sources = str | Path | Sequence[str | Path | Mapping[str, Any]]
"""A folder or URL, or several, each alone or as ``{path, weight}`` or ``{path, share}`` (`kalle.data.latents.mix`)."""


class _DataModule(lightning.LightningDataModule):
    """Loaders over data sets that put whole batches together."""

    def __init__(self, num_workers: int, pin_memory: bool) -> None:
        super().__init__()
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def _loader(self, dataset: Dataset, sampler: RankSampler | ConstantSampler) -> ResumableLoader:
        return ResumableLoader(dataset, sampler, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def _training_loader(self, dataset: Dataset, plan: BatchSampler) -> ResumableLoader:
        rank, world_size = rank_and_world_size()
        sampler = RankSampler(plan, rank=rank, world_size=world_size)
        if sampler.split or sampler.repeated:
            logger.info(
                "so that %d ranks make equally many steps, every epoch halves batches %d times and repeats %d batches",
                world_size, sampler.split, sampler.repeated,
            )  # fmt: skip
        return self._loader(dataset, sampler)

    def _constant_loader(self, dataset: Dataset, batches: Sequence[list[int]], split: str) -> ResumableLoader:
        rank, world_size = rank_and_world_size()
        return self._loader(dataset, ConstantSampler(one_each(batches, world_size, split), rank=rank, world_size=world_size))


class FlowVAEDataModule(_DataModule):
    """Random crops of a corpus for training, whole utterances one at a time for validation and test; batches are `WaveBatch`."""

    def __init__(
        self,
        corpus: Sources,
        segment_samples: int,
        batch_size: int,
        *,
        hop_length: int = 1280,
        sample_rate_hz: int = 16000,
        seed: int = 0,
        short: ShortCuts = "join",
        gap_seconds: Sequence[float] = (0.1, 0.3),
        mix: str | None = None,
        shuffle: str = "items",
        window_shards: int = 8,
        cache: bool = False,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """``corpus`` is a folder that ``kalle prepare`` or ``kalle data shard`` wrote, or a mix of several, of which an epoch takes crops.

        ``hop_length`` (samples) and the rate are the Flow-VAE's. ``shuffle`` "shards" reads shard by shard, ``window_shards`` at a time.
        UserError when ``segment_samples`` is no positive multiple of ``hop_length``.
        """
        super().__init__(num_workers, pin_memory)
        if segment_samples <= 0 or segment_samples % hop_length:
            raise UserError(
                f"segment_samples must be a positive multiple of the samples per frame ({hop_length}): got {segment_samples}; "
                f"use {max(1, round(segment_samples / hop_length)) * hop_length}"
            )
        if batch_size < 1:
            raise UserError(f"batch_size: got {batch_size}, expected at least 1; correct it")
        self.sources, self.mix = mix_parts(corpus, "data.corpus", mix), mix
        self.segment_samples, self.batch_size = segment_samples, batch_size
        self.sample_rate_hz, self.seed, self.short, self.cache, self.cache_dir = sample_rate_hz, seed, short, cache, cache_dir
        self.shuffle, self.window_shards = shuffle, window_shards
        self.gap_samples = (round(gap_seconds[0] * sample_rate_hz), round(gap_seconds[1] * sample_rate_hz))
        self._readers: dict[str, JoinedWaves] = {}

    def reader(self, split: str) -> JoinedWaves:
        """The audio of one split, decoded at most once when cached."""
        if split not in self._readers:
            self._readers[split] = JoinedWaves([self._waves(source.path, split) for source in self.sources])
        return self._readers[split]

    def _waves(self, corpus: str, split: str) -> Waves:
        if is_wave_shards(corpus):
            waves: Waves = ShardWaves(Folder(corpus, self.cache_dir), split, self.sample_rate_hz, cache=self.cache)
        else:
            waves = WaveReader(load_cuts(corpus, split), self.sample_rate_hz, cache=self.cache)
        if not len(waves):
            raise UserError(f"no cuts in the split '{split}' of '{corpus}'; prepare a larger corpus")
        return waves

    def train_dataloader(self) -> ResumableLoader:
        """Batches of ``batch_size`` crops; ``wav`` is (B, segment_samples)."""
        reader = self.reader(TRAIN)
        by_shards = self.shuffle == "shards"
        dataset = CropDataset(
            reader, self.segment_samples, seed=self.seed, short=self.short, gap_samples=self.gap_samples, near=by_shards
        )  # fmt: skip
        shard = None if reader.shard is None else np.repeat(reader.shard, dataset.crops)
        mixed = mix_of(self.sources, np.repeat(reader.source(), dataset.crops), self.mix, "crops")
        windows = windows_of(self.shuffle, self.window_shards, shard)
        plan = FixedSizeBatchSampler(len(dataset), self.batch_size, seed=self.seed, mix=mixed, windows=windows)
        return self._training_loader(dataset, plan)

    def val_dataloader(self) -> ResumableLoader:
        """Whole utterances of the validation split, ``wav`` (1, S)."""
        return self._whole(VALID)

    def test_dataloader(self) -> ResumableLoader:
        """Whole utterances of the test split, ``wav`` (1, S)."""
        return self._whole(TEST)

    def _whole(self, split: str) -> ResumableLoader:
        dataset = WholeDataset(self.reader(split))
        return self._constant_loader(dataset, [[index] for index in range(len(dataset))], split)


class LMDataModule(_DataModule):
    """Texts and fresh posterior samples of a latent folder, batched by a budget of positions; batches are `LMBatch`."""

    def __init__(
        self,
        latents: Sources,
        tokenizer: Tokenizer,
        max_positions: int,
        *,
        drop_longer_than: int | None = None,
        max_items: int | None = None,
        buckets: int = 30,
        seed: int = 0,
        speaker: SpeakerConfig | None = None,
        mix: str | None = None,
        shuffle: str = "items",
        window_shards: int = 8,
        packing: bool = False,
        cache: bool = False,
        cache_dir: str | Path | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """``latents`` is a folder that ``kalle encode`` wrote, or a mix of several, of which an epoch takes utterances.

        ``shuffle`` "shards" reads shard by shard, ``window_shards`` at a time.
        ``max_positions`` bounds text, latents and padding of a batch together, ``max_items`` its utterances; utterances of more than
        ``drop_longer_than`` positions (at most the budget) are left out, counted and logged. With ``packing`` the budget holds no
        padding, and training batches mix utterances of all lengths.
        """
        super().__init__(num_workers, pin_memory)
        if max_positions < 1 or buckets < 1 or (max_items is not None and max_items < 1):
            got = f"max_positions={max_positions}, max_items={max_items}, buckets={buckets}"
            raise UserError(f"batches: got {got}, expected at least 1; correct them")
        self.sources, self.mix = mix_parts(latents, "data.latents", mix), mix
        self.latents = ", ".join(source.path for source in self.sources)
        self.tokenizer, self.max_positions = tokenizer, max_positions
        self.drop_longer_than = max_positions if drop_longer_than is None else min(drop_longer_than, max_positions)
        self.max_items, self.buckets, self.seed, self.speaker, self.packing = max_items, buckets, seed, speaker, packing
        self.shuffle, self.window_shards, self.cache, self.cache_dir = shuffle, window_shards, cache, cache_dir
        self._datasets: dict[str, LatentDataset] = {}

    @cached_property
    def _infos(self) -> dict[str, dict[str, Any]]:
        infos = {source.path: read_info(source.path) for source in self.sources}
        check_common(infos)
        return infos

    def info(self) -> dict[str, Any]:
        """The info.json of the latents, of a mix with the statistics of its training frames."""
        counts = np.bincount(self.dataset(TRAIN).source, minlength=len(self.sources)).tolist()
        return mixed_info(list(self._infos.values()), weights_of(self.sources, counts, self.mix))

    def dataset(self, split: str) -> LatentDataset:
        """The utterances of one split, read once; only for training must all folders of a mix have some."""
        if split not in self._datasets:
            having = [path for path, info in self._infos.items() if split in info["splits"]]
            self._datasets[split] = LatentDataset(
                having if having and split != TRAIN else list(self._infos),
                split,
                self.tokenizer,
                seed=self.seed,
                max_positions=self.drop_longer_than,
                speaker=self.speaker,
                cache=self.cache,
                cache_dir=self.cache_dir,
            )
        return self._datasets[split]

    def plan(self, split: str, *, shuffle: bool) -> BudgetBatchSampler | PackedBatchSampler:
        """The batches of one split."""
        dataset = self.dataset(split)
        options: dict[str, Any] = {"max_positions": self.max_positions, "max_items": self.max_items, "shuffle": shuffle, "seed": self.seed}
        if shuffle:
            options["mix"] = mix_of(self.sources, dataset.source, self.mix, "utterances")
            options["windows"] = windows_of(self.shuffle, self.window_shards, dataset.items.shard)
        if self.packing:
            packed = PackedBatchSampler(dataset.text_lengths + dataset.audio_lengths, **options)
            if shuffle and packed.filled < _WELL_FILLED:
                logger.warning(
                    "packed batches are %.0f%% full on average: no order may overflow data.max_positions=%d, and the longest utterance "
                    "is near it; raise it, or lower data.drop_longer_than",
                    100 * packed.filled,
                    self.max_positions,
                )
            return packed
        return BudgetBatchSampler(dataset.text_lengths, dataset.audio_lengths, buckets=self.buckets, **options)

    def train_dataloader(self) -> ResumableLoader:
        """Every training utterance once an epoch, or as often as the mix says, with fresh latents."""
        return self._training_loader(self.dataset(TRAIN), self.plan(TRAIN, shuffle=True))

    def val_dataloader(self) -> ResumableLoader:
        """The validation split: the same batches and the same latents every time."""
        return self._constant(VALID)

    def test_dataloader(self) -> ResumableLoader:
        """The test split: the same batches and the same latents every time."""
        return self._constant(TEST)

    def _constant(self, split: str) -> ResumableLoader:
        return self._constant_loader(self.dataset(split), self.plan(split, shuffle=False)(0), split)


WARM_UP_BATCHES = 3


class Trains(Protocol):
    """The attributes of a data module."""

    num_workers: int

    def train_dataloader(self) -> Any:
        """Batches of one epoch at each iteration."""
        ...


@dataclass(frozen=True)
class LoaderSpeed:
    """The output of a loader in ``seconds``, after a warm-up."""

    workers: int
    batches: int
    items: int
    """Utterances or crops."""
    frames: int
    """Latent frames, or samples of waveforms, without padding."""
    seconds: float
    start_seconds: float
    """From asking for the first batch to having it: reading manifests and starting workers."""

    @property
    def items_per_second(self) -> float:
        """Utterances or crops a second."""
        return self.items / self.seconds

    @property
    def frames_per_second(self) -> float:
        """Latent frames, or samples, a second."""
        return self.frames / self.seconds


def measure_loader(
    data_module: Trains, batches: int, workers: int, *, warm_up: int = WARM_UP_BATCHES, clock: Callable[[], float] = time.perf_counter
) -> LoaderSpeed:
    """Take ``batches`` training batches from the loader of ``data_module`` with ``workers`` processes, over as many epochs as that takes.

    With workers what they have prepared during the warm-up counts too, at most two batches each, so take many more batches than that.
    The number of workers of the module is set and put back. UserError when there is nothing to measure.
    """
    if batches < 1 or workers < 0 or warm_up < 0:
        raise UserError(f"loader: got batches={batches}, workers={workers}, warm_up={warm_up}, expected at least 1, 0 and 0; correct them")
    before = data_module.num_workers
    data_module.num_workers = workers
    try:
        began = clock()
        loader = data_module.train_dataloader()
        stream = _epochs(loader)
        items, frames = _size(next(stream))
        start_seconds = clock() - began
        for _ in range(warm_up):
            next(stream)
        items = frames = 0
        began = clock()
        for _ in range(batches):
            more = _size(next(stream))
            items, frames = items + more[0], frames + more[1]
        seconds = clock() - began
    finally:
        data_module.num_workers = before
    return LoaderSpeed(workers, batches, items, frames, seconds, start_seconds)


def _epochs(loader: Any) -> Any:
    epoch = 0
    while True:
        loader.sampler.set_epoch(epoch)
        yield from loader
        epoch += 1


def _size(batch: LMBatch | WaveBatch) -> tuple[int, int]:
    """Items and frames of a batch."""
    if isinstance(batch, WaveBatch):
        return len(batch.wav), batch.wav.numel()
    return len(batch.latent_lengths), int(batch.latent_lengths.sum())
