"""What a second transcript said of a corpus: counts, error rates, and what other thresholds would have kept."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from kalle.files import write_atomic

if TYPE_CHECKING:
    from kalle.data.retranscribe import Verdict

PICTURE_NAME = "agreement.png"
OTHER_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


def build_report(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """The numbers of report.json; ``items`` = kept + left out, always."""
    kept = [verdict for verdict in verdicts if not verdict.reason]
    compared = [verdict for verdict in verdicts if verdict.error_rate is not None]
    tokens = sum(verdict.tokens or 0 for verdict in compared)
    return {
        "items": len(verdicts),
        "kept": len(kept),
        "kept_by_split": dict(Counter(verdict.split for verdict in kept)),
        "hours": round(sum(verdict.seconds for verdict in kept) / 3600, 5),
        "hours_before": round(sum(verdict.seconds for verdict in verdicts) / 3600, 5),
        "new_texts": sum(verdict.new_text != verdict.text for verdict in kept),
        "left_out_by_reason": dict(Counter(verdict.reason for verdict in verdicts if verdict.reason).most_common()),
        "compared": len(compared),
        "error_rate_of_all_tokens": round(sum(verdict.errors or 0 for verdict in compared) / tokens, 4) if tokens else None,
        "kept_at_other_rates": {f"{rate:g}": sum((verdict.error_rate or 0.0) <= rate for verdict in compared) for rate in OTHER_THRESHOLDS},
    }


def markdown(report: dict[str, Any]) -> str:
    """report.md."""
    lines = [
        f"# Transcribed a second time: {report['source']['corpus']}",
        "",
        f"{report['kept']} of {report['items']} items kept ({report['hours']:.3f} of {report['hours_before']:.3f} hours), where at most "
        f"{report['options']['max_error_rate']:g} errors a token lie between the two transcripts.",
        f"Text: {report['options']['text']}; {report['new_texts']} items have a new one.",
        "",
        f"Recogniser: {', '.join(f'{name} {value}' for name, value in report['recogniser'].items())}.",
        f"Errors per token over all {report['compared']} compared items: {report['error_rate_of_all_tokens']}.",
        "",
        f"![error rates]({PICTURE_NAME})",
        "",
        "| left out | items |",
        "| --- | --- |",
        *[f"| {reason} | {count} |" for reason, count in report["left_out_by_reason"].items()],
        "",
        "| at most so many errors a token | items kept |",
        "| --- | --- |",
        *[f"| {rate} | {count} |" for rate, count in report["kept_at_other_rates"].items()],
        "",
    ]
    return "\n".join(lines)


def write_picture(folder: Path, verdicts: Sequence[Verdict], max_error_rate: float) -> None:
    """agreement.png: how many items have which error rate, and the share of hours that each threshold keeps. Needs matplotlib."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    compared = [verdict for verdict in verdicts if verdict.error_rate is not None]
    rates = np.minimum([verdict.error_rate or 0.0 for verdict in compared], 1.0)
    hours = np.array([verdict.seconds for verdict in compared]) / 3600
    figure = Figure(figsize=(9, 3.4), dpi=80, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.hist(rates, bins=np.linspace(0, 1, 41), color="#4c72b0")
    left.set_yscale("symlog", linthresh=1)
    left.set_title(f"agreement of {len(compared)} items", fontsize=10)
    left.set_ylabel("items")
    order = np.argsort(rates, kind="stable")
    if len(compared):
        share = np.cumsum(hours[order]) / max(hours.sum(), 1e-12)
        right.step([0, *rates[order], 1], [0, *share, 1], where="post", color="#4c72b0")
    right.set_ylim(0, 1.02)
    right.set_title("share of the hours kept by a threshold", fontsize=10)
    for axis in (left, right):
        axis.axvline(max_error_rate, color="#c0392b", linestyle="--", linewidth=1)
        axis.set_xlim(-0.01, 1.01)
        axis.set_xlabel("errors per token (1 stands for all above)")
        axis.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    write_atomic(folder / PICTURE_NAME, buffer.getvalue())
