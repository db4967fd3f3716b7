"""Waveforms as shards: lhotse Shar folders of FLAC with the cuts, written shard by shard and read by byte offset.

The same folder as `kalle.data.latents.shards` describes, with one field, ``recording``. A corpus of loose files costs an open, a seek
and a header for each cut, and an object store a request for each file; a shard is one file that is read nearly in sequence.
"""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from lhotse import MonoCut, Recording
from lhotse.cut import Cut

from kalle.checkpoint import read_json, write_json
from kalle.data.corpus.cuts import load_audio
from kalle.data.latents.shards import COMPLETED_NAME, INFO_NAME, ShardFolder, read_info_file, read_table, whole_table, write_index
from kalle.data.latents.storage import Folder, is_url
from kalle.data.latents.table import Table
from kalle.decoding import open_plain
from kalle.errors import UserError
from kalle.files import fingerprint, output_folder
from kalle.progress import CountProgress

logger = logging.getLogger(__name__)
RECORDING = "recording"
KIND = "waves"
BYTES_A_SAMPLE = 2
MEGABYTE = 10**6


@dataclass(frozen=True)
class WaveShardConfig:
    """How a corpus is cut into shards."""

    items: int = 1000
    """Cuts in a shard at most."""
    megabytes: float = 250.0
    """Size of a shard at most, counted as 16-bit samples; FLAC takes about half of it. One longer cut still makes a shard."""
    sample_rate_hz: int = 16000
    """Rate of what is stored; other cuts are resampled."""

    def __post_init__(self) -> None:
        if self.items < 1 or self.megabytes <= 0 or self.sample_rate_hz < 1:
            raise UserError(f"shards: got {self}, expected at least one item, megabytes above 0 and a rate of at least 1 Hz; correct it")


@dataclass(frozen=True)
class WaveRecord:
    """One cut on its way to a shard."""

    cut: Cut
    audio: np.ndarray
    """(S,) float32"""
    sample_rate_hz: int

    def to_cut(self) -> MonoCut:
        """The cut with its audio in memory, mono, the whole of its recording."""
        encoded = io.BytesIO()
        soundfile.write(encoded, self.audio, self.sample_rate_hz, format="WAV", subtype="FLOAT")
        recording = Recording.from_bytes(encoded.getvalue(), self.cut.id)
        supervisions = [dataclasses.replace(said, recording_id=self.cut.id) for said in self.cut.supervisions]
        custom = getattr(self.cut, "custom", None)
        return MonoCut(self.cut.id, 0, recording.duration, 0, supervisions=supervisions, recording=recording, custom=custom)


def write_wave_shards(
    splits: Mapping[str, Sequence[Cut]], out: str | Path, config: WaveShardConfig | None = None, progress: CountProgress | None = None
) -> dict[str, Any]:
    """Write the shard folder ``out`` from the cuts of each split; returns its info.json.

    Complete shards of an interrupted run are kept and incomplete ones written again. Samples beyond [-1, 1] are clipped, which is counted
    and said. UserError for unreadable audio, an ``out`` that holds something else, and a full disk.
    """
    config, root = config or WaveShardConfig(), Path(out)
    done, total = 0, sum(map(len, splits.values()))
    if not total:
        raise UserError("nothing to shard: got no cuts, expected at least one; run `kalle prepare` on the corpus")
    recorded: dict[str, list[dict[str, Any]]] = {split: [] for split in splits}
    with output_folder(root):
        for split, cuts in splits.items():
            folder = ShardFolder(root, split, (RECORDING,), "flac", "shard")
            shards = list(portions(cuts, config))
            folder.check_only(len(shards))
            for number, shard in enumerate(shards):
                recorded[split].append(_shard(folder, number, shard, config))
                done += len(shard)
                if progress is not None:
                    progress(done, total)
        return _finish(root, config, recorded)


def portions(cuts: Sequence[Cut], config: WaveShardConfig) -> Iterator[list[Cut]]:
    """``cuts`` in turn, as many together as a shard may hold."""
    portion: list[Cut] = []
    filled, room = 0.0, config.megabytes * MEGABYTE
    for cut in cuts:
        size = cut.duration * config.sample_rate_hz * BYTES_A_SAMPLE
        if portion and (len(portion) == config.items or filled + size > room):
            yield portion
            portion, filled = [], 0.0
        portion.append(cut)
        filled += size
    if portion:
        yield portion


def _shard(folder: ShardFolder, number: int, cuts: Sequence[Cut], config: WaveShardConfig) -> dict[str, Any]:
    """The record of one shard, which is written unless it is complete already."""
    facts = [[config.sample_rate_hz], *[[cut.id, cut.start, cut.duration, [said.to_dict() for said in cut.supervisions]] for cut in cuts]]
    mark = fingerprint(facts)
    found = folder.finished(number, mark)
    if found is not None:
        return found
    (folder.root / COMPLETED_NAME).unlink(missing_ok=True)
    counted = {"utterances": len(cuts), "samples": 0, "clipped": 0}

    def records() -> Iterator[WaveRecord]:
        for cut in cuts:
            audio = load_audio(cut, config.sample_rate_hz)
            if not len(audio):
                raise UserError(f"empty audio: cut '{cut.id}', expected at least one sample; run `kalle prepare` again or remove it")
            counted["samples"] += len(audio)
            counted["clipped"] += int((np.abs(audio) > 1).sum())
            yield WaveRecord(cut, audio, config.sample_rate_hz)

    # The counts are complete only behind the last record, so they go into a mapping that is read then.
    result = folder.write(number, records(), mark, counted)
    if counted["clipped"]:
        logger.warning("%s shard %d: %d samples beyond [-1, 1] are clipped", folder.split, number, counted["clipped"])
    return result


