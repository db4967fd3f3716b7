"""A diagnosis of a corpus: report.json, report.md, items.jsonl and figures; and the figure of the agreement of two transcripts."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lhotse.cut import Cut

from kalle.data.corpus.cuts import REPORT_JSON, REPORT_MD, check_target, corpus_digest, write_derived
from kalle.data.corpus.measures import BANDS, MEASUREMENTS_NAME, PRESENT_DB, ItemProgress, MeasuredItem, collect_measures, script_counts
from kalle.data.corpus.prepare import histogram
from kalle.data.corpus.quality import BAD, GOOD, LOOK, CheckResult, QualityLimits, amount, examine, pace, readable_items, worst
from kalle.files import fingerprint, output_folder, write_atomic, write_jsonl

if TYPE_CHECKING:
    from kalle.data.corpus.retranscribe import TranscriptDecision

Flagged = Mapping[str, frozenset[tuple[str, str]]]
"""Check -> keys of the items it flags."""
Plot = Callable[[Any, Sequence[MeasuredItem], Flagged, QualityLimits], None]
FINE, FAULT, LIMIT = "#4c72b0", "#c0392b", "#888888"
_MOST_BARS = 12


def _histogram(axis: Any, values: Sequence[float], label: str, limits: Sequence[float] = (), log_x: bool = False, bins: int = 40) -> None:
    """Counts on a logarithmic axis, so that single outliers are seen; thresholds as dashed lines where the data reach that far."""
    values = [value for value in values if np.isfinite(value)]
    if values:
        low, high = min(values), max(values)
        shown = [limit for limit in limits if low - 0.3 * (high - low) <= limit <= high + 0.3 * (high - low)]
        low, high = min([low, *shown]), max([high, *shown])
        high = high if high > low else low + 1e-3
        edges = np.geomspace(max(low, 1e-3), high, bins + 1) if log_x else np.linspace(low, high, bins + 1)
        axis.hist(values, bins=edges, color=FINE)
        for limit in shown:
            axis.axvline(limit, color=LIMIT, linestyle="--", linewidth=1)
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=0)
    if log_x and values:
        axis.set_xscale("log")
        ticks = [tick for tick in (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000) if edges[0] <= tick <= edges[-1]]
        axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axis.minorticks_off()
    axis.set_xlabel(label)
    axis.set_ylabel("items")


def _durations(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Seconds of the items."""
    seconds = [item.sound.seconds for item in readable_items(items)]
    axis.set_title(f"duration: {sum(seconds) / 3600:.2f} h in {len(seconds)} items")
    _histogram(axis, seconds, "seconds", (limits.min_seconds, limits.max_seconds), log_x=True)


