"""The reactions of the page: plain values in, plain values and escaped HTML out; page.py connects them to its components."""

from __future__ import annotations

import base64
import html
import io
import logging
import math
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from kalle.errors import UserError
from kalle.serving.engine import ServingError
from kalle.serving.sessions import Backend, JobProgress, JobResult, PageRequest
from kalle.serving.several import SeveralJob, begin_several, speak_several
from kalle.serving.voices import RANDOM, RECORDING, STORED, VoiceChoice
from kalle.synthesis.options import GenerationOptions
from kalle.synthesis.speech import Speech

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Number = TypeVar("Number", int, float)
ENDINGS = {
    "end": "the model ended the speech",
    "max_frames": "cut at the length cap: allow more seconds or try another seed",
    "too_short": "the model left out words: try another seed, or check the transcript of the recording",
    "repetition": "the model repeated itself and was stopped: try another seed",
    "silence": "the model fell silent and was stopped",
    "interrupted": "stopped by you",
}
_FIELDS = {
    "bad max_seconds": "bad longest length",
    "max_seconds": "the longest length",
    "(text)": "(the transcript)",
    "--prompt-text": "the transcript",
    "--prompt-audio": "the recording",
    "--max-seconds": "the longest length",
    "--name": "name",
    "--seed": "seed",
    "--temperature": "temperature",
}
"""Parameters and flags that messages name, and the fields of the page that they are."""


def error_html(message: str) -> str:
    """A mistake, announced by screen readers."""
    for flag, words in _FIELDS.items():
        message = message.replace(flag, words)
    return f'<p class="kalle-error" role="alert">{_escape(message[:1].upper() + message[1:])}</p>'


def without_folders(message: str, folders: Iterable[Path]) -> str:
    """``message`` with the files in ``folders`` named without where they are, which readers of the page need not know."""
    places = {str(place) for folder in folders for place in (folder, folder.resolve())} - {".", "/"}
    for folder in sorted(places, key=len, reverse=True):
        message = re.sub(rf"(?<![^\s'\"]){re.escape(folder)}[/\\](?:[^'\"/\\]+[/\\])*", "", message)
        message = message.replace(f"'{folder}'", f"'{Path(folder).name}'")
    return message


def notice_html(message: str) -> str:
    """A message on the state of a job."""
    return f'<p class="kalle-notice" role="status">{_escape(message)}</p>' if message else ""


def progress_text(progress: JobProgress) -> str:
    """The message for a running job."""
    return f"Speaking: {progress.seconds:.1f} s of audio so far." if progress.seconds else "Preparing…"


def facts_html(result: JobResult, voice: str, warnings: Sequence[str] = ()) -> str:
    """The numbers of a result: length, RTF, how it ended, seed, confidence, every warning, and a row for every sentence.

    ``warnings`` are about the voice.
    """
    speech, work = result.speech, result.elapsed_seconds
    shown_text = _escape(speech.text)
    facts = {
        "Length": f"{speech.seconds:.2f} s ({speech.frames} frames)",
        "RTF": f"{work / speech.seconds:.2f} ({work:.2f} s of work / {speech.seconds:.2f} s of audio)",
        "Ended by": _ending(result),
        "Voice": voice,
        "Seed": str(speech.seed),
        "Confidence": f"{speech.confidence:.3f}" if speech.frames else "none",
    }
    rows = "".join(f"<div><dt>{_escape(name)}</dt><dd>{_escape(value)}</dd></div>" for name, value in facts.items())
    of_sentences = {warning for part in speech.parts for warning in part.warnings}
    notes = [*warnings, *(note for note in speech.warnings if not any(note.endswith(warning) for warning in of_sentences))]
    shown = "".join(f'<p class="kalle-warning">{_escape(note)}</p>' for note in notes)
    return f'<dl class="kalle-facts" data-text="{shown_text}">{rows}</dl>{shown}' + (_sentences(speech) if speech.parts else "")


