"""The heat map of recipes/emotion from OUT/items.jsonl: intended emotion on x, heard on y, each column sums to 1; and its numbers.

python recipes/emotion/heat_map.py runs/emotion
"""

from __future__ import annotations

import sys
from pathlib import Path

from kalle.checkpoint import write_json
from kalle.cli.stages import recipe_main
from kalle.evaluation.figures import new_figure, save_figure
from kalle.evaluation.opinion import emotion_matrix
from kalle.files import read_jsonl

SHOWN = ("angry", "fearful", "sad", "surprised", "happy", "neutral")
"""The paper's order."""


def draw(out: Path) -> None:
    """Write OUT/heat_map.png and OUT/heat_map.json."""
    rows = read_jsonl(out / "items.jsonl")
    means, counts = emotion_matrix([row for row in rows if row["system"] != "recording"], SHOWN)
    write_json(out / "heat_map.json", {"emotions": SHOWN, "mean_score": means.tolist(), "highest_score_counts": counts.tolist()})
    figure = new_figure(900, 750)
    axes = figure.add_subplot()
    image = axes.imshow(means, vmin=0, vmax=1, cmap="Blues")
    for heard in range(len(SHOWN)):
        for intended in range(len(SHOWN)):
            value = means[heard, intended]
            axes.text(intended, heard, f"{value:.2f}", ha="center", va="center", color="white" if value > 0.5 else "black")
    axes.set_xticks(range(len(SHOWN)), SHOWN)
    axes.set_yticks(range(len(SHOWN)), SHOWN)
    axes.set_xlabel("True emotion")
    axes.set_ylabel("Predicted emotion")
    figure.colorbar(image, label="Average probability")
    save_figure(figure, out / "heat_map.png")
    print(f"wrote {out / 'heat_map.png'}")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.exit(recipe_main(lambda: draw(folder), folder))
