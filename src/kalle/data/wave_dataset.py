"""Audio for the Flow-VAE: random crops for training, whole utterances for validation."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
import torch
from lhotse.cut import Cut
from torch.utils.data import Dataset

from kalle.data.columns import starts_of
from kalle.data.joining import load_audio
from kalle.data.sampling import Visit, numpy_generator
from kalle.errors import UserError
from kalle.models.batch import WaveBatch

logger = logging.getLogger(__name__)

ShortCuts = Literal["join", "pad"]


class Waves(Protocol):
    """Audio by number."""

    def __len__(self) -> int: ...

    @property
    def shard(self) -> np.ndarray | None:
        """Shard of each cut, (N,) int32, never falling; None where there are none."""
        ...

    def name(self, index: int) -> str:
        """The id of cut ``index``."""
        ...

    def lengths(self) -> np.ndarray:
        """Samples of each cut as its manifest says, (N,) int64; reading may differ by one after resampling."""
        ...

    def audio(self, index: int) -> np.ndarray:
        """The audio of cut ``index``, float32 (S,)."""
        ...


class WaveReader:
    """Reads the audio of cuts; with ``cache`` every cut is decoded once, in advance, and kept as float32 (3.8 MB a minute at 16 kHz)."""

    shard = None

    def __init__(self, cuts: Sequence[Cut], sample_rate_hz: int, *, cache: bool = False) -> None:
        self.cuts, self.sample_rate_hz = list(cuts), sample_rate_hz
        self._cache = [load_audio(cut, sample_rate_hz) for cut in self.cuts] if cache else None

    def __len__(self) -> int:
        return len(self.cuts)

    def name(self, index: int) -> str:
        """The id of cut ``index``."""
        return str(self.cuts[index].id)

    def lengths(self) -> np.ndarray:
        """Samples of each cut as its manifest says, (N,) int64; reading may differ by one after resampling."""
        return np.array([round(cut.duration * self.sample_rate_hz) for cut in self.cuts], np.int64)

    def audio(self, index: int) -> np.ndarray:
        """The audio of cut ``index``, float32 (S,)."""
        return load_audio(self.cuts[index], self.sample_rate_hz) if self._cache is None else self._cache[index]


class JoinedWaves:
    """The cuts of several corpora in turn."""

    def __init__(self, parts: Sequence[Waves]) -> None:
        self.parts = list(parts)
        self._starts = starts_of(np.array([len(part) for part in parts]))
        shards = [part.shard for part in parts]
        self.shard: np.ndarray | None = None
        if all(shard is not None for shard in shards):
            filled, numbers = 0, []
            for shard in shards:
                assert shard is not None
                numbers.append(shard + np.int32(filled))
                filled = int(numbers[-1].max()) + 1
            self.shard = np.concatenate(numbers)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def source(self) -> np.ndarray:
        """Which of the corpora each cut is of, (N,) int16."""
        return np.repeat(np.arange(len(self.parts), dtype=np.int16), np.diff(self._starts))

    def name(self, index: int) -> str:
        """The id of cut ``index``."""
        part, inside = self._place(index)
        return part.name(inside)

    def lengths(self) -> np.ndarray:
        """Samples of each cut as its manifest says, (N,) int64."""
        return np.concatenate([part.lengths() for part in self.parts])

    def audio(self, index: int) -> np.ndarray:
        """The audio of cut ``index``, float32 (S,)."""
        part, inside = self._place(index)
        return part.audio(inside)

    def _place(self, index: int) -> tuple[Waves, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.parts[number], index - int(self._starts[number])


class CropDataset(Dataset):
    """Random crops of ``segment_samples``; ``dataset[visits]`` is the `WaveBatch` of those visits.

    A cut of n segments gives ceil(n) crops an epoch, so that an epoch is about one pass over the audio, not over the files. A cut
    shorter than a segment is continued: ``join`` appends other cuts, drawn at random, after a short silence; ``pad`` appends zeros. All
    draws are functions of (seed, epoch, cut id, number of the crop, repetition within the epoch). ``short_cuts`` counts the cuts that are
    continued; ``near`` draws what continues a cut from its own shard.
    """

    def __init__(
        self,
        reader: Waves,
        segment_samples: int,
        *,
        seed: int = 0,
        short: ShortCuts = "join",
        gap_samples: tuple[int, int] = (1600, 4800),
        near: bool = False,
    ) -> None:
        if short not in ("join", "pad"):
            raise UserError(f"short: got {short!r}, expected 'join' or 'pad'; correct the configuration")
        self.reader, self.segment_samples, self.seed = reader, segment_samples, seed
        self.short, self.gap_samples = short, gap_samples
        self.near = reader.shard if near else None
        lengths = reader.lengths()
        self.crops = np.maximum(1, -(-lengths // segment_samples))
        """Crops of each cut an epoch, (N,) int64."""
        self._starts = starts_of(self.crops)
        self.short_cuts = int((lengths < segment_samples).sum())
        logger.info("%d crops an epoch from %d cuts, %d of them shorter than a crop (%s)", len(self), len(reader), self.short_cuts, short)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, visits: Sequence[Visit]) -> WaveBatch:
        places = [self._place(visit) for visit in visits]
        wav = np.stack([self._crop(visit.epoch, *place) for visit, place in zip(visits, places, strict=True)])
        names = tuple(self.reader.name(cut) for cut, _, _ in places)
        numbers = tuple(number + repetition * int(self.crops[cut]) for cut, number, repetition in places)
        return WaveBatch(torch.from_numpy(wav), names, numbers)

    def _place(self, visit: Visit) -> tuple[int, int, int]:
        """Cut, number of the crop, and repetition, which only a mixture counts above 0."""
        repetition, crop = divmod(visit.item, len(self))
        cut = int(np.searchsorted(self._starts, crop, side="right")) - 1
        return cut, crop - int(self._starts[cut]), repetition

    def _crop(self, epoch: int, cut: int, number: int, repetition: int) -> np.ndarray:
        key = ("crop", self.seed, epoch, self.reader.name(cut), number)
        generator = numpy_generator(*(key if not repetition else (*key, repetition)))
        audio = self.reader.audio(cut)
        if len(audio) < self.segment_samples:
            audio = self._continued(cut, audio, generator)
        start = int(generator.integers(0, len(audio) - self.segment_samples + 1))
        return audio[start : start + self.segment_samples]

    def _continued(self, cut: int, audio: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """``audio`` followed by other cuts, or zeros, to at least a segment; empty cuts cannot loop for ever, since gaps add up."""
        if self.short == "pad":
            return np.pad(audio, (0, self.segment_samples - len(audio)))
        low, high = 0, len(self.reader)
        if self.near is not None:
            low, high = (int(np.searchsorted(self.near, self.near[cut], side=side)) for side in ("left", "right"))  # type: ignore[call-overload]
        pieces, filled = [audio], len(audio)
        while filled < self.segment_samples:
            gap = np.zeros(int(generator.integers(max(1, self.gap_samples[0]), self.gap_samples[1] + 1)), np.float32)
            following = self.reader.audio(int(generator.integers(low, high)))
            pieces += [gap, following]
            filled += len(gap) + len(following)
        return np.concatenate(pieces)


class WholeDataset(Dataset):
    """Whole utterances, one a batch: the encoder sees seconds to both sides, and padding would change what it says."""

    def __init__(self, reader: Waves) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, visits: Sequence[Visit]) -> WaveBatch:
        assert len(visits) == 1, len(visits)
        index = visits[0].item
        return WaveBatch(torch.from_numpy(self.reader.audio(index))[None], (self.reader.name(index),))
