"""The report of a prepare step: hours, speakers, rates, durations, and every rejected item with its reason."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import asdict
from typing import Any

from kalle.data.corpus.check import Kept, PrepareOptions
from kalle.data.corpus.items import REASONS, Rejection, Source
from kalle.data.corpus.splits import SPLITS, word_count

# Upper edges in seconds; the last bin is open.
DURATION_EDGES_S = (0.5, 1.0, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0, 20.0, 30.0)
SCORED_WORDS = 4
NAMES_SHOWN = 20


def build_report(source: Source, options: PrepareOptions, kept: list[Kept], rejected: list[Rejection]) -> dict[str, Any]:
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


def markdown(report: dict[str, Any]) -> str:
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
