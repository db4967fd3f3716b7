"""What an item is compared with: its recording, and a recording of the voice it should have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kalle.audio import Audio, read_audio
from kalle.data.testlist import TestItem
from kalle.errors import UserError
from kalle.evaluation.figure import FigureRow
from kalle.evaluation.metric import RATE_HZ, ScoreItem
from kalle.evaluation.scoring import Row, Scores

RECORDING_SYSTEM = "recording"


@dataclass(frozen=True)
class References:
    """Audio at 16 kHz, mono float32 (S,); None where the list has none or it could not be read."""

    recording: Audio | None
    speaker: Audio | None

    def score_item(self, item: TestItem, audio: Audio, aligned: bool = False) -> ScoreItem:
        """``audio`` with these references, for the metrics."""
        return ScoreItem(item.id, audio, item.text, item.language, self.recording, aligned, self.speaker)


def read_references(scores: Scores, item: TestItem, voice: TestItem | None, score_recording: bool) -> References:
    """Read the recording and the voice's recording of ``item``, and score the recording itself as the ceiling when asked.

    The voice is the item's prompt, else the recording of ``voice``. A file that is missing or unreadable becomes an error row of
    the system "recording", and its reference None.
    """
    recording = speaker = None
    try:
        speaker = item.prompt_audio(RATE_HZ) if item.prompt_path is not None else voice.audio(RATE_HZ) if voice is not None else None
        recording = item.audio(RATE_HZ) if item.audio_path is not None else None
    except UserError as error:
        scores.fail(RECORDING_SYSTEM, item, error)
        return References(None, speaker)
    references = References(recording, speaker)
    if recording is not None and score_recording:
        scores.add(RECORDING_SYSTEM, ScoreItem(item.id, recording, item.text, item.language, speaker=speaker))
    return references


def figure_rows(items: Sequence[TestItem], rows: Sequence[Row], folder: Path, limit: int) -> list[FigureRow]:
    """The first ``limit`` items that have a wav under ``folder``, each with its recording (where there is one) and the systems' audio.

    Read from disk, for another process may have made them. Of an item that was spoken several times the first is shown.
    """
    wavs: dict[str, dict[str, Path]] = {}
    for row in rows:
        if row.get("wav") is not None:
            wavs.setdefault(row["id"], {}).setdefault(row["system"], folder / row["wav"])
    shown = [item for item in items if item.id in wavs][:limit]
    return [
        FigureRow(item.text, {**_recording(item), **{system: read_audio(path, RATE_HZ) for system, path in wavs[item.id].items()}})
        for item in shown
    ]


def _recording(item: TestItem) -> dict[str, Audio]:
    try:
        return {} if item.audio_path is None else {RECORDING_SYSTEM: item.audio(RATE_HZ)}
    except UserError:  # its row says so
        return {}


def other_recordings(items: Sequence[TestItem]) -> list[TestItem | None]:
    """For every item the next one (cyclically) of the same speaker with a recording; None when there is no other.

    Unprompted synthesis and the recordings themselves are then compared with the same utterance, one that neither of them speaks.
    An item without a speaker has none.
    """
    by_speaker: dict[str, list[int]] = {}
    for index, item in enumerate(items):
        if item.speaker is not None and item.audio_path is not None:
            by_speaker.setdefault(item.speaker, []).append(index)
    found: list[TestItem | None] = []
    for index, item in enumerate(items):
        same = [other for other in by_speaker.get(item.speaker or "", []) if other != index]
        following = next((other for other in same if other > index), same[0] if same else None)
        found.append(None if following is None else items[following])
    return found
