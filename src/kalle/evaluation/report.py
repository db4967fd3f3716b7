"""The result of an evaluation, and the files that hold it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kalle.errors import UserError
from kalle.evaluation.figures import FigureRow, draw
from kalle.evaluation.intelligibility import RULES, judge, word_facts
from kalle.evaluation.metrics import DECLARED, Aggregate, Metric, unit_of
from kalle.evaluation.pool import MetricCard, twin_rules
from kalle.evaluation.report_page import PageOptions, runs_of, tokens_of, write_page
from kalle.evaluation.scoring import Estimate, Row, Scores, count_rows, summarise
from kalle.files import folder_lock, write_atomic

RESULT_NAMES = ("results.json", "items.jsonl", "report.md", "figure.png", "report.html")
TERMINAL_COLUMNS = 80
BETTER = "  higher is better"
NARROWEST_CELL = 13
PACKAGES = ("kalle-tts", "torch", "numpy", "lhotse")


@dataclass(frozen=True)
class Settings:
    """Settings that every kind of evaluation shares."""

    resamples: int = 1000
    """Bootstrap resamples for the 95% intervals."""
    bootstrap_seed: int = 0
    figure_items: int = 4
    """Items drawn in figure.png; 0 draws none."""
    page_items: int = 20
    """Items to listen to in report.html, those with most errors; 0 writes no page."""
    link_audio: bool = False
    """Whether the page links the wavs in place of holding their audio."""
    progress: bool = False
    """Show a progress bar on standard error."""
    score_recordings: bool = True
    """Score the recordings themselves too, as the ceiling."""
    recordings: str | Path | None = None
    """An earlier result (folder) by the same metrics: its scores of recordings are taken over where audio, text and prompt are equal."""
    context: Mapping[str, Any] = field(default_factory=dict)
    """Recorded beside the arguments: the test list and how many of its items were left out, hardware, seeds."""


@dataclass(frozen=True)
class Result:
    """The outcome of one evaluation.

    ``summary[system][aggregate]`` is an Estimate; systems are "recording" (the ceiling) and what was scored.
    ``rows`` are as ``Scores`` describes; ``counts`` as ``count_rows``.
    """

    kind: str
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: Mapping[str, Mapping[str, object]]
    rows: Sequence[Row]
    summary: Mapping[str, Mapping[str, Estimate]]
    counts: Mapping[str, Mapping[str, Any]]
    notes: Sequence[str]
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Facts of the run as a whole, such as latent health."""
    lower_is_better: Mapping[str, bool | None] = field(default_factory=dict)
    """The direction of each aggregate; None where there is no better."""
    units: Mapping[str, str] = field(default_factory=dict)
    """The unit of each aggregate that ``metrics.DECLARED`` knows."""
    words: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Errors by length of the text and by word, for each system with transcripts: see ``intelligibility.word_facts``."""
    columns: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The columns of each aggregate: their mean, or two whose sums are divided. With them, two results can be compared item by item."""

    def value(self, system: str, name: str) -> float | None:
        """The mean called ``name`` of ``system``; None when it was not measured."""
        found = self.summary.get(system, {}).get(name)
        return None if found is None else found.value

    @property
    def errors(self) -> int:
        """Rows that could not be made or read, over all systems: an item counts once for each seed."""
        return sum(count["errors"] for count in self.counts.values())