def _text_against_audio(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Spoken seconds over the amount of text, outliers in red."""
    spoken = [item for item in readable_items(items) if amount(item.text) > 0]
    at_fault = flagged["outlier"] | flagged["rate"]
    for keys, colour, size, label in ((False, FINE, 4, None), (True, FAULT, 16, f"outliers ({len(at_fault)})")):
        group = [item for item in spoken if (item.key in at_fault) is keys]
        if group:
            axis.scatter(
                [amount(i.text) for i in group], [i.sound.spoken_s for i in group], s=size, color=colour, linewidths=0, label=label
            )
    if at_fault:
        axis.legend(fontsize=7, loc="upper left")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_title("text against audio")
    axis.set_xlabel("letters (a sign counts 3)")
    axis.set_ylabel("spoken seconds")


def _rates(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Letters or signs a second."""
    units: dict[str, list[float]] = {"letters": [], "signs": []}
    for item in readable_items(items):
        if amount(item.text) > 0:
            value, unit = pace(item)
            units[unit].append(value)
    main = max(units, key=lambda unit: len(units[unit]))
    edges = (limits.min_signs_per_s, limits.max_signs_per_s) if main == "signs" else (limits.min_letters_per_s, limits.max_letters_per_s)
    _histogram(axis, units[main], f"{main} a second, silence at the ends left out", edges)
    median = f": median {np.median(units[main]):.1f}" if units[main] else ""
    axis.set_title(f"speaking rate{median}")


def _loudness(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Integrated loudness."""
    levels = [item.sound.loudness_lufs for item in readable_items(items) if item.sound.loudness_lufs is not None]
    median = float(np.median(levels)) if levels else 0.0
    offset = limits.max_loudness_offset_db
    edges = (limits.min_loudness_lufs, limits.max_loudness_lufs, median - offset, median + offset)
    _histogram(axis, levels, "LUFS", edges)
    axis.set_title(f"loudness: median {median:.1f} LUFS")


def _silences(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Leading, trailing and longest inner silence, one line each."""
    kinds = {
        "leading": ([item.sound.leading_s for item in readable_items(items)], limits.max_leading_s),
        "trailing": ([item.sound.trailing_s for item in readable_items(items)], limits.max_trailing_s),
        "longest pause": ([item.sound.pause_s for item in readable_items(items)], limits.max_pause_s),
    }
    top = max([max(values, default=0.0) for values, _ in kinds.values()] + [limits.max_pause_s])
    for (name, (values, limit)), colour in zip(kinds.items(), ("#4c72b0", "#dd8452", "#55a868"), strict=True):
        axis.hist(values, bins=np.linspace(0, top, 41), histtype="step", color=colour, label=f"{name} (limit {limit:g} s)")
        axis.axvline(limit, color=colour, linestyle="--", linewidth=0.8)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=7)
    axis.set_title(f"silence: {len(flagged['silence'])} items flagged")
    axis.set_xlabel("seconds")
    axis.set_ylabel("items")


def _clipping(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Share of samples in flat tops; items without any stand at the left edge."""
    floor = 1e-6
    shares = [float(np.log10(max(item.sound.clipped_share, floor))) for item in readable_items(items)]
    edges = np.linspace(-6, 0, 37)
    axis.hist(shares, bins=edges, color=FINE)
    axis.axvline(np.log10(limits.max_clipped_share), color=LIMIT, linestyle="--", linewidth=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.set_xticks(range(-6, 1, 2), ["none", "0.01%", "1%", "100%"])
    axis.set_title(f"clipping: {len(flagged['clipping'])} items flagged")
    axis.set_xlabel("samples in flat tops")
    axis.set_ylabel("items")


def _bandwidths(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """The highest frequency present."""
    nyquist = max([item.sample_rate_hz for item in items], default=16000) / 2000
    axis.hist([item.sound.bandwidth_hz / 1000 for item in readable_items(items)], bins=np.linspace(0, nyquist * 1.02, 42), color=FINE)
    axis.axvline(limits.min_bandwidth_share * nyquist, color=LIMIT, linestyle="--", linewidth=1)
    axis.set_yscale("symlog", linthresh=1)
    axis.set_ylim(bottom=0)
    axis.set_title(f"bandwidth present: {len(flagged['bandwidth'])} items flagged")
    axis.set_xlabel("kHz")
    axis.set_ylabel("items")


def _spectra(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Median spectrum of the loudest moments with its 5 to 95 % band, and of the narrow items in red."""
    groups = {False: FINE, True: FAULT}
    nyquist = max([item.sample_rate_hz for item in items], default=16000) / 2000
    frequencies = (np.arange(BANDS) + 0.5) * nyquist / BANDS
    for narrow, colour in groups.items():
        levels = np.array(
            [item.sound.bands_db for item in readable_items(items) if (item.key in flagged["bandwidth"]) is narrow], dtype=float
        )
        if len(levels):
            low, middle, high = np.percentile(levels, [5, 50, 95], axis=0)
            axis.fill_between(frequencies, low, high, color=colour, alpha=0.25, linewidth=0)
            axis.plot(frequencies, middle, color=colour, label=f"{'flagged' if narrow else 'items'} ({len(levels)})")
    axis.axhline(-PRESENT_DB, color=LIMIT, linestyle="--", linewidth=1)
    axis.set_ylim(-100, 3)
    axis.legend(fontsize=7, loc="lower left")
    axis.set_title("spectrum: median, 5 to 95 %")
    axis.set_xlabel("kHz")
    axis.set_ylabel("dB below the strongest")


def _speakers(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Minutes of the speakers who say most."""
    seconds: Counter[str] = Counter()
    for item in readable_items(items):
        seconds[item.speaker or "(not given)"] += item.sound.seconds  # type: ignore[assignment]
    _bars(axis, {name: value / 60 for name, value in seconds.most_common(_MOST_BARS)})
    axis.set_title(f"speakers: {len(seconds)}" + (f", the first {_MOST_BARS}" if len(seconds) > _MOST_BARS else ""))
    axis.set_xlabel("minutes")


def _scripts(axis: Any, items: Sequence[MeasuredItem], flagged: Flagged, limits: QualityLimits) -> None:
    """Letters of each script."""
    total: Counter[str] = Counter()
    for item in items:
        total.update(script_counts(item.text))
    letters = max(total.total(), 1)
    _bars(axis, {name.title(): 100 * count / letters for name, count in total.most_common(_MOST_BARS)})
    axis.set_title(f"script: {len(flagged['script'])} items flagged")
    axis.set_xlabel("% of the letters")


def _bars(axis: Any, values: Mapping[str, float]) -> None:
    names = [name if len(name) <= 18 else name[:17] + "…" for name in values]
    axis.barh(range(len(names)), list(values.values()), color=FINE, height=0.6)
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(max(len(names), 4) - 0.4, -0.6)


FIGURES: Mapping[str, Plot] = {
    "duration": _durations,
    "rate": _rates,
    "outlier": _text_against_audio,
    "loudness": _loudness,
    "silence": _silences,
    "clipping": _clipping,
    "bandwidth": _bandwidths,
    "spectrum": _spectra,
    "speakers": _speakers,
    "script": _scripts,
}
"""File name without .png -> what is drawn."""
OVERVIEW_NAME, FIGURES_FOLDER = "overview.png", "pictures"
_FIGURE_COLUMNS, _SIZE_IN, _DPI = 4, (4.0, 2.9), 80
_COLOURS = {GOOD: "#2e8b57", LOOK: "#e0a100", BAD: "#c0392b"}


def write_figures(folder: Path, items: Sequence[MeasuredItem], findings: Sequence[CheckResult], limits: QualityLimits, title: str) -> None:
    """Write overview.png and pictures/NAME.png into ``folder``. Needs matplotlib (the train extra)."""
    flagged = {finding.check: frozenset(flag.key for flag in finding.flags) for finding in findings}
    drawers: dict[str, Callable[[Any], None]] = {"verdicts": lambda axis: _verdicts(axis, findings, len(items))}
    for name, panel in FIGURES.items():
        drawers[name] = lambda axis, panel=panel: panel(axis, items, flagged, limits)  # type: ignore[misc]
    for name, draw in drawers.items():
        write_atomic(folder / FIGURES_FOLDER / f"{name}.png", _png([draw], 1, ""))
    write_atomic(folder / OVERVIEW_NAME, _png(list(drawers.values()), _FIGURE_COLUMNS, title))


def _png(drawers: Sequence[Callable[[Any], None]], columns: int, title: str) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = -(-len(drawers) // columns)
    scale = 1.5 if len(drawers) == 1 else 1.0
    size = (columns * _SIZE_IN[0] * scale, rows * _SIZE_IN[1] * scale + (0.35 if title else 0))
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, draw in zip(axes, drawers, strict=False):
        axis.tick_params(labelsize=7)
        draw(axis)
        axis.title.set_fontsize(9)
        axis.xaxis.label.set_fontsize(8)
        axis.yaxis.label.set_fontsize(8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(drawers) :]:
        axis.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    buffer = io.BytesIO()
    canvas.print_png(buffer)
    return buffer.getvalue()


def _verdicts(axis: Any, findings: Sequence[CheckResult], total: int) -> None:
    """Flagged items of every check, coloured by its verdict."""
    counts = [len({flag.key for flag in finding.flags}) for finding in findings]
    shares = [100 * count / max(total, 1) for count in counts]
    axis.barh(range(len(findings)), shares, color=[_COLOURS[finding.verdict] for finding in findings], height=0.7)
    axis.set_yticks(range(len(findings)), [finding.check for finding in findings])
    for label, finding in zip(axis.get_yticklabels(), findings, strict=True):
        label.set_color(_COLOURS[finding.verdict])
    for row, (share, count, finding) in enumerate(zip(shares, counts, findings, strict=True)):
        axis.text(share, row, f" {finding.verdict}" + (f", {count}" if count else ""), va="center", fontsize=6)
    axis.set_xlim(0, max([1.0, *shares]) * 1.35)
    axis.invert_yaxis()
    axis.set_title("verdicts: % of the items flagged")


AGREEMENT_NAME = "agreement.png"


def write_agreement_figure(folder: Path, verdicts: Sequence[TranscriptDecision], max_error_rate: float) -> None:
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
    write_atomic(folder / AGREEMENT_NAME, buffer.getvalue())


ITEMS_NAME = "items.jsonl"
EXAMPLES = 5
"""Flagged items a check shows in report.md; items.jsonl has all."""


def diagnosis_report(corpus: str, items: Sequence[MeasuredItem], findings: Sequence[CheckResult], limits: QualityLimits) -> dict[str, Any]:
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


def diagnose(corpus: Path, out: Path, limits: QualityLimits, jobs: int, progress: ItemProgress, pictures: bool = True) -> Diagnosis:
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


def write_filtered(diagnosis: Diagnosis, corpus: Path, out: Path, remove: Sequence[str], limits: QualityLimits) -> dict[str, Any]:
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
