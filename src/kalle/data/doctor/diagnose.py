"""The whole diagnosis: measure, judge, draw, write; and the copy of the corpus without what was flagged."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from kalle.data.derived_corpus import check_target, corpus_digest, write_derived
from kalle.data.doctor.examine import examine
from kalle.data.doctor.findings import Finding
from kalle.data.doctor.gather import MEASUREMENTS_NAME, Progress, gather
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item
from kalle.data.doctor.pictures import write_pictures
from kalle.data.doctor.report import ITEMS_NAME, build_report, flagged_rows, markdown, write_report
from kalle.data.prepare_files import write_jsonl
from kalle.files import output_folder

MADE_BY = "kalle data doctor"
FILTERED_BY = f"{MADE_BY} --filter"


@dataclass(frozen=True)
class Diagnosis:
    """What the doctor found: items, their cuts, findings, the report, and how many items an earlier run had measured."""

    items: list[Item]
    cuts: dict[tuple[str, str], Cut]
    findings: list[Finding]
    report: dict[str, Any]
    reused: int


def diagnose(corpus: Path, out: Path, limits: Limits, jobs: int, progress: Progress, pictures: bool = True) -> Diagnosis:
    """Measure ``corpus`` and write report.json, report.md, items.jsonl, overview.png, pictures/ and the measurements into ``out``.

    UserError for a folder that is no prepared corpus, or an ``out`` that is the corpus itself.
    """
    check_target(out, corpus, MADE_BY, others=(MEASUREMENTS_NAME,))
    with output_folder(out):
        gathered = gather(corpus, out, jobs, progress)
        findings = examine(gathered.items, limits)
        report = {"made_by": MADE_BY, **build_report(str(corpus), gathered.items, findings, limits)}
        title = f"{corpus.resolve().name}: {report['verdict']}; {report['items']} items, {report['hours']:.2f} hours"
        if pictures:
            write_pictures(out, gathered.items, findings, limits, title)
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
        **build_report(str(out), left, findings, limits),
    }
    cuts: dict[str, list[Cut]] = {}
    for key, cut in diagnosis.cuts.items():
        cuts.setdefault(key[0], [])
        if key not in removed:
            cuts[key[0]].append(cut)
    fingerprint = hashlib.sha256(json.dumps([source, list(remove), asdict(limits), sorted(removed)]).encode()).hexdigest()
    with output_folder(out):
        write_derived(out, cuts, report, _filtered_markdown(report, findings), FILTERED_BY, fingerprint)
        write_jsonl(out / ITEMS_NAME, flagged_rows(diagnosis.items, removing))
    return report


def _filtered_markdown(report: dict[str, Any], findings: Sequence[Finding]) -> str:
    lines = ["# Filtered corpus", "", f"Made from {report['source']['corpus']} without the items that some checks flag:"]
    lines += [f"{report['removed']} of {report['items_before']} items, {report['removed_hours']:.3f} hours. An item may count twice.", ""]
    lines += [f"- {check}: {count}" for check, count in report["removed_by_check"].items()]
    return "\n".join([*lines, "", markdown(report, findings, pictures=False)])
