"""Latents and texts as language-model batches, with a fresh posterior sample at every visit."""

from __future__ import annotations

import array
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from kalle.data.columns import Ragged, TokenLists, starts_of
from kalle.data.items import Table, array_of, joined_tables
from kalle.data.sampling import Visit, standard_noise, standard_noise_into
from kalle.data.shards import LATENTS, SPEAKER_MELS, read_info, read_items
from kalle.data.speaker_crops import speaker_crop
from kalle.data.storage import Folder
from kalle.data.text_forms import TextForms
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian
from kalle.models.batch import LMBatch
from kalle.text.phonemes import PhonemeTokenizer
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
    """One split of one or several latent folders; ``dataset[visits]`` is the `LMBatch` of those visits.

    The posterior sample of a visit is mean + noise * std, the noise a function of (seed, epoch, cut id, repetition within the epoch):
    fresh in every epoch, the same whatever the batch, the rank or the number of workers. Items of more than ``max_positions`` positions
    (text, latents and a speaker) are left out; ``rejected`` counts them by reason.
    """

    def __init__(
        self,
        folder: str | Path | Sequence[str | Path],
        split: str,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        max_positions: int | None = None,
        speaker: SpeakerConfig | None = None,
        cache: bool = False,
        cache_dir: str | Path | None = None,
    ) -> None:
        """``cache`` keeps all latents in memory as float16; without it they are read from the shards at each visit.

        ``cache_dir`` keeps the shards of remote folders on this machine.
        """
        self.split, self.seed, self.speaker = split, seed, speaker
        names = [folder] if isinstance(folder, str | Path) else list(folder)
        tables = [_table(Folder(name, cache_dir), split, speaker) for name in names]
        source = np.repeat(np.arange(len(tables), dtype=np.int16), [len(table) for table in tables])
        table = joined_tables(tables)
        drawn = isinstance(tokenizer, PhonemeTokenizer) and split == "train" and (tokenizer.byte_words or tokenizer.byte_utterances)
        forms = TextForms.of(table.texts, cast(PhonemeTokenizer, tokenizer)) if drawn else None
        rows = _tokens(table, tokenizer) if forms is None else forms.first()
        lengths = rows.lengths if forms is None else forms.lengths
        self.rejected: Counter[str] = Counter()
        keep = np.ones(len(table), bool)
        if max_positions is not None:
            keep = lengths + table.frames + (0 if speaker is None else 1) <= max_positions
        if not keep.all():
            self.rejected[f"longer than {max_positions} positions"] = int((~keep).sum())
            logger.warning("left out of '%s': %s of %d utterances", split, dict(self.rejected), len(table))
        if not keep.any():
            raise UserError(
                f"no utterances left in the split '{split}' of '{', '.join(map(str, names))}': rejected {dict(self.rejected)}; "
                "raise the limit or encode a larger corpus"
            )
        self.items: Table = table.take(keep)
        self.text_ids = TokenLists(rows.take(keep))
        self.text_lengths = lengths[keep]
        """Text positions of each item, special tokens included, (N,) int64; the most, where they are drawn."""
        self.text_forms = None if forms is None else forms.take(keep)
        self.source = source[keep]
        """(N,) int16: which of the folders each item is of."""
        self._cache = [self._stored(index, LATENTS) for index in range(len(self.items))] if cache else None

    def __len__(self) -> int:
        return len(self.items)

    @property
    def audio_lengths(self) -> np.ndarray:
        """Latent frames of each item, and one position for a speaker, (N,) int64."""
        return self.items.frames.astype(np.int64) + (0 if self.speaker is None else 1)

    def posterior(self, index: int) -> DiagGaussian:
        """The stored posterior of one item, (T, D) fp32."""
        return DiagGaussian.from_parameters(torch.from_numpy(self._latents(index)).float())

    def _latents(self, index: int) -> np.ndarray:
        return self._stored(index, LATENTS) if self._cache is None else self._cache[index]

    def _stored(self, index: int, field: str) -> np.ndarray:
        member = self.items.member(index, field)
        return array_of(member.read(), member.name)

    def __getitem__(self, visits: Sequence[Visit]) -> LMBatch:
        indices = [visit.item % len(self) for visit in visits]
        keys = [self._key(visit) for visit in visits]
        stored = [self._latents(index) for index in indices]
        texts = [self._text(index, key) for index, key in zip(indices, keys, strict=True)]
        latents, posterior = self._sampled(stored, keys)
        speaker_mels, speaker_noise = self._speaker(indices, keys) if self.speaker is not None else (None, None)
        text_ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
        for row, text in enumerate(texts):
            text_ids.numpy()[row, : len(text)] = text
        return LMBatch(
            text_ids=text_ids,
            text_lengths=torch.tensor([len(text) for text in texts]),
            latents=latents,
            latent_lengths=torch.tensor([len(one) for one in stored]),
            posterior=posterior,
            speaker_mels=speaker_mels,
            speaker_noise=speaker_noise,
            cut_ids=tuple(str(key[2]) for key in keys),
            epochs=tuple(visit.epoch for visit in visits),
        )

    def _text(self, index: int, key: tuple[int | str, ...]) -> np.ndarray:
        return self.text_ids.rows.row(index) if self.text_forms is None else self.text_forms.draw(index, *key)

    def _sampled(self, stored: Sequence[np.ndarray], keys: Sequence[tuple[int | str, ...]]) -> tuple[Tensor, DiagGaussian]:
        """Samples (B, T, D) and the padded posterior of ``stored``, each (T, 2D).

        Everything is written where it ends up: padding a list afterwards copies every batch three times more.
        """
        shape = (len(stored), max(map(len, stored)), stored[0].shape[1] // 2)
        mean, log_std, noise = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
        generator = torch.Generator()
        for row, (one, key) in enumerate(zip(stored, keys, strict=True)):
            frames = len(one)
            halves = torch.from_numpy(one)
            mean[row, :frames] = halves[:, : shape[2]]
            log_std[row, :frames] = halves[:, shape[2] :]
            standard_noise_into(noise[row, :frames], generator, "posterior", *key)
        posterior = DiagGaussian(mean, log_std)
        return posterior.sample(noise), posterior

    def _key(self, visit: Visit) -> tuple[int | str, ...]:
        """What the noise of a visit is a function of; only a mixture visits an item more than once an epoch."""
        repetition, index = divmod(visit.item, len(self))
        key = (self.seed, visit.epoch, self.items.ids[index])
        return key if not repetition else (*key, repetition)

    def _speaker(self, indices: Sequence[int], keys: Sequence[tuple[int | str, ...]]) -> tuple[Tensor, Tensor | None]:
        """Mel crops (B, 80, F) and, when the latent is sampled, its noise (B, H)."""
        assert self.speaker is not None
        crops, noises = [], []
        for index, key in zip(indices, keys, strict=True):
            crop = speaker_crop(self._stored(index, SPEAKER_MELS), self.speaker.crop_frames, *key)
            crops.append(torch.from_numpy(crop.astype(np.float32)))
            if self.speaker.latent_dim is not None:
                noises.append(standard_noise((self.speaker.latent_dim,), "speaker", *key))
        return torch.stack(crops), torch.stack(noises) if noises else None


def _table(folder: Folder, split: str, speaker: SpeakerConfig | None) -> Table:
    if speaker is not None and not read_info(folder)["speaker_mels"]:
        raise UserError(
            f"no speaker mels in '{folder}': expected them for a model with a speaker encoder; "
            "run `kalle encode … speaker_mels=true` into a new folder"
        )
    return read_items(folder, split)


def _tokens(table: Table, tokenizer: Tokenizer) -> Ragged:
    """The prompt of each item."""
    values, lengths = array.array("i"), array.array("q")
    for text in table.texts:
        ids = prompt_ids(tokenizer, text)
        values.frombytes(ids.numpy().astype(np.int32).tobytes())
        lengths.append(len(ids))
    flat = np.frombuffer(values, np.int32)
    # A byte a token for a tokenizer of bytes, two for most others.
    return Ragged(flat.astype(np.min_scalar_type(int(flat.max(initial=0)))), starts_of(np.frombuffer(lengths, np.int64)))