def finish(
    kind: str,
    scores: Scores,
    config: Mapping[str, Any],
    settings: Settings,
    out_dir: str | Path,
    figure_rows: Sequence[FigureRow] = (),
    extra_rules: Iterable[Aggregate] = (),
    notes: Sequence[str] = (),
    extra: Mapping[str, Any] | None = None,
) -> Result:
    """Summarise ``scores`` and write results.json, items.jsonl, report.md, report.html and figure.png to ``out_dir``.

    UserError, and nothing is written, when not one item could be scored.
    """
    out = Path(out_dir)
    failed = [row for row in scores.rows if "error" in row]
    if len(failed) == len(scores.rows):
        reason = failed[0]["error"] if failed else "the list is empty"
        raise UserError(f"nothing could be scored: {len(failed)} of {len(failed)} items failed, the first because: {reason}")
    extra_rules = [*extra_rules, *RULES]
    tokens = tokens_of(metric.describe() for metric in scores.metrics)
    judge(scores.rows, tokens)
    rules = [rule for metric in scores.metrics for rule in [*metric.aggregates, *twin_rules(metric)]] + list(extra_rules)
    taken_over = {} if settings.recordings is None else {"recordings": str(settings.recordings)}
    result = Result(
        kind=kind,
        config={**settings.context, **taken_over, **config, "resamples": settings.resamples, "bootstrap_seed": settings.bootstrap_seed},
        versions=versions(),
        metrics={metric.name: dict(metric.describe()) for metric in scores.metrics},
        rows=scores.rows,
        summary=summarise(scores.rows, rules, settings.resamples, settings.bootstrap_seed),
        counts=count_rows(scores.rows),
        notes=[*notes, *unmeasured(scores.metrics, scores.rows), *unheard(scores.metrics, scores.rows)],
        extra=dict(extra or {}),
        lower_is_better={rule.name: rule.lower_is_better for rule in rules},
        units={rule.name: unit for rule in rules if (unit := unit_of(rule.name)) is not None},
        words=word_facts(scores.rows, tokens),
        columns={rule.name: [rule.numerator] if rule.denominator is None else [rule.numerator, rule.denominator] for rule in rules},
    )
    with folder_lock(out, "results", wait=True):  # two ranks may end at the same time
        write_atomic(out / "items.jsonl", "".join(_json(row) + "\n" for row in result.rows))
        stored = _json(asdict(result), indent=2)
        write_atomic(out / "results.json", stored + "\n")
        write_atomic(out / "report.md", report(result))
        if settings.figure_items and figure_rows:
            write_atomic(out / "figure.png", draw(figure_rows[: settings.figure_items]))
        if settings.page_items:
            options = PageOptions(settings.page_items, settings.link_audio)
            write_page(out / "report.html", runs_of(json.loads(stored), out), options=options)
    return result


def _json(value: object, indent: int | None = None) -> str:
    return json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide numbers; "unknown" for one that is not installed as a distribution."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "unknown"
    return found


def unmeasured(metrics: Sequence[Metric | MetricCard], rows: Sequence[Row]) -> list[str]:
    """One line for every metric that no row holds, with what it would have needed."""
    columns = {column for row in rows for column in row}
    tried = {name for row in rows for name in row.get("metric_errors", {})}
    missing = [metric for metric in metrics if not any(rule.numerator in columns for rule in metric.aggregates)]
    reasons = {
        metric.name: "failed on every item" if metric.name in tried else "not measured, no item offers what it needs" for metric in missing
    }
    return [f"{metric.name} {reasons[metric.name]} ({', '.join(sorted(metric.needs))})" for metric in missing]


NARROWER = 0.9
"""Audio whose band is below this share of what a metric expects counts as narrower."""


def unheard(metrics: Sequence[Metric | MetricCard], rows: Sequence[Row]) -> list[str]:
    """A line for every system whose audio is stored at a lower rate, or holds less bandwidth, than its metrics were made for."""
    notes = []
    columns = {rule.name: rule.numerator for metric in metrics for rule in metric.aggregates}
    expected = {rule.name: DECLARED[rule.name] for metric in metrics for rule in metric.aggregates if rule.name in DECLARED}
    for system in dict.fromkeys(row["system"] for row in rows):
        own = [row for row in rows if row["system"] == system and "band_hz" in row]
        for what, column, wanted, share in (
            ("is stored at less than", "rate_hz", {name: known.rate_hz for name, known in expected.items()}, 1.0),
            ("holds no content up to", "band_hz", {name: known.band_hz for name, known in expected.items()}, NARROWER),
        ):
            for hz in sorted(set(wanted.values()), reverse=True):
                below = sum(0 < row[column] < share * hz for row in own)
                names = [name for name, needed in wanted.items() if needed == hz and any(columns[name] in row for row in own)]
                if below and names:
                    notes.append(f"{system}: the audio of {below} of {len(own)} items {what} the {hz} Hz of {', '.join(names)}")
    return notes


