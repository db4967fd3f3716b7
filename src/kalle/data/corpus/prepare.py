"""The prepare step: a source becomes a corpus folder of lhotse cuts with a report; idempotent, and resumable item by item."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lhotse import MonoCut

from kalle.data.corpus.check import Kept, PrepareOptions, check_item
from kalle.data.corpus.cuts import COMPLETED_NAME, REPORT_JSON, REPORT_MD, cuts_path, make_cut, write_cuts
from kalle.data.corpus.items import Rejection, Source, SourceItem
from kalle.data.corpus.report import build_report, markdown
from kalle.data.corpus.splits import SPLITS
from kalle.data.shared_work import ResumeJournal
from kalle.errors import UserError
from kalle.files import output_folder, parse_json, write_atomic

CHUNK_ITEMS = 8
CHUNKS_AHEAD = 4
"""For each process; more would only wait in memory, and be lost at an interrupt."""


class WorkerLost(UserError):
    """A worker process ended in the middle of its work; what was finished is in the journal."""


def check_parallel(items: list[SourceItem], options: PrepareOptions, out: Path, jobs: int) -> Generator[Kept | Rejection, None, None]:
    """`check_item` of every item, in order, by ``jobs`` processes; raises WorkerLost when one of them is killed.

    Closing the generator waits for the few items that are being checked.
    """
    chunks = (items[start : start + CHUNK_ITEMS] for start in range(0, len(items), CHUNK_ITEMS))
    waiting: deque[Future[list[Kept | Rejection]]] = deque()
    # Not forked: torch and PyAV have threads of their own by now.
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_ignore_interrupts)
    try:
        for chunk in itertools.chain(chunks, itertools.repeat(None)):
            if chunk is not None:
                waiting.append(pool.submit(_check_chunk, chunk, options, out))
                if len(waiting) < jobs * CHUNKS_AHEAD:
                    continue
            if not waiting:
                return
            yield from waiting.popleft().result()
    except BrokenProcessPool:
        raise WorkerLost(
            f"a worker process was killed: got {jobs} processes, expected memory for each; run the same command again with fewer --jobs"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _check_chunk(items: list[SourceItem], options: PrepareOptions, out: Path) -> list[Kept | Rejection]:
    return [check_item(item, options, out) for item in items]


def _ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the main one decides."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


JOURNAL_NAME = "journal.jsonl"
FORMAT_VERSION = 2
Progress = Callable[[list[SourceItem]], Iterable[SourceItem]]


@dataclass(frozen=True)
class Prepared:
    """The result of a prepare step: its report, whether anything had to be done, and how many items an earlier run had done."""

    folder: Path
    report: dict[str, Any]
    unchanged: bool
    resumed_items: int


def prepare_corpus(source: Source, out: Path, options: PrepareOptions, progress: Progress = iter, jobs: int = 1) -> Prepared:
    """Write ``out``/cuts_{train,valid,test}.jsonl.gz, report.json, report.md and, last of all, .completed.

    Same source and options: nothing is done. Other ones: the folder's cuts are made anew. After an interrupt the
    items already checked are not checked again. ``jobs`` processes check items; the result does not depend on how many. Raises
    UserError when no item at all is fit, or the disk refuses; then no partial file stays.
    """
    fingerprint = source_fingerprint(source, options)
    finished = _finished_report(out, fingerprint)
    if finished is not None:
        return Prepared(out, finished, unchanged=True, resumed_items=0)
    with output_folder(out):
        (out / COMPLETED_NAME).unlink(missing_ok=True)
        journal = ResumeJournal(out / JOURNAL_NAME, fingerprint)
        try:
            resumed, kept, rejected = _listen(source, out, options, journal, progress, jobs)
            report = _finish(source, out, options, fingerprint, kept, rejected)
        except WorkerLost:
            journal.close()
            raise
        except (OSError, UserError):
            journal.remove()
            raise
        except BaseException:
            journal.close()
            raise
        journal.remove()
    return Prepared(out, report, unchanged=False, resumed_items=resumed)


def source_fingerprint(source: Source, options: PrepareOptions) -> str:
    """A digest of the options and of every item's text, names, and audio path, size and modification time."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, source.name, asdict(options)], sort_keys=True).encode())
    for item in source.items:
        stat = item.audio.stat() if item.audio.is_file() else None
        state = [stat.st_size, stat.st_mtime_ns] if stat else None
        part = [item.start_s, item.duration_s, item.channel, item.inside and asdict(item.inside), item.custom]
        who = [item.text, item.speaker, item.language, item.split]
        digest.update(json.dumps([item.id, str(item.audio), *who, state, *part], sort_keys=True).encode())
    for rejection in source.rejected:
        digest.update(json.dumps(asdict(rejection)).encode())
    return digest.hexdigest()


