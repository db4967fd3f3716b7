"""What the page says, as HTML with every foreign word escaped."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kalle.serving.studio import Line, Progress, Spoken

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENDINGS = {
    "end": "the model ended the speech",
    "max_frames": "cut at the length cap: allow more seconds or try another seed",
    "repetition": "the model repeated itself and was stopped: try another seed",
    "silence": "the model fell silent and was stopped",
    "interrupted": "stopped by you",
}
_FIELDS = {
    "--prompt-text": "the transcript",
    "--prompt-audio": "the recording",
    "--max-seconds": "the longest length",
    "--name": "name",
    "--seed": "seed",
    "--temperature": "temperature",
}
"""Flags that messages name, and the fields of the page that they are."""


def error_html(message: str) -> str:
    """A mistake, announced by screen readers."""
    for flag, words in _FIELDS.items():
        message = message.replace(flag, words)
    return f'<p class="kalle-error" role="alert">{_escape(message[:1].upper() + message[1:])}</p>'


def without_folders(message: str, folders: Iterable[Path]) -> str:
    """``message`` with the files in ``folders`` named without where they are, which is nobody's business who reads the page."""
    places = {str(place) for folder in folders for place in (folder, folder.resolve())} - {".", "/"}
    for folder in sorted(places, key=len, reverse=True):
        message = re.sub(rf"(?<![^\s'\"]){re.escape(folder)}[/\\](?:[^'\"/\\]+[/\\])*", "", message)
        message = message.replace(f"'{folder}'", f"'{Path(folder).name}'")
    return message


def notice_html(message: str) -> str:
    """What is going on."""
    return f'<p class="kalle-notice" role="status">{_escape(message)}</p>' if message else ""


def waiting_text(ahead: int) -> str:
    """What a job that has not begun is told; ``ahead`` others are before it. The player counts them down."""
    return "Waiting for your turn: one request at a time is spoken." if ahead else "Starting…"


def progress_text(progress: Progress) -> str:
    """Where a running job is."""
    if progress.seconds == 0:
        return "Preparing…" if progress.sentences == 1 else f"Speaking the first of {progress.sentences} sentences."
    whole = f" of {progress.sentences} sentences" if progress.sentences > 1 else ""
    return f"Speaking{whole}: {progress.seconds:.1f} s of audio so far."


def facts_html(spoken: Spoken, voice: str, doubts: Sequence[str] = ()) -> str:
    """The numbers of a result: length, RTF, how it ended, seed, confidence, every warning, and a row for every sentence.

    ``doubts`` are about the voice.
    """
    frames = sum(line.speech.frames for line in spoken.lines)
    work = spoken.elapsed_seconds
    facts = {
        "Length": f"{spoken.seconds:.2f} s ({frames} frames)",
        "RTF": f"{work / spoken.seconds:.2f} ({work:.2f} s of work / {spoken.seconds:.2f} s of audio)",
        "Ended by": _ending(spoken),
        "Voice": voice,
        "Seed": str(spoken.seed),
        "Confidence": f"{_confidence(spoken):.3f}" if frames else "none",
    }
    rows = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in facts.items())
    notes = list(doubts)
    notes += [warning for line in spoken.lines for warning in line.warnings] if len(spoken.lines) == 1 else []
    notes += [f"not words, and not spoken: {gap.strip()[:80]!r}" for gap in spoken.unspoken if gap.strip()]
    warnings = "".join(f'<p class="kalle-warning">{_escape(note)}</p>' for note in notes)
    return f'<dl class="kalle-facts">{rows}</dl>{warnings}' + (_sentences(spoken) if len(spoken.lines) > 1 else "")


def weakest(spoken: Spoken) -> tuple[int, Line]:
    """The line with the lowest confidence among those that have frames, and its number from 1."""
    lines = [(number, line) for number, line in enumerate(spoken.lines, 1) if line.speech.frames] or [(1, spoken.lines[0])]
    return min(lines, key=lambda item: item[1].speech.confidence)


def _ending(spoken: Spoken) -> str:
    if spoken.stopped:
        return f"interrupted: {ENDINGS['interrupted']}"
    bad = [line for line in spoken.lines if line.speech.stop_reason != "end"]
    if len(spoken.lines) == 1 or not bad:
        reason = spoken.lines[0].speech.stop_reason
        return f"{reason}: {ENDINGS[reason]}"
    return f"{len(bad)} of {len(spoken.lines)} sentences did not end by themselves; see below"


def _confidence(spoken: Spoken) -> float:
    weights = [line.speech.frames for line in spoken.lines]
    return sum(weight * line.speech.confidence for weight, line in zip(weights, spoken.lines, strict=True) if weight) / sum(weights)


def _sentences(spoken: Spoken) -> str:
    rows = []
    for number, line in enumerate(spoken.lines, 1):
        speech = line.speech
        notes = "".join(f'<p class="kalle-warning">{_escape(note)}</p>' for note in line.warnings)
        numbers = f"{speech.seconds:.2f} s, {speech.stop_reason}" + (f", confidence {speech.confidence:.3f}" if speech.frames else "")
        rows.append(f"<li value='{number}'>{_escape(line.text)} <small>({_escape(numbers)})</small>{notes}</li>")
    return f'<ol class="kalle-sentences">{"".join(rows)}</ol>'


def figure_html(figure: Figure, description: str) -> str:
    """``figure`` as an image inside the page, for nothing is fetched for it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="kalle-figure" alt="{_escape(description)}" src="data:image/png;base64,{encoded}">'


def _escape(text: str) -> str:
    return html.escape(text, quote=True)