def report(result: Result) -> str:
    """The result as Markdown: one row a system, mean and 95% interval, then counts, models and notes."""
    names = list(dict.fromkeys(name for estimates in result.summary.values() for name in estimates))
    lines = [f"# Evaluation: {result.kind}", "", "| system | items | errors | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for system, estimates in result.summary.items():
        count = result.counts[system]
        cells = [_cell(estimates.get(name), count["items"]) for name in names]
        lines.append(f"| {system} | {count['items']} | {count['errors']} | " + " | ".join(cells) + " |")
    lines += ["", "Means with 95% bootstrap intervals; n is given where a mean covers fewer items than the row.", ""]
    for system, count in result.counts.items():
        lines += [f"- {system}: {count['seeds']} seeds an item, averaged before items are resampled"] if count["seeds"] > 1 else []
        details = {key: value for key, value in count.items() if key not in ("items", "seeds", "errors") and value}
        lines += [f"- {system}: {key.replace('_', ' ')}: {_pairs(value)}" for key, value in details.items()]
    lines += [line for system, facts in result.words.items() for line in _word_lines(system, facts)]
    lines += [f"- {name}: {_pairs(described)}" for name, described in result.metrics.items()]
    lines += [f"- {key}: {_pairs(value) if isinstance(value, Mapping) else value}" for key, value in result.extra.items()]
    lines += [f"- note: {note}" for note in result.notes]
    lines += ["", "Settings: " + _pairs(result.config), "", "Versions: " + _pairs(result.versions), ""]
    return "\n".join(lines)


REPORTED_WORDS = 10


def _word_lines(system: str, facts: Mapping[str, Any]) -> list[str]:
    """WER by length of the text, and the words with most errors (errors of times in the texts)."""
    lengths = [f"{p['first']} to {p['last']} words {p['wer']['value']:.3f} ({p['wer']['count']} items)" for p in facts["by_length"]]
    wrong = [f"{w['word']} {w['deleted'] + w['substituted']} of {w['spoken']}" for w in facts["by_word"][:REPORTED_WORDS]]
    added = [f"{word} {count}" for word, count in facts["inserted"][:REPORTED_WORDS]]
    said = (("WER by length", lengths), ("words with most errors", wrong), ("words heard that no text has", added))
    return [f"- {system}: {title}: {', '.join(found)}" for title, found in said if found]


def terminal_report(result: Result) -> str:
    """The result for a terminal of 80 columns: a row an aggregate, with its direction, then one sentence and what to know beside it."""
    systems = list(result.summary)
    names = list(dict.fromkeys(name for estimates in result.summary.values() for name in estimates))
    first = max(map(len, [*names, "metric"]))
    width = min(24, max(NARROWEST_CELL, (TERMINAL_COLUMNS - first - len(BETTER)) // max(1, len(systems))))
    lines = [f"{'metric':<{first}}" + "".join(f"{system[: width - 1]:>{width}}" for system in systems)]
    for name in names:
        cells = "".join(f"{_narrow(result.summary[system].get(name)):>{width}}" for system in systems)
        better = {True: "  lower is better", False: BETTER}.get(result.lower_is_better.get(name), "")  # type: ignore[arg-type]
        lines.append(f"{name:<{first}}{cells}{better}")
    notes = [f"note: {note}" for note in result.notes if "no item offers" not in note]
    lines += ["", *(textwrap.fill(text, TERMINAL_COLUMNS) for text in (verdict(result), *notes))]
    return "\n".join(lines)


def _narrow(value: Estimate | None) -> str:
    if value is None:
        return "–"
    half = "" if value.interval is None else f" ±{(value.interval[1] - value.interval[0]) / 2:.3f}"
    return f"{value.value:.3f}{half}"


def verdict(result: Result) -> str:
    """One sentence on what was scored: its word errors beside those of the recordings, else its first metric; and what failed."""
    scored = [system for system in result.summary if system != "recording"] or list(result.summary)
    system = scored[0]
    wer, ceiling = result.value(system, "wer_corpus"), result.value("recording", "wer_corpus")
    if wer is not None:
        said = f"{system}: {wer:.1%} of the words were not understood"
        said += f", against {ceiling:.1%} of the recordings" if ceiling is not None and system != "recording" else ""
    else:
        name, value = next(iter(result.summary[system].items()), ("", None))
        said = f"{system}: nothing was measured" if value is None else f"{system}: {name} is {value.value:.3f} over {value.count} items"
    failed, items, seeds = (result.counts[system][name] for name in ("errors", "items", "seeds"))
    counted = f"{items} items" if seeds == 1 else f"{items * seeds} syntheses ({items} items, {seeds} seeds)"
    return f"{said}; " + (f"{failed} of {counted} could not be scored." if failed else f"all {counted} were scored.")


def _cell(value: Estimate | None, items: int) -> str:
    if value is None:
        return "–"
    interval = "" if value.interval is None else f" [{value.interval[0]:.3f}, {value.interval[1]:.3f}]"
    return f"{value.value:.3f}{interval}" + ("" if value.count == items else f" (n={value.count})")


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items())