def weakest(speech: Speech) -> tuple[int, Speech]:
    """The sentence with the lowest confidence among those that have frames, and its number from 1; all of it where it is one."""
    sentences = [(part.index + 1, part.speech) for part in speech.parts if part.speech.frames] or [(1, speech)]
    return min(sentences, key=lambda sentence: sentence[1].confidence)


def _ending(result: JobResult) -> str:
    speech = result.speech
    if result.stopped:
        return f"interrupted: {ENDINGS['interrupted']}"
    bad = [part for part in speech.parts if part.speech.stop_reason != "end"]
    if len(speech.parts) > 1 and bad:
        return f"{len(bad)} of {len(speech.parts)} sentences did not end by themselves; see below"
    return f"{speech.stop_reason}: {ENDINGS[speech.stop_reason]}"


def _sentences(speech: Speech) -> str:
    rows = []
    for part in speech.parts:
        said = part.speech
        notes = "".join(f'<p class="kalle-warning">{_escape(note)}</p>' for note in part.warnings)
        numbers = f"{said.seconds:.2f} s, {said.stop_reason}" + (f", confidence {said.confidence:.3f}" if said.frames else "")
        rows.append(f"<li value='{part.index + 1}'>{_escape(said.text)} <small>({_escape(numbers)})</small>{notes}</li>")
    return f'<ol class="kalle-sentences">{"".join(rows)}</ol>'


def several_html(job: SeveralJob, shown: Callable[[str], str]) -> str:
    """A table of the texts of ``job`` with a player each; ``shown`` makes an error fit to be seen."""
    rows = []
    for each in job.spoken_texts:
        if each.path is None:
            heard = f'<p class="kalle-warning">{_escape(shown(each.error))}</p>'
        else:
            numbers = f"{each.seconds:.2f} s, {each.ending}, seed {each.seed}"
            address = f"kalle/text/{job.token}/{each.number}"
            heard = (
                f'<audio controls preload="none" src="{address}" aria-label="Text {each.number}"></audio><small>{_escape(numbers)}</small>'
            )
        rows.append(f"<li value='{each.number}'>{_escape(each.text)}{heard}</li>")
    return f'<ol class="kalle-several">{"".join(rows)}</ol>' if rows else ""


