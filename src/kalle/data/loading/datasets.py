"""Data sets that return whole batches: latents and texts for the language model (words in two forms too), audio for the Flow-VAE."""

from __future__ import annotations

import array
import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np
import torch
from lhotse.cut import Cut
from torch import Tensor
from torch.utils.data import Dataset

from kalle.checkpoint import check_fields, check_range
from kalle.data.corpus.cuts import load_audio
from kalle.data.latents.shards import LATENTS, SPEAKER_MELS, read_info, read_items
from kalle.data.latents.storage import Folder
from kalle.data.latents.table import Ragged, Table, Texts, TokenLists, array_of, joined_tables, starts_of
from kalle.data.loading.samplers import Sample
from kalle.errors import UserError
from kalle.files import atomic_file
from kalle.gaussian import DiagGaussian
from kalle.models.lm_batch import LMBatch, WaveBatch
from kalle.seeds import numpy_generator, standard_noise, standard_noise_into
from kalle.text.phonemes import LANGUAGE, PhonemeTokenizer, WordForms, prompt_forms
from kalle.text.tokenizer import BEFORE_SPEECH, Tokenizer, prompt_ids

logger = logging.getLogger(__name__)

_MOST_NAMED = 10


class TextForms:
    """N prompts in which some words have two forms (`WordForms`); ``draw`` makes one choice of them.

    The choice is a function of its key: with ``byte_utterances`` the whole text is bytes, else each word with ``byte_words``.
    """

    def __init__(self, tokenizer: PhonemeTokenizer, texts: Texts, ids: Ragged, words: np.ndarray, longest: np.ndarray) -> None:
        self.tokenizer, self.texts, self.ids, self.words, self.longest = tokenizer, texts, ids, words, longest
        self._after = [tokenizer.special(name) for name in BEFORE_SPEECH]

    @classmethod
    def of(cls, table: Table, tokenizer: PhonemeTokenizer) -> TextForms:
        """The forms of the texts of ``table``, from the cache of ``tokenizer`` when it has one with just these texts."""
        texts, languages = table.texts, [table.language_of(index) for index in range(len(table))]
        path = None if tokenizer.cache is None else Path(tokenizer.cache) / f"{_fingerprint(texts, languages, tokenizer)}.npz"
        if path is not None and path.is_file():
            with np.load(path, allow_pickle=False) as stored:
                return cls(tokenizer, texts, Ragged(stored["ids"], stored["starts"]), stored["words"], stored["longest"])
        forms = _read(list(zip(texts, languages, strict=True)), tokenizer, table.ids)
        ids = Ragged(np.concatenate([form.ids for form in forms]), starts_of(np.array([len(form.ids) for form in forms], np.int64)))
        words, longest = np.concatenate([form.words for form in forms]), np.array([form.longest for form in forms], np.int64)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary, temporary.open("wb") as file:
                np.savez(file, ids=ids.values, starts=ids.starts, words=words, longest=longest)
        return cls(tokenizer, texts, ids, words, longest)

    @property
    def lengths(self) -> np.ndarray:
        """Ids of the longest form of each prompt, (N,) int64."""
        as_bytes = self.texts.rows.lengths + 1 + len(self._after)
        return np.maximum(self.longest, as_bytes) if self.tokenizer.byte_utterances else self.longest

    def first(self) -> Ragged:
        """The prompts with every word in its first form, as synthesis reads them."""
        keep = self.words >= 0
        counts = np.concatenate([[0], np.cumsum(keep)])[self.ids.starts]
        return Ragged(self.ids.values[keep], counts.astype(np.int64))

    def take(self, keep: np.ndarray) -> TextForms:
        """Those that the mask ``keep`` (N,) bool marks."""
        words = Ragged(self.words, self.ids.starts).take(keep).values
        return TextForms(self.tokenizer, Texts(self.texts.rows.take(keep)), self.ids.take(keep), words, self.longest[keep])

    def draw(self, index: int, *key: int | str) -> np.ndarray:
        """Ids of prompt ``index`` (L,), chosen by ``key``."""
        generator = numpy_generator("text forms", *key)
        form = WordForms(self.ids.row(index), self.words[self.ids.starts[index] : self.ids.starts[index + 1]])
        if generator.random() < self.tokenizer.byte_utterances:
            return np.array([*self.tokenizer.encode_bytes(self.texts[index].strip()), *self._after])
        return form.chosen(generator.random(form.count) < self.tokenizer.byte_words)


def _fingerprint(texts: Texts, languages: Sequence[str | None], tokenizer: PhonemeTokenizer) -> str:
    digest = hashlib.blake2b(f"2 {tokenizer.version} {tokenizer.first_phoneme} {tokenizer.symbols}".encode(), digest_size=16)
    for values in (texts.rows.starts, texts.rows.values):
        digest.update(np.ascontiguousarray(values).tobytes())
    if any(language not in (None, LANGUAGE) for language in languages):
        digest.update("\0".join(language or "" for language in languages).encode())
    return digest.hexdigest()


def _read(texts: Sequence[tuple[str, str | None]], tokenizer: PhonemeTokenizer, ids: Sequence[str]) -> list[WordForms]:
    """The forms of each text in its language; an error names the first of ``ids`` with that text."""
    known: dict[tuple[str, str | None], WordForms] = {}
    unknown: Counter[str] = Counter()
    for index, (text, language) in enumerate(texts):
        if (text, language) not in known:
            with _about(ids, index):
                known[text, language] = prompt_forms(tokenizer, text, language)
            unknown.update(tokenizer.unknown_words(text.strip(), language))
    words = sum(form.count for form in known.values())
    most = ", ".join(word for word, _ in unknown.most_common(_MOST_NAMED))
    logger.info("%d words of %d texts as phonemes, %d left as bytes (%s)", words, len(known), unknown.total(), most)
    return [known[text] for text in texts]


