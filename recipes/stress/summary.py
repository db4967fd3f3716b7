"""The table of recipes/stress from OUT/items.jsonl: a row a kind of text, the part of the id before "_".

python recipes/stress/summary.py runs/stress
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

from kalle.cli.stages import recipe_main
from kalle.files import read_jsonl, write_atomic

PLAIN = "plain"
EXPECTED = (0.5, 2.0)
"""A length outside of these multiples of what as many letters take in the plain texts is unexpected."""
Row = dict[str, Any]


def letters(text: str) -> int:
    """Characters that are spoken: letters and digits."""
    return sum(character.isalnum() for character in text)


def table(rows: list[Row]) -> str:
    """The rows of an evaluation as Markdown."""
    spoken = [row for row in rows if row["system"] != "recording"]
    per_letter = [row["audio_s"] / letters(row["text"]) for row in spoken if kind_of(row) == PLAIN and row.get("audio_s")]
    usual = statistics.median(per_letter) if per_letter else None
    head = ("texts", "items", "failed", "no end", "WER", "seconds a letter, over plain", "unexpected length")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for kind in dict.fromkeys(map(kind_of, spoken)):
        own = [row for row in spoken if kind_of(row) == kind]
        made = [row for row in own if "error" not in row]
        errors, words = (sum(row.get(name, 0) for row in made) for name in ("wer_errors", "wer_words"))
        timed = [row["audio_s"] / letters(row["text"]) / usual for row in made if usual and letters(row["text"])]
        odd = sum(not EXPECTED[0] <= ratio <= EXPECTED[1] for ratio in timed)
        cells = [kind, len(own), len(own) - len(made), _share(sum(row.get("no_end", 0) for row in made), len(made))]
        cells += [f"{errors / words:.3f}" if words else "–", f"{statistics.median(timed):.2f}" if timed else "–", _share(odd, len(timed))]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def kind_of(row: Row) -> str:
    """The kind of a row's text."""
    return str(row["id"]).split("_")[0]


def _share(count: float, of: int) -> str:
    return f"{int(count)} of {of}" if of else "–"


def summarise(out: Path) -> None:
    """Print the table and write OUT/stress.md."""
    found = table(read_jsonl(out / "items.jsonl"))
    write_atomic(out / "stress.md", found)
    print(found)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    sys.exit(recipe_main(lambda: summarise(folder), folder))