def figure_html(figure: Figure, description: str) -> str:
    """``figure`` as an image inside the page, for nothing is fetched for it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img class="kalle-figure" alt="{_escape(description)}" src="data:image/png;base64,{encoded}">'


def _escape(text: str) -> str:
    return html.escape(text, quote=True)


LOGGER = logging.getLogger(__name__)
SECONDS_BETWEEN_NOTICES = 0.4
MODELS_OWN = "The model's own voice"
FIGURE_ALT = "Over time: the waveform, its mel spectrogram, the spread of the predictions and their divergence from the end distribution"
FIGURE_PIXELS = (720, 780)
STOPPED = "Stopped before it began."
UNEXPECTED = "Something went wrong that should not; the terminal that runs the page says what. Please try again."


@dataclass(frozen=True)
class View:
    """The state of a job as the page shows it."""

    message: str = ""
    """HTML"""
    busy: bool = False
    """Whether there is something to stop."""
    token: str = ""
    """Address of the audio while it is being made; empty when there is none."""
    audio: Path | None = None
    facts: str = ""
    """HTML"""
    figure: str = ""
    """HTML"""


@dataclass(frozen=True)
class SeveralView:
    """The state of several texts as the page shows it."""

    message: str = ""
    """HTML"""
    busy: bool = False
    table: str = ""
    """HTML; the recordings of what was spoken."""
    archive: Path | None = None
    replaced: bool = False
    """Whether the page has another job now, whose buttons stay as they are."""


@dataclass(frozen=True)
class KeepOutcome:
    """The answer to "Keep this voice"; ``name`` is None when it was refused."""

    message: str
    name: str | None


class Handlers:
    """The page's reactions, for every session of one backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend

    def voices(self) -> list[str]:
        """The names in the voice picker; the first is the model's own voice."""
        return [MODELS_OWN, *self.backend.voices.names()]

    def begin(self, session: str, request: PageRequest) -> View:
        """ "Speak" was pressed: a job to wait for, or what is wrong with it."""
        try:
            job = self.backend.begin(session, request)
        except UserError as error:
            return View(self._mistake(error))
        return View(notice_html("Starting…"), busy=True, token=job.token)

    def begin_several(self, session: str, lines: object, voice: VoiceChoice, options: GenerationOptions) -> SeveralView:
        """ "Speak all" was pressed: a job to wait for, or what is wrong with it."""
        try:
            begin_several(self.backend, session, _string(lines, "texts"), voice, options)
        except UserError as error:
            return SeveralView(self._mistake(error))
        return SeveralView(notice_html("Starting…"), busy=True)

    def run_several(self, session: str) -> Iterator[SeveralView]:
        """Do the session's job of several texts; one view for each that is done, nothing when there is nothing to do."""
        job = self.backend.sessions.of(session)
        if not isinstance(job, SeveralJob) or job.begun:
            return
        if job.finished:
            yield SeveralView(notice_html(STOPPED))
            return
        message = ""
        try:
            for _ in speak_several(self.backend, job):
                yield SeveralView(notice_html(f"{len(job.spoken_texts)} of {len(job.texts)} spoken."), busy=True)
        except UserError as error:
            message = self._mistake(error)
        except ServingError as error:
            message = error_html(str(error))
        except Exception:
            LOGGER.exception("a request on the page failed")
            message = error_html(UNEXPECTED)
        if not message and job.stopped:
            message = notice_html(f"Stopped: {len(job.spoken_texts)} of {len(job.texts)} spoken.")
        if self.backend.sessions.of(session) is not job:  # its files are gone with it
            yield SeveralView(notice_html("Stopped for another text."), replaced=True)
            return
        table = several_html(job, lambda error: without_folders(error, self.backend.folders))
        yield SeveralView(message, False, table, job.path)

    def run(self, session: str) -> Iterator[View]:
        """Do the session's job, when its turn has come; one view for every change, nothing when there is nothing to do."""
        job = self.backend.sessions.of(session)
        if job is None or isinstance(job, SeveralJob) or job.begun or job.finished:
            return
        shown = -SECONDS_BETWEEN_NOTICES
        view = View(notice_html(STOPPED), token=job.token)
        try:
            for step in self.backend.speak(job):
                if isinstance(step, JobResult):
                    view = self._result(step, job.request.voice, job.token)
                elif step.elapsed_seconds - shown >= SECONDS_BETWEEN_NOTICES or not step.seconds:
                    shown = step.elapsed_seconds
                    yield self._working(step, job.token)
        except UserError as error:
            view = View(self._mistake(error), token=job.token)
        except ServingError as error:
            view = View(error_html(str(error)), token=job.token)
        except Exception:
            LOGGER.exception("a request on the page failed")
            view = View(error_html(UNEXPECTED), token=job.token)
        yield view

    def stop(self, session: str) -> View | None:
        """ "Stop" was pressed: what to show, None when there was nothing to stop. A running job shows its own end."""
        job = self.backend.sessions.of(session)
        if job is None or not self.backend.sessions.stop(session):
            return None
        token = "" if isinstance(job, SeveralJob) else job.token
        return View(notice_html(STOPPED), token=token) if job.finished else View(notice_html("Stopping…"), busy=True, token=token)

    def leave(self, session: str) -> None:
        """The page was closed."""
        self.backend.sessions.forget(session)

    def sample(self, choice: VoiceChoice) -> tuple[Path | None, str]:
        """ "Listen" was pressed: a WAV file of the voice, or None and what is wrong."""
        try:
            return self.backend.voices.sample(choice), ""
        except UserError as error:
            return None, self._mistake(error)

    def uploaded(self, recording: object) -> str:
        """A recording was uploaded or recorded: whether it can be used, at once and not when it is to speak."""
        try:
            path = _string(recording, "recording")
            return notice_html(f"The recording can be read: {self.backend.voices.check_recording(path)}.") if path else ""
        except UserError as error:
            return self._mistake(error)

    def keep(self, choice: VoiceChoice, name: object, consent: object = None) -> KeepOutcome:
        """ "Keep this voice" was pressed."""
        try:
            kept = self.backend.voices.keep(choice, _string(name, "name"), _string(consent, "consent"))
        except UserError as error:
            return KeepOutcome(self._mistake(error), None)
        LOGGER.info("kept the voice %s in %s", kept, self.backend.voices.folder)
        return KeepOutcome(notice_html(f"Kept as “{kept}”: it is among the stored voices now."), kept)

    def _mistake(self, error: UserError) -> str:
        return error_html(without_folders(str(error), self.backend.folders))

    def _working(self, progress: JobProgress, token: str) -> View:
        return View(notice_html(progress_text(progress)), busy=True, token=token)

    def _result(self, result: JobResult, choice: VoiceChoice, token: str) -> View:
        from kalle.evaluation.figures import speech_figure

        number, speech = weakest(result.speech)
        figure = figure_html(speech_figure(speech, *FIGURE_PIXELS), FIGURE_ALT)
        if len(result.speech.parts) > 1:
            figure = f"<p>Sentence {number}, the one with the lowest confidence:</p>{figure}"
        facts = facts_html(result, voice_description(choice), self.backend.voices.warnings(choice))
        return View("", False, token, result.path, facts, figure)


