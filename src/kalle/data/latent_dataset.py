"""Latents and texts as language-model batches, with a fresh posterior sample at every visit."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from kalle.data.sampling import Visit, standard_noise
from kalle.data.shards import LatentItem, read_info, read_items
from kalle.data.speaker_crops import speaker_crop
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.batch import LMBatch
from kalle.text.prompt import prompt_ids
from kalle.text.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SpeakerConfig:
    """What a model with a speaker encoder needs besides text and latents."""

    crop_frames: int = 200
    """Mel frames of a crop."""
    latent_dim: int | None = None
    """Size of the speaker latent; with it the batch carries the latent's noise, so that it is sampled, else its mean is used."""


class LatentDataset(Dataset):
    """One split of a latent folder; ``dataset[visits]`` is the `LMBatch` of those visits.

    The posterior sample of a visit is mean + noise * std, the noise a function of (seed, epoch, cut id): fresh in every epoch,
    the same whatever the batch, the rank or the number of workers. Items of more than ``max_positions`` positions (text, latents and a
    speaker) are left out; ``rejected`` counts them by reason.
    """

    def __init__(
        self,
        folder: str | Path,
        split: str,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        max_positions: int | None = None,
        speaker: SpeakerConfig | None = None,
        cache: bool = False,
    ) -> None:
        """``cache`` keeps all latents in memory as float16; without it they are read from the shards at each visit."""
        self.split, self.seed, self.speaker = split, seed, speaker
        if speaker is not None and not read_info(folder)["speaker_mels"]:
            raise UserError(
                f"no speaker mels in '{folder}': expected them for a model with a speaker encoder; "
                "run `kalle encode … speaker_mels=true` into a new folder"
            )
        self.rejected: Counter[str] = Counter()
        self.items: list[LatentItem] = []
        self.text_ids: list[Tensor] = []
        extra = 0 if speaker is None else 1
        for item in read_items(folder, split):
            ids = prompt_ids(tokenizer, item.text)
            if max_positions is not None and len(ids) + item.frames + extra > max_positions:
                self.rejected[f"longer than {max_positions} positions"] += 1
                continue
            self.items.append(item)
            self.text_ids.append(ids.to(torch.int32))
        if self.rejected:
            logger.warning("left out of '%s': %s of %d utterances", split, dict(self.rejected), len(self.items) + self.rejected.total())
        if not self.items:
            raise UserError(
                f"no utterances left in the split '{split}' of '{folder}': rejected {dict(self.rejected)}; "
                "raise the limit or encode a larger corpus"
            )
        self._cache = [item.latents.load() for item in self.items] if cache else None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def text_lengths(self) -> np.ndarray:
        """Text positions of each item, special tokens included, (N,) int64."""
        return np.array([len(ids) for ids in self.text_ids], dtype=np.int64)

    @property
    def audio_lengths(self) -> np.ndarray:
        """Latent frames of each item, and one position for a speaker, (N,) int64."""
        return np.array([item.frames for item in self.items], dtype=np.int64) + (0 if self.speaker is None else 1)

    def posterior(self, index: int) -> DiagGaussian:
        """The stored posterior of one item, (T, D) fp32."""
        stored = self.items[index].latents.load() if self._cache is None else self._cache[index]
        return DiagGaussian.from_parameters(torch.from_numpy(stored).float())

    def __getitem__(self, visits: Sequence[Visit]) -> LMBatch:
        posteriors = [self.posterior(visit.item) for visit in visits]
        names = tuple(self.items[visit.item].id for visit in visits)
        latents = [
            posterior.sample(standard_noise(posterior.mean.shape, "posterior", self.seed, visit.epoch, name))
            for posterior, visit, name in zip(posteriors, visits, names, strict=True)
        ]
        texts = [self.text_ids[visit.item].long() for visit in visits]
        speaker_mels, speaker_noise = self._speaker(visits) if self.speaker is not None else (None, None)
        return LMBatch(
            text_ids=pad_sequence(texts, batch_first=True),
            text_lengths=torch.tensor([len(ids) for ids in texts]),
            latents=pad_sequence(latents, batch_first=True),
            latent_lengths=torch.tensor([len(latent) for latent in latents]),
            posterior=DiagGaussian(
                pad_sequence([posterior.mean for posterior in posteriors], batch_first=True),
                pad_sequence([posterior.log_std for posterior in posteriors], batch_first=True),
            ),
            speaker_mels=speaker_mels,
            speaker_noise=speaker_noise,
            cut_ids=names,
        )

    def _speaker(self, visits: Sequence[Visit]) -> tuple[Tensor, Tensor | None]:
        """Mel crops (B, 80, F) and, when the latent is sampled, its noise (B, H)."""
        assert self.speaker is not None
        crops, noises = [], []
        for visit in visits:
            item = self.items[visit.item]
            assert item.speaker_mels is not None, item.id
            key = (self.seed, visit.epoch, item.id)
            crops.append(torch.from_numpy(speaker_crop(item.speaker_mels.load(), self.speaker.crop_frames, *key).astype(np.float32)))
            if self.speaker.latent_dim is not None:
                noises.append(standard_noise((self.speaker.latent_dim,), "speaker", *key))
        return torch.stack(crops), torch.stack(noises) if noises else None
