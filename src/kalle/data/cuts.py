"""lhotse cuts of a corpus folder: made, and written whole (`kalle.data.corpus_cuts` reads them)."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lhotse import MonoCut, Recording, SupervisionSegment
from lhotse.audio import AudioSource

from kalle.files import atomic_file


def cuts_path(folder: Path, split: str) -> Path:
    """Where a corpus folder keeps the cuts of a split."""
    return folder / f"cuts_{split}.jsonl.gz"


def make_cut(
    cut_id: str,
    audio: str,
    stored_rate_hz: int,
    stored_samples: int,
    sample_rate_hz: int,
    text: str,
    speaker: str,
    language: str,
    source: str = "",
    start_samples: int = 0,
    seconds: float | None = None,
    custom: dict[str, Any] | None = None,
) -> MonoCut:
    """One cut over a mono recording with one supervision; `load_audio()` gives (1, num_samples) at ``sample_rate_hz``.

    ``stored_rate_hz`` and ``stored_samples`` describe the file as it lies on disk; another rate is resampled on loading. ``seconds``
    from ``start_samples`` on (at the stored rate) make a cut of a part of it; None means the whole. ``custom`` goes into the cut's own.
    """
    recording = Recording(
        id=cut_id,
        sources=[AudioSource(type="file", channels=[0], source=audio)],
        sampling_rate=stored_rate_hz,
        num_samples=stored_samples,
        duration=stored_samples / stored_rate_hz,
    )
    if stored_rate_hz != sample_rate_hz:
        recording = recording.resample(sample_rate_hz)
    start = start_samples / stored_rate_hz
    duration = recording.duration if seconds is None else min(seconds, recording.duration - start)
    supervision = SupervisionSegment(
        id=cut_id, recording_id=cut_id, start=0.0, duration=duration, text=text, speaker=speaker, language=language or None
    )
    fields = {**(custom or {}), **({"source": source} if source else {})}
    return MonoCut(
        id=cut_id, start=start, duration=duration, channel=0, recording=recording, supervisions=[supervision], custom=fields or None
    )


def write_cuts(path: Path, cuts: Iterable[MonoCut]) -> int:
    """Write gzipped JSONL, the same bytes for the same cuts; returns how many."""
    count = 0
    with (
        atomic_file(path) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8") as lines,
    ):
        for cut in cuts:
            lines.write(json.dumps(cut.to_dict(), ensure_ascii=False) + "\n")
            count += 1
    return count
