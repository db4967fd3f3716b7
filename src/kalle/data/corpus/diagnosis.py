"""report.json, report.md and items.jsonl of a diagnosis."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from kalle.data.corpus.cuts import check_target, corpus_digest, write_derived
from kalle.data.corpus.measures import MEASUREMENTS_NAME, ItemProgress, MeasuredItem, collect_measures
from kalle.data.corpus.plots import FIGURES, FIGURES_FOLDER, OVERVIEW_NAME, write_figures
from kalle.data.corpus.prepare import histogram
from kalle.data.corpus.quality import CheckResult, Limits, examine, worst
from kalle.files import fingerprint, output_folder, write_atomic, write_jsonl

REPORT_JSON, REPORT_MD, ITEMS_NAME = "report.json", "report.md", "items.jsonl"
EXAMPLES = 5
"""Flagged items a check shows in report.md; items.jsonl has all."""


def diagnosis_report(corpus: str, items: Sequence[MeasuredItem], findings: Sequence[CheckResult], limits: Limits) -> dict[str, Any]:
    """The content of report.json."""
    return {
        "corpus": corpus,
        "verdict": worst([finding.verdict for finding in findings]),
        "items": len(items),
        "hours": round(sum(item.sound.seconds for item in items) / 3600, 5),
        "splits": dict(Counter(item.split for item in items)),
        "flagged_items": len({flag.key for finding in findings for flag in finding.flags}),
        "checks": {finding.check: finding.to_dict() for finding in findings},
        "duration_histogram": histogram([item.sound.seconds for item in items]),
        "limits": asdict(limits),
    }


def flagged_rows(items: Sequence[MeasuredItem], findings: Sequence[CheckResult]) -> list[dict[str, Any]]:
    """One row a flagged item: split, id, text and the reason of every check that flags it."""
    reasons: dict[tuple[str, str], dict[str, str]] = {}
    for finding in findings:
        for flag in finding.flags:
            reasons.setdefault(flag.key, {})[finding.check] = flag.reason
    return [
        {"split": item.split, "id": item.id, "seconds": round(item.sound.seconds, 3), "text": item.text, "reasons": reasons[item.key]}
        for item in items
        if item.key in reasons
    ]


def write_report(
    folder: Path, report: dict[str, Any], items: Sequence[MeasuredItem], findings: Sequence[CheckResult], pictures: bool
) -> None:
    """Write the three files."""
    write_jsonl(folder / ITEMS_NAME, flagged_rows(items, findings))
    write_atomic(folder / REPORT_MD, diagnosis_markdown(report, findings, pictures))
    write_atomic(folder / REPORT_JSON, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def diagnosis_markdown(report: dict[str, Any], findings: Sequence[CheckResult], pictures: bool) -> str:
    """report.md: verdicts, remedies, examples and, where there are some, figures."""
    lines = [f"# Diagnosis of {report['corpus']}", "", f"**{report['verdict']}**: {report['items']} items, {report['hours']:.3f} hours,"]
    lines += [f"{report['flagged_items']} items flagged by some check.", ""]
    lines += [f"![overview]({OVERVIEW_NAME})", ""] if pictures else []
    lines += ["## Verdicts", ""]
    lines += [_row(["check", "verdict", "found", "threshold", "what to do"]), _row(["---"] * 5)]
    lines += [_row([f.check, f.verdict, f.summary, f.threshold, f.remedy]) for f in findings] + [""]
    for finding in findings:
        lines += [f"## {finding.check}", ""]
        if pictures and finding.check in FIGURES:
            lines += [f"![{finding.check}]({FIGURES_FOLDER}/{finding.check}.png)", ""]
        lines += [f"- {name}: {_value(value)}" for name, value in finding.numbers.items()]
        shown = finding.flags[:EXAMPLES]
        lines += [f"- flagged: {flag.split} `{flag.id}`: {flag.reason}" for flag in shown]
        if len(finding.flags) > len(shown):
            lines += [f"- and {len(finding.flags) - len(shown)} more, see {ITEMS_NAME}"]
        lines += [""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {number}" for name, number in value.items()) or "none"
    return str(value)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


MADE_BY = "kalle data doctor"
FILTERED_BY = f"{MADE_BY} --filter"


@dataclass(frozen=True)
class Diagnosis:
    """The result of the doctor: items, their cuts, findings, the report, and how many items an earlier run had measured."""

    items: list[MeasuredItem]
    cuts: dict[tuple[str, str], Cut]
    findings: list[CheckResult]
    report: dict[str, Any]
    reused: int


def diagnose(corpus: Path, out: Path, limits: Limits, jobs: int, progress: ItemProgress, pictures: bool = True) -> Diagnosis:
    """Measure ``corpus`` and write report.json, report.md, items.jsonl, overview.png, pictures/ and the measurements into ``out``.

    UserError for a folder that is no prepared corpus, or an ``out`` that is the corpus itself.
    """
    check_target(out, corpus, MADE_BY, others=(MEASUREMENTS_NAME,))
    with output_folder(out):
        gathered = collect_measures(corpus, out, jobs, progress)
        findings = examine(gathered.items, limits)
        report = {"made_by": MADE_BY, **diagnosis_report(str(corpus), gathered.items, findings, limits)}
        title = f"{corpus.resolve().name}: {report['verdict']}; {report['items']} items, {report['hours']:.2f} hours"
        if pictures:
            write_figures(out, gathered.items, findings, limits, title)
        write_report(out, report, gathered.items, findings, pictures)
    return Diagnosis(gathered.items, gathered.cuts, findings, report, gathered.reused)


def write_filtered(diagnosis: Diagnosis, corpus: Path, out: Path, remove: Sequence[str], limits: Limits) -> dict[str, Any]:
    """Write to ``out`` a prepared corpus without the items that the checks in ``remove`` flag; returns its report.

    The report counts the removed items by check and holds the verdicts on what is left, from the same measurements.
    items.jsonl lists every removed item with its reasons. UserError as `check_target` and `write_derived`.
    """
    check_target(out, corpus, FILTERED_BY)
    removing = [finding for finding in diagnosis.findings if finding.check in remove]
    removed = {flag.key for finding in removing for flag in finding.flags}
    left = [item for item in diagnosis.items if item.key not in removed]
    findings = examine(left, limits)
    source = corpus_digest(corpus)
    report = {
        "source": {"corpus": str(corpus.resolve()), "digest": source},
        "remove": list(remove),
        "items_before": len(diagnosis.items),
        "removed": len(removed),
        "removed_by_check": {finding.check: len({flag.key for flag in finding.flags}) for finding in removing},
        "removed_hours": round(sum(item.sound.seconds for item in diagnosis.items if item.key in removed) / 3600, 5),
        "removed_by_split": dict(Counter(split for split, _ in removed)),
        **diagnosis_report(str(out), left, findings, limits),
    }
    cuts: dict[str, list[Cut]] = {}
    for key, cut in diagnosis.cuts.items():
        cuts.setdefault(key[0], [])
        if key not in removed:
            cuts[key[0]].append(cut)
    mark = fingerprint([source, list(remove), asdict(limits), sorted(removed)])
    with output_folder(out):
        write_derived(out, cuts, report, _filtered_markdown(report, findings), FILTERED_BY, mark)
        write_jsonl(out / ITEMS_NAME, flagged_rows(diagnosis.items, removing))
    return report


def _filtered_markdown(report: dict[str, Any], findings: Sequence[CheckResult]) -> str:
    lines = ["# Filtered corpus", "", f"Made from {report['source']['corpus']} without the items that some checks flag:"]
    lines += [f"{report['removed']} of {report['items_before']} items, {report['removed_hours']:.3f} hours. An item may count twice.", ""]
    lines += [f"- {check}: {count}" for check, count in report["removed_by_check"].items()]
    return "\n".join([*lines, "", diagnosis_markdown(report, findings, pictures=False)])
