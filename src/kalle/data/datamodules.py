"""Lightning's view of the data: one module per training stage.

Batches are functions of (seed, epoch, rank), whatever the number of workers, and a checkpoint taken in the middle of an epoch
continues behind its last batch (`ResumableLoader`). The samplers split batches over ranks themselves, so the trainer must be
built with ``use_distributed_sampler=False``.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import lightning
from torch.utils.data import Dataset

from kalle.data.corpus_cuts import load_cuts
from kalle.data.latent_dataset import LatentDataset, SpeakerConfig
from kalle.data.loader import ResumableLoader, rank_and_world_size
from kalle.data.sampling import BudgetPlan, ConstantSampler, EpochSampler, FixedSizePlan, Plan
from kalle.data.wave_dataset import CropDataset, ShortCuts, WaveReader, WholeDataset
from kalle.errors import UserError
from kalle.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

TRAIN, VALID, TEST = "train", "valid", "test"


class _DataModule(lightning.LightningDataModule):
    """Loaders over data sets that put whole batches together."""

    def __init__(self, num_workers: int, pin_memory: bool) -> None:
        super().__init__()
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def _loader(self, dataset: Dataset, sampler: EpochSampler | ConstantSampler) -> ResumableLoader:
        return ResumableLoader(dataset, sampler, num_workers=self.num_workers, pin_memory=self.pin_memory)

    def _training_loader(self, dataset: Dataset, plan: Plan) -> ResumableLoader:
        rank, world_size = rank_and_world_size()
        sampler = EpochSampler(plan, rank=rank, world_size=world_size)
        if sampler.repeated:
            logger.info("%d batches are repeated every epoch, so that %d ranks make equally many steps", sampler.repeated, world_size)
        return self._loader(dataset, sampler)

    def _constant_loader(self, dataset: Dataset, batches: list[list[int]]) -> ResumableLoader:
        rank, world_size = rank_and_world_size()
        return self._loader(dataset, ConstantSampler(batches, rank=rank, world_size=world_size))


class FlowVAEDataModule(_DataModule):
    """Random crops of a corpus for training, whole utterances one at a time for validation and test; batches are `WaveBatch`."""

    def __init__(
        self,
        corpus: str | Path,
        segment_samples: int,
        batch_size: int,
        *,
        hop_length: int = 1280,
        sample_rate_hz: int = 16000,
        seed: int = 0,
        short: ShortCuts = "join",
        gap_seconds: Sequence[float] = (0.1, 0.3),
        cache: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """``corpus`` is a folder that ``kalle prepare`` wrote; ``hop_length`` (samples) and the rate are the Flow-VAE's.

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
        self.corpus, self.segment_samples, self.batch_size = Path(corpus), segment_samples, batch_size
        self.sample_rate_hz, self.seed, self.short, self.cache = sample_rate_hz, seed, short, cache
        self.gap_samples = (round(gap_seconds[0] * sample_rate_hz), round(gap_seconds[1] * sample_rate_hz))
        self._readers: dict[str, WaveReader] = {}

    def reader(self, split: str) -> WaveReader:
        """The audio of one split, decoded at most once when cached."""
        if split not in self._readers:
            cuts = load_cuts(self.corpus, split)
            if not cuts:
                raise UserError(f"no cuts in the split '{split}' of '{self.corpus}'; prepare a larger corpus")
            self._readers[split] = WaveReader(cuts, self.sample_rate_hz, cache=self.cache)
        return self._readers[split]

    def train_dataloader(self) -> ResumableLoader:
        """Batches of ``batch_size`` crops; ``wav`` is (B, segment_samples)."""
        dataset = CropDataset(self.reader(TRAIN), self.segment_samples, seed=self.seed, short=self.short, gap_samples=self.gap_samples)
        return self._training_loader(dataset, FixedSizePlan(len(dataset), self.batch_size, seed=self.seed))

    def val_dataloader(self) -> ResumableLoader:
        """Whole utterances of the validation split, ``wav`` (1, S)."""
        return self._whole(VALID)

    def test_dataloader(self) -> ResumableLoader:
        """Whole utterances of the test split, ``wav`` (1, S)."""
        return self._whole(TEST)

    def _whole(self, split: str) -> ResumableLoader:
        dataset = WholeDataset(self.reader(split))
        return self._constant_loader(dataset, [[index] for index in range(len(dataset))])


class LMDataModule(_DataModule):
    """Texts and fresh posterior samples of a latent folder, batched by a budget of positions; batches are `LMBatch`."""

    def __init__(
        self,
        latents: str | Path,
        tokenizer: Tokenizer,
        max_positions: int,
        *,
        drop_longer_than: int | None = None,
        max_items: int | None = None,
        buckets: int = 30,
        seed: int = 0,
        speaker: SpeakerConfig | None = None,
        cache: bool = False,
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        """``latents`` is a folder that ``kalle encode`` wrote.

        ``max_positions`` bounds text, latents and padding of a batch together, ``max_items`` its utterances; utterances of more than
        ``drop_longer_than`` positions (at most the budget) are left out, counted and logged.
        """
        super().__init__(num_workers, pin_memory)
        if max_positions < 1 or buckets < 1 or (max_items is not None and max_items < 1):
            got = f"max_positions={max_positions}, max_items={max_items}, buckets={buckets}"
            raise UserError(f"batches: got {got}, expected at least 1; correct them")
        self.latents, self.tokenizer, self.max_positions = Path(latents), tokenizer, max_positions
        self.drop_longer_than = max_positions if drop_longer_than is None else min(drop_longer_than, max_positions)
        self.max_items, self.buckets, self.seed, self.speaker, self.cache = max_items, buckets, seed, speaker, cache
        self._datasets: dict[str, LatentDataset] = {}

    def dataset(self, split: str) -> LatentDataset:
        """The utterances of one split, read once."""
        if split not in self._datasets:
            self._datasets[split] = LatentDataset(
                self.latents,
                split,
                self.tokenizer,
                seed=self.seed,
                max_positions=self.drop_longer_than,
                speaker=self.speaker,
                cache=self.cache,
            )
        return self._datasets[split]

    def plan(self, split: str, *, shuffle: bool) -> BudgetPlan:
        """The batches of one split."""
        dataset = self.dataset(split)
        return BudgetPlan(
            dataset.text_lengths,
            dataset.audio_lengths,
            max_positions=self.max_positions,
            max_items=self.max_items,
            buckets=self.buckets,
            shuffle=shuffle,
            seed=self.seed,
        )

    def train_dataloader(self) -> ResumableLoader:
        """Every training utterance once an epoch, with fresh latents."""
        return self._training_loader(self.dataset(TRAIN), self.plan(TRAIN, shuffle=True))

    def val_dataloader(self) -> ResumableLoader:
        """The validation split: the same batches and the same latents every time."""
        return self._constant(VALID)

    def test_dataloader(self) -> ResumableLoader:
        """The test split: the same batches and the same latents every time."""
        return self._constant(TEST)

    def _constant(self, split: str) -> ResumableLoader:
        return self._constant_loader(self.dataset(split), self.plan(split, shuffle=False)(0))
