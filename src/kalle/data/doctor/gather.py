"""The measurements of a whole corpus: kept line by line so that an interrupted run goes on, and a second one has nothing to do."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from kalle.data.corpus_cuts import load_cuts
from kalle.data.doctor.measured import MEASURES_VERSION, Item, Sound, audio_stamp, item_of, measure
from kalle.data.prepare_files import Journal
from kalle.data.prepare_split import SPLITS
from kalle.errors import UserError

MEASUREMENTS_NAME = "measurements.jsonl"
_CUTS_A_TASK = 16
Progress = Callable[[Iterable[Any], int], Iterable[Any]]
"""Passes an iterable of so many things through, showing how far it is."""


@dataclass(frozen=True)
class Gathered:
    """The items of a corpus, its cuts by (split, id), and how many measurements an earlier run had left."""

    items: list[Item]
    cuts: dict[tuple[str, str], Cut]
    reused: int


def corpus_cuts(corpus: Path) -> dict[tuple[str, str], Cut]:
    """All cuts of a prepared corpus by (split, id), audio paths absolute; a UserError as `load_cuts`, or for an id that comes twice."""
    found = {path.name.removeprefix("cuts_").removesuffix(".jsonl.gz") for path in corpus.glob("cuts_*.jsonl.gz")}
    splits = [*[split for split in SPLITS if split in found], *sorted(found - set(SPLITS))]
    cuts: dict[tuple[str, str], Cut] = {}
    for split in splits or ["train"]:
        for cut in load_cuts(corpus, split):
            if (split, cut.id) in cuts:
                raise UserError(f"cut ids must differ: got '{cut.id}' twice in the split '{split}' of '{corpus}'; prepare it again")
            cuts[split, cut.id] = cut
    if not cuts:
        raise UserError(f"nothing to examine: '{corpus}' holds no cuts; run `kalle prepare` on recordings")
    return cuts


def gather(corpus: Path, out: Path, jobs: int, progress: Progress) -> Gathered:
    """Measure every item of ``corpus`` with ``jobs`` processes, keeping the measurements in ``out``.

    Measurements of an earlier run are used again where the audio file has not changed since.
    """
    cuts = corpus_cuts(corpus)
    stamps = {key: _stamp(cut) for key, cut in cuts.items()}
    journal = Journal(out / MEASUREMENTS_NAME, f"kalle data doctor measures {MEASURES_VERSION}")
    try:
        sounds: dict[tuple[str, str], Sound] = {}
        for entry in journal.entries:
            key = (entry["split"], entry["id"])
            if stamps.get(key) == entry["stamp"]:
                sounds[key] = Sound.from_dict(entry["sound"])
        reused = len(sounds)
        waiting = {key: cut for key, cut in cuts.items() if key not in sounds}
        for key, sound in progress(_measured(waiting, jobs), len(waiting)):
            journal.add({"split": key[0], "id": key[1], "stamp": stamps[key], "sound": sound.to_dict()})
            sounds[key] = sound
    finally:
        journal.close()
    return Gathered([item_of(cut, key[0], sounds[key]) for key, cut in cuts.items()], cuts, reused)


def _stamp(cut: Cut) -> str:
    return f"{cut.start:.6f}+{cut.duration:.6f}@{cut.sampling_rate}:{audio_stamp(cut)}"


def _measured(waiting: dict[tuple[str, str], Cut], jobs: int) -> Iterator[tuple[tuple[str, str], Sound]]:
    """Key and sound of each cut, in order."""
    if jobs < 1:
        raise UserError(f"jobs: got {jobs}, expected at least 1; correct --jobs")
    if jobs == 1 or len(waiting) <= _CUTS_A_TASK:
        yield from ((key, measure(cut)) for key, cut in waiting.items())
        return
    keys = list(waiting)
    # Forking a process in which torch has threads can deadlock.
    pool = ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn"), initializer=_one_thread)
    try:
        yield from zip(keys, pool.map(measure, waiting.values(), chunksize=_CUTS_A_TASK), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