@dataclass(frozen=True)
class SpeakerConfig:
    """The data of a model with a speaker encoder, besides text and latents."""

    crop_frames: int = 200
    """Mel frames of a crop."""
    latent_dim: int | None = None
    """Size of the speaker latent; with it the batch carries the latent's noise, so that it is sampled, else its mean is used."""

    def __post_init__(self) -> None:
        check_fields(self, "data.speaker")
        check_range(self, "data.speaker", "crop_frames", "latent_dim", least=1)


class LatentDataset(Dataset):
    """One split of one or several latent folders; ``dataset[samples]`` is the `LMBatch` of those samples.

    The posterior sample of a sample is mean + noise * std, the noise a function of (seed, epoch, cut id, repetition within the epoch):
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
        """``cache`` keeps all latents in memory as float16; without it they are read from the shards at each sample.

        ``cache_dir`` keeps the shards of remote folders on this machine.
        """
        self.split, self.seed, self.speaker = split, seed, speaker
        names = [folder] if isinstance(folder, str | Path) else list(folder)
        tables = [_read_table(Folder(name, cache_dir), split, speaker) for name in names]
        source = np.repeat(np.arange(len(tables), dtype=np.int16), [len(table) for table in tables])
        table = joined_tables(tables)
        drawn = isinstance(tokenizer, PhonemeTokenizer) and split == "train" and (tokenizer.byte_words or tokenizer.byte_utterances)
        forms = TextForms.of(table, cast(PhonemeTokenizer, tokenizer)) if drawn else None
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

    def __getitem__(self, samples: Sequence[Sample]) -> LMBatch:
        indices = [sample.item % len(self) for sample in samples]
        keys = [self._key(sample) for sample in samples]
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
            epochs=tuple(sample.epoch for sample in samples),
        )

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

    def _text(self, index: int, key: tuple[int | str, ...]) -> np.ndarray:
        return self.text_ids.rows.row(index) if self.text_forms is None else self.text_forms.draw(index, *key)

    def _key(self, sample: Sample) -> tuple[int | str, ...]:
        """The arguments of a sample's noise; only a mix takes an item more than once an epoch."""
        repetition, index = divmod(sample.item, len(self))
        key = (self.seed, sample.epoch, self.items.ids[index])
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


def _read_table(folder: Folder, split: str, speaker: SpeakerConfig | None) -> Table:
    if speaker is not None and not read_info(folder)["speaker_mels"]:
        raise UserError(
            f"no speaker mels in '{folder}': expected them for a model with a speaker encoder; "
            "run `kalle encode … speaker_mels=true` into a new folder"
        )
    return read_items(folder, split)


def _tokens(table: Table, tokenizer: Tokenizer) -> Ragged:
    """The prompt of each item."""
    values, lengths = array.array("i"), array.array("q")
    for index, text in enumerate(table.texts):
        with _about(table.ids, index):
            ids = prompt_ids(tokenizer, text, language=table.language_of(index))
        values.frombytes(ids.numpy().astype(np.int32).tobytes())
        lengths.append(len(ids))
    flat = np.frombuffer(values, np.int32)
    # A byte a token for a tokenizer of bytes, two for most others.
    return Ragged(flat.astype(np.min_scalar_type(int(flat.max(initial=0)))), starts_of(np.frombuffer(lengths, np.int64)))


@contextmanager
def _about(ids: Sequence[str], index: int) -> Iterator[None]:
    """An error inside the block about the text of an utterance names it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"utterance '{ids[index]}': {error}; run `kalle prepare` and `kalle encode` again, which name such texts") from None


def speaker_crop(mels: np.ndarray, frames: int, *seed_parts: int | str) -> np.ndarray:
    """``frames`` frames of ``mels`` (80, F) from a random place, (80, frames); shorter ones are repeated from their beginning.

    The place is a function of ``seed_parts``. The mels are those of the whole utterance, so its level is normalised before the crop
    and only the frames at the edges of a crop differ from the mels of cropped audio, which would be reflected there.
    """
    length = mels.shape[1]
    assert length > 0, mels.shape
    if length < frames:
        return np.tile(mels, (1, -(-frames // length)))[:, :frames]
    start = int(numpy_generator("speaker-crop", *seed_parts).integers(0, length - frames + 1))
    return mels[:, start : start + frames]


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
    """Random crops of ``segment_samples``; ``dataset[samples]`` is the `WaveBatch` of those samples.

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

    def __getitem__(self, samples: Sequence[Sample]) -> WaveBatch:
        places = [self._place(sample) for sample in samples]
        wav = np.stack([self._crop(sample.epoch, *place) for sample, place in zip(samples, places, strict=True)])
        names = tuple(self.reader.name(cut) for cut, _, _ in places)
        numbers = tuple(number + repetition * int(self.crops[cut]) for cut, number, repetition in places)
        return WaveBatch(torch.from_numpy(wav), names, numbers)

    def _place(self, sample: Sample) -> tuple[int, int, int]:
        """Cut, number of the crop, and repetition, which only a mix counts above 0."""
        repetition, crop = divmod(sample.item, len(self))
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

    def __getitem__(self, samples: Sequence[Sample]) -> WaveBatch:
        assert len(samples) == 1, len(samples)
        index = samples[0].item
        return WaveBatch(torch.from_numpy(self.reader.audio(index))[None], (self.reader.name(index),))
