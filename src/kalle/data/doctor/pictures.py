"""The pictures of a diagnosis as PNG files: each panel by itself, all together, and every check's share of flagged items."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kalle.data.doctor.findings import BAD, GOOD, LOOK, Finding
from kalle.data.doctor.limits import Limits
from kalle.data.doctor.measured import Item
from kalle.data.doctor.panels import PANELS
from kalle.files import write_atomic

OVERVIEW_NAME, PICTURES_FOLDER = "overview.png", "pictures"
_COLUMNS, _SIZE_IN, _DPI = 4, (4.0, 2.9), 80
_COLOURS = {GOOD: "#2e8b57", LOOK: "#e0a100", BAD: "#c0392b"}


def write_pictures(folder: Path, items: Sequence[Item], findings: Sequence[Finding], limits: Limits, title: str) -> None:
    """Write overview.png and pictures/NAME.png into ``folder``. Needs matplotlib (the train extra)."""
    flagged = {finding.check: frozenset(flag.key for flag in finding.flags) for finding in findings}
    drawers: dict[str, Callable[[Any], None]] = {"verdicts": lambda axis: _verdicts(axis, findings, len(items))}
    for name, panel in PANELS.items():
        drawers[name] = lambda axis, panel=panel: panel(axis, items, flagged, limits)  # type: ignore[misc]
    for name, draw in drawers.items():
        write_atomic(folder / PICTURES_FOLDER / f"{name}.png", _png([draw], 1, ""))
    write_atomic(folder / OVERVIEW_NAME, _png(list(drawers.values()), _COLUMNS, title))


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


def _verdicts(axis: Any, findings: Sequence[Finding], total: int) -> None:
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
