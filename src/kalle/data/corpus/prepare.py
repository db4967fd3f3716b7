"""The prepare step: a source becomes a corpus folder of lhotse cuts with a report; idempotent, and resumable item by item."""

from __future__ import annotations

import hashlib
import itertools
import json
import multiprocessing
import os
import signal
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lhotse import MonoCut

from kalle.data.corpus.check import Kept, check_item, replaces_source
from kalle.data.corpus.cuts import COMPLETED_NAME, REPORT_JSON, REPORT_MD, cuts_path, make_cut, write_cuts
from kalle.data.corpus.items import REASONS, SPLITS, PrepareOptions, Rejection, Source, SourceItem, word_count
from kalle.data.shared_work import ResumeJournal
from kalle.errors import UserError
from kalle.files import file_stamp, is_file, output_folder, parse_json, spelled_otherwise, write_atomic

# Upper edges in seconds; the last bin is open.
DURATION_EDGES_S = (0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0)
SCORED_WORDS = 4
NAMES_SHOWN = 20


def prepare_report(source: Source, options: PrepareOptions, kept: list[Kept], rejected: list[Rejection]) -> dict[str, Any]:
    """The content of report.json; ``items`` = kept + rejected, always."""
    reasons = Counter(rejection.reason for rejection in rejected)
    return {
        "name": source.name,
        "options": asdict(options),
        "items": len(kept) + len(rejected),
        "kept": len(kept),
        "rejected": len(rejected),
        "hours": round(_seconds(kept) / 3600, 5),
        "splits": {split: _split_row([item for item in kept if item.split == split]) for split in SPLITS},
        "speakers": _minutes_by(kept, "speaker"),
        "languages": _minutes_by(kept, "language"),
        "sample_rates_hz": _counts(kept, "source_rate_hz"),
        "channels": _counts(kept, "source_channels"),
        "resampled": sum(item.source_rate_hz != options.sample_rate_hz for item in kept),
        "converted_to_flac": sum(item.audio != item.source for item in kept),
        "checked_by_header_only": sum(not item.decoded for item in kept),
        "duration_histogram": histogram([item.seconds for item in kept]),
        "rejected_by_reason": {reason: reasons[reason] for reason in REASONS if reasons[reason]},
        "rejected_items": [asdict(rejection) for rejection in rejected],
        "notes": source.notes,
    }


def histogram(seconds: list[float]) -> dict[str, int]:
    """How many durations fall into each bin of `DURATION_EDGES_S`, by label."""
    counts = [0] * (len(DURATION_EDGES_S) + 1)
    for value in seconds:
        counts[sum(value >= edge for edge in DURATION_EDGES_S)] += 1
    lower = (0.0, *DURATION_EDGES_S)
    labels = [f"{low:g}-{high:g} s" for low, high in zip(lower, DURATION_EDGES_S, strict=False)] + [f"{DURATION_EDGES_S[-1]:g} s and more"]
    return dict(zip(labels, counts, strict=True))


def prepare_markdown(report: dict[str, Any]) -> str:
    """report.md: the same numbers as tables, with every rejected item."""
    lines = [f"# Corpus {report['name']}", ""]
    lines += [f"{report['items']} items: {report['kept']} kept ({report['hours']:.3f} hours), {report['rejected']} rejected.", ""]
    for title, headers, rows in tables(report):
        lines += [f"## {title}", "", _row(headers), _row(["---"] * len(headers)), *[_row(row) for row in rows], ""]
    if report["rejected_items"]:
        lines += ["## Rejected items", "", _row(["id", "reason", "detail"]), _row(["---"] * 3)]
        lines += [_row([item["id"], item["reason"], item["detail"]]) for item in report["rejected_items"]] + [""]
    return "\n".join(lines)


