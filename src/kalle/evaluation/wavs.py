"""Re-scores a folder of anybody's wavs against a list, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kalle.audio import Audio, read_audio
from kalle.data.testlist import TestItem
from kalle.errors import UserError
from kalle.evaluation.journal import Journal, score_items
from kalle.evaluation.metric import RATE_HZ, Metric
from kalle.evaluation.references import figure_rows, other_recordings, read_references
from kalle.evaluation.result import Result, Settings, finish
from kalle.evaluation.scoring import Scores, counted

SYSTEM = "wavs"
SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


def evaluate_wavs(
    folder: str | Path,
    items: Sequence[TestItem],
    metrics: Sequence[Metric],
    out_dir: str | Path,
    *,
    aligned: bool = False,
    settings: Settings | None = None,
    journal: Journal | None = None,
) -> Result:
    """Score ``folder``/ID.wav (or .flac, .ogg, .opus, .mp3) for every item; "/" in an id is "_" in the file's name.

    ``aligned`` says that the wavs run in step with the recordings, as a codec's do: STOI, PESQ and log-mel L1 are then measured. Systems:
    "recording" (the ceiling) and "wavs". A wav that is missing is an error row and never silently dropped; UserError when the folder is
    missing or no item could be scored. Writes what ``finish`` writes. ``journal`` as in ``score_items``.
    """
    root, settings, scores = Path(folder), settings or Settings(), Scores(metrics)
    if not root.is_dir():
        raise UserError(f"folder of wavs not found: got '{folder}', expected a folder with ID.wav for the list's ids; check the path")
    others = other_recordings(items)

    def score(index: int, item: TestItem) -> None:
        references = read_references(scores, item, others[index], settings.score_recordings)
        with counted(scores, SYSTEM, item):
            audio, path = _read(root, item)
            scores.add(SYSTEM, references.score_item(item, audio, aligned), {"wav": str(path)})

    score_items(items, scores, journal, score, SYSTEM, settings.progress)
    if items and not any(row["system"] == SYSTEM and "error" not in row for row in scores.rows):
        wanted = f"{items[0].file_stem}.wav"
        raise UserError(f"no wav to score: got none of {len(items)} in '{folder}', expected files such as {wanted}; check the folder")
    # Paths of the wavs are as the user gave them, relative to the working directory and not to the results.
    shown = figure_rows(items, scores.rows, Path(), settings.figure_items)
    return finish("wavs", scores, {"folder": str(folder), "aligned": aligned}, settings, out_dir, shown)


def _read(folder: Path, item: TestItem) -> tuple[Audio, Path]:
    for suffix in SUFFIXES:
        path = folder / f"{item.file_stem}{suffix}"
        if path.is_file():
            return read_audio(path, RATE_HZ), path
    raise UserError(f"wav not found: expected '{folder / item.file_stem}.wav'; synthesise it or remove the line from the list")
