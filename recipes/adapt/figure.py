"""The curve as a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kalle.files import write_atomic

STYLES = {"lora": ("tab:blue", "LoRA"), "full": ("tab:red", "all weights")}
PANELS = (
    ("KL, nats per dimension", (("kl", "-", "the recording"), ("kl_other", "--", "another recording"))),
    ("speaker similarity (GE2E)", (("sim", "-", "to the recording"), ("sim_other", "--", "to another recording"))),
    ("character error rate", (("cer", "-", "spoken texts"),)),
)


def draw(kept: Mapping[str, Any], path: Path) -> None:
    """Write ``path``, a PNG with a panel for each quantity that was measured, against the number of steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    points = {tuple(name.split()): point for name, point in kept["points"].items() if name != "ceiling"}
    panels = [panel for panel in PANELS if any(point.get(key) is not None for point in points.values() for key, _, _ in panel[1])]
    figure = Figure(figsize=(5 * len(panels), 3.6), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for key, style, what in lines:
            for mode, (colour, name) in STYLES.items():
                found = sorted(
                    (int(steps), point[key]) for (each, steps), point in points.items() if each == mode and point.get(key) is not None
                )
                if found:
                    axes.plot(*zip(*found, strict=True), style, color=colour, marker="o", markersize=3, label=f"{name}, {what}")
        ceiling = kept["points"].get("ceiling", {})
        if lines[0][0] == "sim" and ceiling.get("sim_reconstruction"):
            axes.axhline(ceiling["sim_reconstruction"], color="grey", linestyle=":", label="the recording through the Flow-VAE")
        axes.set(xlabel="steps", title=title)
        axes.set_xscale("symlog", linthresh=25)
        ticks = sorted({int(steps) for _, steps in points})
        axes.set_xticks(ticks, [str(tick) for tick in ticks])
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_atomic(path, picture.getvalue())