def tables(report: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report as titled tables of text, for Markdown and for the terminal: (title, headers, rows)."""
    splits = [
        [split, str(row["items"]), f"{row['minutes']:.2f}", str(row["speakers"]), str(row["words"]), str(row["items_of_four_words"])]
        for split, row in report["splits"].items()
    ]
    who = [row for kind in ("speakers", "languages") for row in _who(kind, report[kind])]
    found = [["sample rate", f"{rate} Hz", str(count)] for rate, count in report["sample_rates_hz"].items()]
    found += [["channels", channels, str(count)] for channels, count in report["channels"].items()]
    found += [["converted", "resampled", str(report["resampled"])], ["converted", "to mono FLAC", str(report["converted_to_flac"])]]
    found += [["checked", "by header only", str(report["checked_by_header_only"])]] * bool(report["checked_by_header_only"])
    found += [["note", note, str(value)] for note, value in report["notes"].items()]
    longest = max([*report["duration_histogram"].values(), 1])
    durations = [[label, str(count), "#" * round(30 * count / longest)] for label, count in report["duration_histogram"].items()]
    rejected = [[reason, str(count)] for reason, count in report["rejected_by_reason"].items()] or [["none", "0"]]
    return [
        ("Splits", ["split", "items", "minutes", "speakers", "words", f"items of >= {SCORED_WORDS} words"], splits),
        ("Speakers and languages", ["kind", "name", "items", "minutes"], who),
        ("Audio", ["what", "value", "items"], found),
        ("Durations", ["seconds", "items", ""], durations),
        ("Rejected", ["reason", "items"], rejected),
    ]


def _who(kind: str, groups: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each name, or for those with the most minutes and one for all others; report.json has everybody."""
    shown = sorted(groups, key=lambda name: -groups[name]["minutes"])[:NAMES_SHOWN] if len(groups) > NAMES_SHOWN else list(groups)
    rows = [[kind, name or "(not given)", str(groups[name]["items"]), f"{groups[name]['minutes']:.2f}"] for name in shown]
    others = [groups[name] for name in sorted(groups.keys() - set(shown))]
    if others:
        items, minutes = sum(group["items"] for group in others), sum(group["minutes"] for group in others)
        rows.append([kind, f"({len(others)} others)", str(items), f"{minutes:.2f}"])
    return rows


def _split_row(items: list[Kept]) -> dict[str, Any]:
    words = [word_count(item.text) for item in items]
    return {
        "items": len(items),
        "minutes": round(_seconds(items) / 60, 3),
        "speakers": len({item.speaker for item in items}),
        "words": sum(words),
        "items_of_four_words": sum(count >= SCORED_WORDS for count in words),
    }


def _minutes_by(items: list[Kept], field: str) -> dict[str, dict[str, Any]]:
    counts: Counter[str] = Counter()
    seconds: defaultdict[str, float] = defaultdict(float)
    for item in items:
        name = getattr(item, field)
        counts[name] += 1
        seconds[name] += item.seconds
    return {name: {"items": counts[name], "minutes": round(seconds[name] / 60, 3)} for name in sorted(counts)}


def _counts(items: list[Kept], field: str) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(getattr(item, field) for item in items).items())}


def _seconds(items: list[Kept]) -> float:
    return sum(item.seconds for item in items)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


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
            f"a worker process was killed: got {jobs} processes, expected memory for each; run the same command again with fewer jobs"
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
SourceProgress = Callable[[list[SourceItem]], Iterable[SourceItem]]


@dataclass(frozen=True)
class Prepared:
    """The result of a prepare step: its report, whether anything had to be done, and how many items an earlier run had done."""

    folder: Path
    report: dict[str, Any]
    unchanged: bool
    resumed_items: int


def prepare_corpus(source: Source, out: Path, options: PrepareOptions, progress: SourceProgress = iter, jobs: int = 1) -> Prepared:
    """Write ``out``/cuts_{train,valid,test}.jsonl.gz, report.json, report.md and, last of all, .completed.

    Same source and options: nothing is done. Other ones: the folder's cuts are made anew. After an interrupt the
    items already checked are not checked again. ``jobs`` processes check items; the result does not depend on how many. Raises
    UserError when no item at all is fit, ``out`` would replace files of the source, or the disk refuses; then no partial file stays.
    """
    fingerprint = source_fingerprint(source, options)
    finished = _finished_report(out, fingerprint)
    if finished is not None:
        return Prepared(out, finished, unchanged=True, resumed_items=0)
    _check_apart(source, out)
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


