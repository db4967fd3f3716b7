"""Latent folders: lhotse Shar shards of posteriors with their texts, written so that a torn shard is never taken for whole.

OUT/SPLIT/cuts.000000.jsonl.gz      lhotse cuts: id, text, speaker, language, number of frames
OUT/SPLIT/latents.000000.tar        (T, 2D) float16 of every cut: mean, then log_std
OUT/SPLIT/speaker_mels.000000.tar   optional, (80, F) float16 log-mels for a speaker encoder
OUT/progress/SPLIT.000000.json      written last: fingerprint of what went in, size of each file
OUT/info.json, OUT/.completed       written when every shard is there
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lhotse import CutSet
from lhotse.cut import MonoCut
from lhotse.shar import SharWriter
from lhotse.supervision import SupervisionSegment

from kalle.checkpoint import read_json, write_json
from kalle.errors import UserError
from kalle.gaussian import DiagGaussian

LATENTS = "latents"
SPEAKER_MELS = "speaker_mels"
INFO_NAME = "info.json"
COMPLETED_NAME = ".completed"


@dataclass(frozen=True)
class LatentRecord:
    """One encoded utterance on its way to a shard."""

    id: str
    text: str
    speaker: str | None
    language: str | None
    sources: tuple[str, ...]
    """Ids of the cuts it was made of."""
    samples: int
    sample_rate_hz: int
    latents: np.ndarray
    """(T, 2D) float16: mean, then log_std."""
    speaker_mels: np.ndarray | None = None
    """(80, F) float16."""

    def to_cut(self) -> MonoCut:
        """A cut without audio that carries the arrays in memory."""
        seconds = self.samples / self.sample_rate_hz
        supervision = SupervisionSegment(
            id=self.id, recording_id=self.id, start=0, duration=seconds, text=self.text, speaker=self.speaker, language=self.language
        )
        custom = {"num_frames_latent": len(self.latents), "sources": list(self.sources)}
        cut = MonoCut(id=self.id, start=0, duration=seconds, channel=0, supervisions=[supervision], custom=custom)
        cut = cut.attach_tensor(LATENTS, self.latents)
        return cut if self.speaker_mels is None else cut.attach_tensor(SPEAKER_MELS, self.speaker_mels)


class ShardFolder:
    """The shards of one split of the latent folder ``root``."""

    def __init__(self, root: Path, split: str, fields: Sequence[str] = (LATENTS,)) -> None:
        self.root, self.split, self.fields = root, split, tuple(fields)

    def files(self, number: int) -> list[Path]:
        """The files of one shard, in the order in which they are moved into place."""
        folder = self.root / self.split
        return [folder / f"{field}.{number:06d}.tar" for field in self.fields] + [folder / f"cuts.{number:06d}.jsonl.gz"]

    def record_path(self, number: int) -> Path:
        """The progress file of one shard."""
        return self.root / "progress" / f"{self.split}.{number:06d}.json"

    def finished(self, number: int, fingerprint: str) -> dict[str, Any] | None:
        """What was recorded of a whole shard; None when it has to be written.

        A UserError when a whole shard was made from something else: mixing two encoders in a folder would go unnoticed.
        """
        if not self.record_path(number).is_file():
            return None
        record = read_json(self.record_path(number))
        sizes = {path.name: path.stat().st_size for path in self.files(number) if path.is_file()}
        if sizes != record.get("bytes"):
            return None
        if record.get("fingerprint") != fingerprint:
            raise UserError(
                f"'{self.root}' already holds latents of another encoder, corpus or setting (shard {number} of '{self.split}'); "
                "give a new out=, or delete the folder to encode again"
            )
        return record

    def write(self, number: int, records: Iterable[LatentRecord], fingerprint: str, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Write one shard beside the folder, move it into place, then record it with ``facts``; returns what was recorded."""
        self.record_path(number).unlink(missing_ok=True)
        partial = self.root / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            fields = dict.fromkeys(self.fields, "numpy")
            with _shar_writer(str(partial), fields=fields, shard_size=2**31, shard_offset=number) as writer:
                for record in records:
                    writer.write(record.to_cut())
            (self.root / self.split).mkdir(exist_ok=True)
            # lhotse opens no file for a shard without a single utterance.
            written = [path for path in self.files(number) if (partial / path.name).is_file()]
            for path in written:
                os.replace(partial / path.name, path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        sizes = {path.name: path.stat().st_size for path in written}
        recorded = {"fingerprint": fingerprint, "bytes": sizes, **facts}
        write_json(self.record_path(number), recorded)
        return recorded

    def check_only(self, shards: int) -> None:
        """A UserError when the split holds files that do not belong to its first ``shards`` shards."""
        expected = {path for number in range(shards) for path in self.files(number)}
        folder = self.root / self.split
        strange = sorted(path.name for path in folder.iterdir() if path not in expected) if folder.is_dir() else []
        if strange:
            raise UserError(
                f"'{folder}' holds files of another run: {', '.join(strange[:5])}; give a new out=, or delete the folder to encode again"
            )


@contextlib.contextmanager
def _shar_writer(*arguments: Any, **options: Any) -> Iterator[SharWriter]:
    """A SharWriter that leaves no stream open on failure: its destructors would write again, and print what the disk says to that."""
    writer = SharWriter(*arguments, **options)
    try:
        with writer:
            yield writer
    except BaseException:
        for part in writer.writers.values():
            shard = getattr(part, "tar_writer", part)
            for stream in (getattr(shard, "tarstream", None), shard.stream, getattr(shard.stream, "file", None)):
                if stream is not None:
                    with contextlib.suppress(OSError, ValueError):
                        stream.close()
        raise


@dataclass(frozen=True)
class Member:
    """Where the bytes of one array lie."""

    path: Path
    offset: int
    size: int

    def load(self) -> np.ndarray:
        """Read the array."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return np.load(io.BytesIO(file.read(self.size)), allow_pickle=False)


@dataclass(frozen=True)
class LatentItem:
    """One utterance of a latent folder; its arrays stay on disk."""

    id: str
    text: str
    speaker: str | None
    frames: int
    latents: Member
    speaker_mels: Member | None = None


def read_info(folder: str | Path) -> dict[str, Any]:
    """The info.json of a complete latent folder; a UserError when it is none, or an unfinished one."""
    root = Path(folder)
    if not (root / COMPLETED_NAME).is_file() or not (root / INFO_NAME).is_file():
        raise UserError(
            f"not a complete latent folder: got '{root}', expected {INFO_NAME} and {COMPLETED_NAME} in it; run `kalle encode … out={root}`"
        )
    return read_json(root / INFO_NAME)


def read_items(folder: str | Path, split: str) -> list[LatentItem]:
    """All utterances of ``split``, in stored order, without their arrays.

    A UserError when the folder is not complete or has no such split.
    """
    info, root = read_info(folder), Path(folder) / split
    if split not in info["splits"]:
        raise UserError(f"no split '{split}' in '{folder}': got {', '.join(info['splits'])}; encode it, or name another split")
    items: list[LatentItem] = []
    for path in sorted(root.glob("cuts.*.jsonl.gz")):
        number = path.name.split(".")[1]
        latents = tar_members(root / f"{LATENTS}.{number}.tar")
        mels = tar_members(root / f"{SPEAKER_MELS}.{number}.tar") if info["speaker_mels"] else {}
        for cut in CutSet.from_file(path):
            supervision = cut.supervisions[0]
            frames = cut.custom["num_frames_latent"]
            items.append(LatentItem(cut.id, supervision.text, supervision.speaker, frames, latents[cut.id], mels.get(cut.id)))
    return items


def tar_members(path: Path) -> dict[str, Member]:
    """Where each array of an uncompressed shard lies, by cut id."""
    try:
        with tarfile.open(path, "r:") as archive:
            arrays = [member for member in archive if member.name.endswith(".npy")]
            return {member.name.removesuffix(".npy"): Member(path, member.offset_data, member.size) for member in arrays}
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"unreadable shard: '{path}' ({error}); run the same `kalle encode` again, it rewrites torn shards") from None


def iter_posteriors(folder: Path, split: str) -> Iterator[DiagGaussian]:
    """The stored posterior of every utterance of ``split`` in turn, (T, D) fp32, padding-free."""
    for path in sorted((folder / split).glob(f"{LATENTS}.*.tar")):
        for member in tar_members(path).values():
            yield DiagGaussian.from_parameters(torch.from_numpy(member.load()).float())
