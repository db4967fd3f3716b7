"""Training curves, drawn from the metrics.csv of each training."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from kalle.evaluation.figures import new_figure, save_figure

PREFIXES = ("train/", "val/")
WIDTH, ROW_HEIGHT = 1200, 260
COLUMNS = 3
Series = list[tuple[int, float]]


def read_metrics(run: Path) -> dict[str, Series]:
    """(step, value) of every training and validation column in the newest metrics.csv of ``run``; empty where there is none."""
    tables = sorted(run.glob("csv/version_*/metrics.csv"), key=lambda path: int(path.parent.name.removeprefix("version_")))
    found: dict[str, Series] = {}
    if tables:
        with tables[-1].open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if name and name.startswith(PREFIXES) and value and row.get("step"):
                        found.setdefault(name, []).append((int(float(row["step"])), float(value)))
    return found


def draw_curves(runs: Sequence[Path], out: Path) -> list[Path]:
    """One picture ``out``/NAME.png for every run that has metrics; returns their paths."""
    written = []
    for run in runs:
        metrics = read_metrics(run)
        if metrics:
            written.append(out / f"{run.name}.png")
            _draw(metrics, written[-1])
    return written


def _draw(metrics: Mapping[str, Series], path: Path) -> None:
    rows = -(-len(metrics) // COLUMNS)
    figure = new_figure(WIDTH, ROW_HEIGHT * rows)
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for axis, (name, series) in zip(axes, metrics.items(), strict=False):
        axis.plot(*zip(*series, strict=True), linewidth=0.8)
        axis.set_title(name, fontsize=8)
        axis.tick_params(labelsize=6)
    for axis in list(axes)[len(metrics) :]:
        axis.set_axis_off()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path)