def _finished_report(out: Path, fingerprint: str) -> dict[str, Any] | None:
    """The report of a folder finished with ``fingerprint``, None when it is another's or a file of it is missing."""
    try:
        if (out / COMPLETED_NAME).read_text(encoding="utf-8", errors="replace") != _marker(out, fingerprint):
            return None  # another corpus, or a damaged one
        report = parse_json((out / REPORT_JSON).read_bytes())
    except (OSError, ValueError):
        return None
    return report if len(list((out / "audio").glob("*.flac"))) >= report["converted_to_flac"] else None


def _marker(out: Path, fingerprint: str) -> str:
    """The content of .completed: the fingerprint, and the SHA-256 of every file that was written."""
    names = [REPORT_JSON, REPORT_MD, *[cuts_path(out, split).name for split in SPLITS]]
    return "".join([f"{fingerprint}\n", *[f"{name} {hashlib.sha256((out / name).read_bytes()).hexdigest()}\n" for name in names]])


def _listen(
    source: Source, out: Path, options: PrepareOptions, journal: ResumeJournal, progress: Progress, jobs: int
) -> tuple[int, list[Kept], list[Rejection]]:
    """How many results an earlier run had left, and the results of all items in the source's order."""
    results: dict[str, Kept | Rejection] = {}
    for entry in journal.entries:
        with suppress(TypeError, KeyError):  # a damaged line: that item is checked again
            if "reason" in entry:
                results[entry["id"]] = Rejection(**entry)
            elif (out / entry["audio"]).is_file():
                results[entry["id"]] = Kept(**entry)
    resumed = len(results)
    waiting = [item for item in source.items if item.id not in results]
    with closing(check_parallel(waiting, options, out, jobs) if jobs > 1 else _one_by_one(waiting, options, out)) as checked:
        for item in progress(waiting):
            result = next(checked)
            journal.add(result.to_dict() if isinstance(result, Kept) else asdict(result))
            results[item.id] = result
    ordered = [results[item.id] for item in source.items]
    kept = _in_every_split([result for result in ordered if isinstance(result, Kept)], source, options)
    rejected = source.rejected + [result for result in ordered if isinstance(result, Rejection)]
    return resumed, kept, rejected


def _in_every_split(kept: list[Kept], source: Source, options: PrepareOptions) -> list[Kept]:
    """The items with the splits that `SplitPolicy.completed` gives those that have none of their own."""
    own = {item.id: item.split for item in source.items if item.split is not None}
    free = [item for item in kept if item.id not in own]
    splits = options.split.completed([item.text for item in free], [item.split for item in free], set(own.values()))
    changed = {item.id: split for item, split in zip(free, splits, strict=True)}
    return [replace(item, split=changed.get(item.id, item.split)) for item in kept]


def _one_by_one(items: list[SourceItem], options: PrepareOptions, out: Path) -> Generator[Kept | Rejection, None, None]:
    for item in items:
        yield check_item(item, options, out)


def _finish(
    source: Source, out: Path, options: PrepareOptions, fingerprint: str, kept: list[Kept], rejected: list[Rejection]
) -> dict[str, Any]:
    report = build_report(source, options, kept, rejected)
    write_atomic(out / REPORT_JSON, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / REPORT_MD, markdown(report))
    if not any(item.split == "train" for item in kept):
        counts = ", ".join(f"{count} {reason}" for reason, count in report["rejected_by_reason"].items()) or "none rejected"
        raise UserError(
            f"nothing to train on in '{source.name}': got {len(kept)} usable items, none of them for training ({counts}); "
            f"see {out / REPORT_JSON} for each item, and loosen the limits or correct the corpus"
        )
    for split in SPLITS:
        write_cuts(cuts_path(out, split), (_cut(item, options.sample_rate_hz) for item in kept if item.split == split))
    write_atomic(out / COMPLETED_NAME, _marker(out, fingerprint))
    return report


def _cut(item: Kept, sample_rate_hz: int) -> MonoCut:
    # A FLAC that was made for the item holds just that, at another rate perhaps; any other file may hold more.
    whole = item.audio != item.source or round(item.seconds * item.stored_rate_hz) == item.stored_samples
    return make_cut(
        item.id,
        item.audio,
        item.stored_rate_hz,
        item.stored_samples,
        sample_rate_hz,
        item.text,
        item.speaker,
        item.language,
        source=item.source if item.audio != item.source else "",
        start_samples=item.start_samples,
        seconds=None if whole else item.seconds,
        custom=item.custom,
    )
