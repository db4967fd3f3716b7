"""Audio for the Flow-VAE: random crops for training, whole utterances for validation."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from lhotse.cut import Cut
from torch.utils.data import Dataset

from kalle.data.joining import load_audio
from kalle.data.sampling import Visit, numpy_generator
from kalle.errors import UserError
from kalle.models.batch import WaveBatch

logger = logging.getLogger(__name__)

ShortCuts = Literal["join", "pad"]


class WaveReader:
    """Reads the audio of cuts; with ``cache`` every cut is decoded once, in advance, and kept as float32 (3.8 MB a minute at 16 kHz)."""

    def __init__(self, cuts: Sequence[Cut], sample_rate_hz: int, *, cache: bool = False) -> None:
        self.cuts, self.sample_rate_hz = list(cuts), sample_rate_hz
        self._cache = [load_audio(cut, sample_rate_hz) for cut in self.cuts] if cache else None

    def __len__(self) -> int:
        return len(self.cuts)

    def samples(self, index: int) -> int:
        """Number of samples of cut ``index`` as its manifest says; reading may differ by one after resampling."""
        return round(self.cuts[index].duration * self.sample_rate_hz)

    def audio(self, index: int) -> np.ndarray:
        """The audio of cut ``index``, float32 (S,)."""
        return load_audio(self.cuts[index], self.sample_rate_hz) if self._cache is None else self._cache[index]


class CropDataset(Dataset):
    """Random crops of ``segment_samples``; ``dataset[visits]`` is the `WaveBatch` of those visits.

    A cut of n segments gives ceil(n) crops an epoch, so that an epoch is about one pass over the audio, not over the files. A cut
    shorter than a segment is continued: ``join`` appends other cuts, drawn at random, after a short silence; ``pad`` appends zeros. All
    draws are functions of (seed, epoch, cut id, number of the crop). ``short_cuts`` counts the cuts that are continued.
    """

    def __init__(
        self,
        reader: WaveReader,
        segment_samples: int,
        *,
        seed: int = 0,
        short: ShortCuts = "join",
        gap_samples: tuple[int, int] = (1600, 4800),
    ) -> None:
        if short not in ("join", "pad"):
            raise UserError(f"short: got {short!r}, expected 'join' or 'pad'; correct the configuration")
        self.reader, self.segment_samples, self.seed = reader, segment_samples, seed
        self.short, self.gap_samples = short, gap_samples
        self.crops = [
            (cut, number) for cut in range(len(reader)) for number in range(max(1, math.ceil(reader.samples(cut) / segment_samples)))
        ]
        self.short_cuts = sum(reader.samples(cut) < segment_samples for cut in range(len(reader)))
        logger.info(
            "%d crops an epoch from %d cuts, %d of them shorter than a crop (%s)", len(self.crops), len(reader), self.short_cuts, short
        )

    def __len__(self) -> int:
        return len(self.crops)

    def __getitem__(self, visits: Sequence[Visit]) -> WaveBatch:
        wav = np.stack([self._crop(visit) for visit in visits])
        return WaveBatch(torch.from_numpy(wav), tuple(self.reader.cuts[self.crops[visit.item][0]].id for visit in visits))

    def _crop(self, visit: Visit) -> np.ndarray:
        cut, number = self.crops[visit.item]
        generator = numpy_generator("crop", self.seed, visit.epoch, self.reader.cuts[cut].id, number)
        audio = self.reader.audio(cut)
        if len(audio) < self.segment_samples:
            audio = self._continued(audio, generator)
        start = int(generator.integers(0, len(audio) - self.segment_samples + 1))
        return audio[start : start + self.segment_samples]

    def _continued(self, audio: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """``audio`` followed by other cuts, or zeros, to at least a segment; empty cuts cannot loop for ever, since gaps add up."""
        if self.short == "pad":
            return np.pad(audio, (0, self.segment_samples - len(audio)))
        pieces, filled = [audio], len(audio)
        while filled < self.segment_samples:
            gap = np.zeros(int(generator.integers(max(1, self.gap_samples[0]), self.gap_samples[1] + 1)), np.float32)
            following = self.reader.audio(int(generator.integers(0, len(self.reader))))
            pieces += [gap, following]
            filled += len(gap) + len(following)
        return np.concatenate(pieces)


class WholeDataset(Dataset):
    """Whole utterances, one a batch: the encoder sees seconds to both sides, and padding would change what it says."""

    def __init__(self, reader: WaveReader) -> None:
        self.reader = reader

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, visits: Sequence[Visit]) -> WaveBatch:
        assert len(visits) == 1, len(visits)
        index = visits[0].item
        return WaveBatch(torch.from_numpy(self.reader.audio(index))[None], (self.reader.cuts[index].id,))
