"""report.json, report.md and items.jsonl of a diagnosis."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kalle.data.doctor.findings import Finding, worst
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item
from kalle.data.doctor.panels import PANELS
from kalle.data.doctor.pictures import OVERVIEW_NAME, PICTURES_FOLDER
from kalle.data.prepare_files import write_jsonl
from kalle.data.report import histogram
from kalle.files import write_atomic

REPORT_JSON, REPORT_MD, ITEMS_NAME = "report.json", "report.md", "items.jsonl"
EXAMPLES = 5
"""Flagged items a check shows in report.md; items.jsonl has all."""


def build_report(corpus: str, items: Sequence[Item], findings: Sequence[Finding], limits: Limits) -> dict[str, Any]:
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


def flagged_rows(items: Sequence[Item], findings: Sequence[Finding]) -> list[dict[str, Any]]:
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


def write_report(folder: Path, report: dict[str, Any], items: Sequence[Item], findings: Sequence[Finding], pictures: bool) -> None:
    """Write the three files."""
    write_jsonl(folder / ITEMS_NAME, flagged_rows(items, findings))
    write_atomic(folder / REPORT_MD, markdown(report, findings, pictures))
    write_atomic(folder / REPORT_JSON, json.dumps(report, indent=2, ensure_ascii=False) + "\n")


def markdown(report: dict[str, Any], findings: Sequence[Finding], pictures: bool) -> str:
    """report.md: verdicts, remedies, examples and, where there are some, pictures."""
    lines = [f"# Diagnosis of {report['corpus']}", "", f"**{report['verdict']}**: {report['items']} items, {report['hours']:.3f} hours,"]
    lines += [f"{report['flagged_items']} items flagged by some check.", ""]
    lines += [f"![overview]({OVERVIEW_NAME})", ""] if pictures else []
    lines += ["## Verdicts", ""]
    lines += [_row(["check", "verdict", "found", "threshold", "what to do"]), _row(["---"] * 5)]
    lines += [_row([f.check, f.verdict, f.summary, f.threshold, f.remedy]) for f in findings] + [""]
    for finding in findings:
        lines += [f"## {finding.check}", ""]
        if pictures and finding.check in PANELS:
            lines += [f"![{finding.check}]({PICTURES_FOLDER}/{finding.check}.png)", ""]
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