def typed_whole(text: object, name: str) -> int | None:
    """The whole number in a field of that name, None for an empty one."""
    return _typed(text, name, int, "a whole number")


def typed_number(text: object, name: str) -> float | None:
    """The number in a field of that name, None for an empty one."""
    return _typed(text, name, _finite, "a number")


def _typed(text: object, name: str, kind: Callable[[str], Number], expected: str) -> Number | None:
    typed = _string(text, name).strip()
    if not typed:
        return None
    try:
        return kind(typed)
    except ValueError:
        raise UserError(f"bad {name}: got {typed[:40]!r}, expected {expected} or an empty field; type it again") from None


def _string(value: object, name: str) -> str:
    """A field that a page sends as text. Whoever sends something else has written the request by hand."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f"bad {name}: got a {type(value).__name__}, expected text; load the page again")
    return value


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError
    return number


def request_from_fields(text: object, voice: VoiceChoice, seed: object, temperature: object, max_seconds: object) -> PageRequest:
    """The fields of the page as a request; an empty number is the default. UserError for a value that cannot be used."""
    return PageRequest(_string(text, "text"), voice, options_from_fields(seed, temperature, max_seconds))


def options_from_fields(seed: object, temperature: object, max_seconds: object) -> GenerationOptions:
    """The settings of the page; an empty number is the default. UserError for a value that cannot be used."""
    if isinstance(temperature, bool) or not isinstance(temperature, int | float | None):
        raise UserError(f"bad temperature: got a {type(temperature).__name__}, expected a number; load the page again")
    return GenerationOptions(
        seed=typed_whole(seed, "seed"), temperature=temperature, max_seconds=typed_number(max_seconds, "longest length")
    )


def choice_from(source: object, name: object, recording: object, transcript: object, seed: object) -> VoiceChoice:
    """The voice fields of the page as a choice: only those of the chosen ``source`` count. UserError for a value that cannot be used."""
    if source == RECORDING:
        path = _string(recording, "recording") or None
        return VoiceChoice(RECORDING, recording=path, transcript=_string(transcript, "transcript"))
    if source == RANDOM:
        return VoiceChoice(RANDOM, seed=typed_whole(seed, "seed of the voice"))
    if source != STORED:
        raise UserError(f"bad voice: got {source!r:.40}, expected one of the list; load the page again")
    chosen = _string(name, "voice")
    return VoiceChoice(STORED, None if chosen in ("", MODELS_OWN) else chosen)


def voice_description(choice: VoiceChoice) -> str:
    """A choice of voice as people read it."""
    if choice.source == RECORDING:
        return "your recording"
    if choice.source == RANDOM:
        return f"random voice {choice.seed}"
    return choice.name or "the model's own"


def fresh_seed() -> int:
    """A seed that is short enough to write down."""
    return secrets.randbelow(10**6)