def _check_apart(source: Source, out: Path) -> None:
    """A UserError where ``out`` would replace a list that was read, or a recording by the conversion of another one.

    Whether the other one would be converted at all is not asked. By its own conversion: `kalle.data.corpus.check`, where that is written.
    """
    written = {cuts_path(out, split).resolve() for split in SPLITS}
    taken = next((file for file in source.lists if file.resolve() in written), None)
    taken = taken or _replaced(source.items, out / "audio")
    if taken is not None:
        raise replaces_source(out, taken)


def _replaced(items: Sequence[SourceItem], folder: Path) -> Path | None:
    """A recording that lies in ``folder`` under the name that the conversion of another item would have."""
    names = {f"{item.id}.flac".casefold() for item in items}
    present: dict[tuple[int, int], str] = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            with suppress(OSError):  # links in a circle or to nowhere
                if entry.name.casefold() in names:
                    state = entry.stat()
                    present[state.st_dev, state.st_ino] = entry.name.casefold()
    for item in items if present else ():
        with suppress(OSError, ValueError):  # the same, or a name that no file can have
            state = item.audio.stat()
            if present.get((state.st_dev, state.st_ino), f"{item.id}.flac".casefold()) != f"{item.id}.flac".casefold():
                return item.audio
    return None


def source_fingerprint(source: Source, options: PrepareOptions) -> str:
    """A digest of the options and of every item's text, names, and audio path, size and modification time."""
    digest = hashlib.sha256(json.dumps([FORMAT_VERSION, source.name, asdict(options)], sort_keys=True).encode())
    for item in source.items:
        # A file that may be read now is not the one that was rejected before, though its times are the same.
        state = (file_stamp(item.audio), _is_readable(item.audio))
        part = [item.start_s, item.duration_s, item.channel, item.inside and asdict(item.inside), item.custom]
        who = [item.text, item.speaker, item.language, item.split]
        digest.update(json.dumps([item.id, str(item.audio), *who, state, *part], sort_keys=True).encode())
    for rejection in source.rejected:
        digest.update(json.dumps(asdict(rejection)).encode())
    return digest.hexdigest()


def _is_readable(path: Path) -> bool:
    try:
        return os.access(path, os.R_OK)
    except ValueError:  # a zero byte in the name
        return False


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
    source: Source, out: Path, options: PrepareOptions, journal: ResumeJournal, progress: SourceProgress, jobs: int
) -> tuple[int, list[Kept], list[Rejection]]:
    """How many results an earlier run had left, and the results of all items in the source's order."""
    results: dict[str, Kept | Rejection] = {}
    for entry in journal.entries:
        with suppress(TypeError, KeyError):  # a damaged line: that item is checked again
            if "reason" in entry:
                results[entry["id"]] = Rejection(**entry)
            elif is_file(out / entry["audio"]):
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
    report = prepare_report(source, options, kept, rejected)
    write_atomic(out / REPORT_JSON, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    write_atomic(out / REPORT_MD, prepare_markdown(report))
    if not any(item.split == "train" or not options.split.trains for item in kept):
        counts = ", ".join(f"{count} {reason}" for reason, count in report["rejected_by_reason"].items()) or "none rejected"
        limits = any(rejection.reason != "missing" for rejection in rejected) or not rejected
        remedy = "loosen the limits or correct the corpus" if limits else "correct the paths"
        raise UserError(
            f"nothing to train on in '{source.name}': got {len(kept)} usable items, none of them for training ({counts}); "
            f"{_first_missing(rejected)}see {out / REPORT_JSON} for each item, and {remedy}"
        )
    for split in SPLITS:
        write_cuts(cuts_path(out, split), (_cut(item, options.sample_rate_hz) for item in kept if item.split == split))
    write_atomic(out / COMPLETED_NAME, _marker(out, fingerprint))
    return report


def _first_missing(rejected: list[Rejection]) -> str:
    """The first recording that is not there, and the file that its name may mean, as a part of a message; empty when all are there."""
    missing = next((one.audio for one in rejected if one.reason == "missing" and Path(one.audio).is_absolute()), None)
    if missing is None:
        return ""
    other = spelled_otherwise(Path(missing))
    instead = f", while there is '{other}'; write the names as the files have them, with / between folders" if other else ""
    return f"there is no '{missing}'{instead}; "


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
