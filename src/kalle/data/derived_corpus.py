"""A prepared corpus made from another one: the same cuts or some of them, with absolute audio paths, and a report of its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lhotse.cut import Cut

from kalle.data.cuts import cuts_path, write_cuts
from kalle.data.prepare import COMPLETED_NAME, REPORT_JSON, REPORT_MD
from kalle.data.prepare_split import SPLITS
from kalle.errors import UserError
from kalle.files import output_folder, write_atomic

MADE_BY = "made_by"


def corpus_digest(corpus: Path) -> str:
    """SHA-256 (hex) of the marker and of all cuts of a prepared corpus: what a derived one was made from."""
    digest = hashlib.sha256()
    for path in [corpus / COMPLETED_NAME, *sorted(corpus.glob("cuts_*.jsonl.gz"))]:
        digest.update(path.name.encode() + b"\0" + (path.read_bytes() if path.is_file() else b""))
    return digest.hexdigest()


def check_target(out: Path, corpus: Path, made_by: str, others: Sequence[str] = ()) -> None:
    """A UserError unless ``out`` is new, empty, or an earlier result of ``made_by``; an interrupt may have left files called ``others``."""
    if out.resolve() == corpus.resolve():
        raise UserError(f"'{out}' is the corpus itself: expected another folder for the new one; nothing is changed in place")
    if not out.exists() or {path.name for path in out.iterdir()} <= set(others):
        return
    report = out / REPORT_JSON
    try:
        made = json.loads(report.read_text(encoding="utf-8")).get(MADE_BY)
    except (OSError, ValueError, AttributeError):
        made = None
    if made != made_by:
        raise UserError(
            f"'{out}' holds something else: expected a new or empty folder, or an earlier result of `{made_by}`; choose another"
        )


def write_derived(
    out: Path, cuts: Mapping[str, Sequence[Cut]], report: dict[str, Any], markdown: str, made_by: str, fingerprint: str
) -> None:
    """Write the cuts of every split, report.json, report.md and, last of all, .completed.

    UserError when no training item is left.
    """
    if not cuts.get("train"):
        raise UserError(f"nothing to train on would be left in '{out}': {_counts(cuts)}; loosen the limits or mend the corpus")
    with output_folder(out):
        (out / COMPLETED_NAME).unlink(missing_ok=True)
        for split in dict.fromkeys((*SPLITS, *cuts)):
            write_cuts(cuts_path(out, split), cuts.get(split, ()))  # type: ignore[arg-type]
        write_atomic(out / REPORT_JSON, json.dumps({MADE_BY: made_by, **report}, indent=2, ensure_ascii=False) + "\n")
        write_atomic(out / REPORT_MD, markdown)
        write_atomic(out / COMPLETED_NAME, fingerprint + "\n")


def _counts(cuts: Mapping[str, Sequence[Cut]]) -> str:
    return ", ".join(f"{len(found)} items in {split}" for split, found in cuts.items()) or "no items"