def _finish(root: Path, config: WaveShardConfig, recorded: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    splits = {}
    for split, shards in recorded.items():
        write_index(root, split, (RECORDING,), wave_samples)
        counts = {key: sum(shard[key] for shard in shards) for key in ("utterances", "samples", "clipped")}
        stored = sum(sum(shard["bytes"].values()) for shard in shards)
        splits[split] = {"shards": len(shards), **counts, "seconds": counts["samples"] / config.sample_rate_hz, "bytes": stored}
    info = {"format_version": 1, "kind": KIND, "sample_rate_hz": config.sample_rate_hz, "splits": splits}
    try:
        known = (root / COMPLETED_NAME).is_file() and read_json(root / INFO_NAME) == info
    except UserError:
        known = False
    if not known:
        write_json(root / INFO_NAME, info)
        (root / COMPLETED_NAME).touch()
    return info


def wave_samples(cut: Mapping[str, Any]) -> int:
    """Number of samples of a cut as `WaveRecord` writes it."""
    return int(cut["recording"]["num_samples"])


def is_wave_shards(folder: str | Path) -> bool:
    """Whether ``folder`` is for `ShardWaves`, complete or not; a URL always is."""
    root = Path(folder)
    return is_url(folder) or (root / INFO_NAME).is_file() or ((root / "progress").is_dir() and not any(root.glob("cuts_*.jsonl.gz")))


class ShardWaves:
    """The audio of one split of a wave shard folder; with ``cache`` every cut is decoded once, in advance, and kept as float32."""

    def __init__(self, folder: Folder, split: str, sample_rate_hz: int, *, cache: bool = False) -> None:
        """UserError when the folder is none of wave shards, is unfinished, or lacks the split."""
        info = _read_info(folder)
        if split not in info["splits"]:
            raise UserError(f"no split '{split}' in '{folder}': got {', '.join(info['splits'])}; shard it, or name another split")
        self.sample_rate_hz, self.stored_rate_hz = sample_rate_hz, int(info["sample_rate_hz"])
        self.table: Table = whole_table(read_table(folder, split, (RECORDING,), wave_samples), folder, split, info)
        self._cache = [self._read(index) for index in range(len(self.table))] if cache else None

    def __len__(self) -> int:
        return len(self.table)

    @property
    def shard(self) -> np.ndarray:
        """Shard of each cut, (N,) int32."""
        return self.table.shard

    def name(self, index: int) -> str:
        """The id of cut ``index``."""
        return self.table.ids[index]

    def lengths(self) -> np.ndarray:
        """Samples of each cut at the wanted rate, (N,) int64; reading may differ by one after resampling."""
        return np.round(self.table.frames.astype(np.int64) * (self.sample_rate_hz / self.stored_rate_hz)).astype(np.int64)

    def audio(self, index: int) -> np.ndarray:
        """The audio of cut ``index``, float32 (S,)."""
        return self._read(index) if self._cache is None else self._cache[index]

    def _read(self, index: int) -> np.ndarray:
        content = bytes(self.table.member(index, RECORDING).read())
        try:
            with open_plain(content) as file:
                audio = file.read(dtype="float32") if self.stored_rate_hz == self.sample_rate_hz else None
        except (soundfile.LibsndfileError, ValueError) as error:
            raise UserError(f"unreadable audio: cut '{self.name(index)}' ({error}); write or copy the shard folder again") from None
        if audio is None:
            return load_audio(Recording.from_bytes(content, self.name(index)).to_cut(), self.sample_rate_hz)
        return audio if audio.ndim == 1 else np.ascontiguousarray(audio.mean(axis=1), dtype=np.float32)


def _read_info(folder: Folder) -> dict[str, Any]:
    if not folder.exists(COMPLETED_NAME) or not folder.exists(INFO_NAME):
        raise UserError(
            f"not a complete shard folder: got '{folder}', expected {INFO_NAME} and {COMPLETED_NAME} in it; "
            f"run `kalle data shard CORPUS {folder}` to the end"
        )
    info = read_info_file(folder)
    if info.get("kind") != KIND:
        raise UserError(f"not a folder of wave shards: '{folder}' holds something else; give one that `kalle data shard` wrote")
    if not isinstance(info.get("sample_rate_hz"), int) or info["sample_rate_hz"] < 1:
        raise UserError(f"damaged '{folder.where(INFO_NAME)}': no sample rate; write or copy the folder again")
    return info
