"""What happens when something is pressed: plain values in, plain values out. page.py only wires these to the page."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from kalle.errors import UserError
from kalle.serving.asked import RANDOM, RECORDING, Asked, VoiceChoice, typed_number, typed_whole
from kalle.serving.studio import Progress, Spoken, Studio
from kalle.serving.words import error_html, facts_html, figure_html, notice_html, progress_text, waiting_text, weakest, without_folders

LOGGER = logging.getLogger(__name__)
SECONDS_BETWEEN_NOTICES = 0.4
MODELS_OWN = "The model's own voice"
FIGURE_ALT = "Over time: the waveform, its mel spectrogram, the spread of the predictions and their divergence from the end distribution"
FIGURE_PIXELS = (720, 780)
STOPPED = "Stopped before it began."
UNEXPECTED = "Something went wrong that should not; the terminal that runs the page says what. Please try again."


@dataclass(frozen=True)
class View:
    """What the page shows of a job."""

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
class Kept:
    """What the page shows after "Keep this voice"; ``name`` is None when it was refused."""

    message: str
    name: str | None


class Handlers:
    """The page's reactions, for every session of one studio."""

    def __init__(self, studio: Studio) -> None:
        self.studio = studio

    def voices(self) -> list[str]:
        """What the picker lists; the first is the model's own voice."""
        return [MODELS_OWN, *self.studio.shelf.names()]

    def begin(self, session: str, asked: Asked) -> View:
        """ "Speak" was pressed: a job to wait for, or what is wrong with it."""
        try:
            job = self.studio.begin(session, asked)
        except UserError as error:
            return View(self._mistake(error))
        return View(notice_html(waiting_text(self.studio.jobs.ahead(job))), busy=True, token=job.token)

    def run(self, session: str) -> Iterator[View]:
        """Do the session's job, when its turn has come; one view for every change, nothing when there is nothing to do."""
        job = self.studio.jobs.of(session)
        if job is None or job.begun or job.finished:
            return
        shown = -SECONDS_BETWEEN_NOTICES
        view = View(notice_html(STOPPED), token=job.token)
        try:
            for step in self.studio.speak(job):
                if isinstance(step, Spoken):
                    view = self._result(step, job.asked.voice, job.token)
                elif step.elapsed_seconds - shown >= SECONDS_BETWEEN_NOTICES or not step.seconds:
                    shown = step.elapsed_seconds
                    yield self._working(step, job.token)
        except UserError as error:
            view = View(self._mistake(error), token=job.token)
        except Exception:
            LOGGER.exception("a request on the page failed")
            view = View(error_html(UNEXPECTED), token=job.token)
        yield view

    def stop(self, session: str) -> View | None:
        """ "Stop" was pressed: what to show, None when there was nothing to stop. A running job shows its own end."""
        job = self.studio.jobs.of(session)
        if job is None or not self.studio.jobs.stop(session):
            return None
        return View(notice_html(STOPPED), token=job.token) if job.finished else View(notice_html("Stopping…"), busy=True, token=job.token)

    def leave(self, session: str) -> None:
        """The page was closed."""
        self.studio.jobs.forget(session)

    def sample(self, choice: VoiceChoice) -> tuple[Path | None, str]:
        """ "Listen" was pressed: a WAV file of the voice, or None and what is wrong."""
        try:
            return self.studio.shelf.sample(choice), ""
        except UserError as error:
            return None, self._mistake(error)

    def keep(self, choice: VoiceChoice, name: str, consent: str | None = None) -> Kept:
        """ "Keep this voice" was pressed."""
        try:
            kept = self.studio.shelf.keep(choice, name, consent)
        except UserError as error:
            return Kept(self._mistake(error), None)
        LOGGER.info("kept the voice %s in %s", kept, self.studio.shelf.folder)
        return Kept(notice_html(f"Kept as “{kept}”: it is among the stored voices now."), kept)

    def _mistake(self, error: UserError) -> str:
        return error_html(without_folders(str(error), self.studio.folders))

    def _working(self, progress: Progress, token: str) -> View:
        return View(notice_html(progress_text(progress)), busy=True, token=token)

    def _result(self, spoken: Spoken, choice: VoiceChoice, token: str) -> View:
        from kalle.evaluation.figures import speech_figure

        number, line = weakest(spoken)
        figure = figure_html(speech_figure(line.speech, *FIGURE_PIXELS), FIGURE_ALT)
        if len(spoken.lines) > 1:
            figure = f"<p>Sentence {number}, the one with the lowest confidence:</p>{figure}"
        return View("", False, token, spoken.path, facts_html(spoken, voice_words(choice), self.studio.shelf.doubts(choice)), figure)


def asked_from(text: str | None, voice: VoiceChoice, seed: str | None, temperature: float | None, max_seconds: str | None) -> Asked:
    """The fields of the page as a request; an empty number is the default. UserError for what is no number."""
    longest = typed_number(max_seconds, "longest length")
    return Asked(text or "", voice, typed_whole(seed, "seed"), None if temperature is None else float(temperature), longest)


def choice_from(source: str, name: str | None, recording: str | None, transcript: str | None, seed: str | None) -> VoiceChoice:
    """The voice fields of the page as a choice: only those of the chosen ``source`` count. UserError for a seed that is no number."""
    choice = VoiceChoice(source)
    if source == RECORDING:
        return replace(choice, recording=recording, transcript=transcript)
    if source == RANDOM:
        return replace(choice, seed=typed_whole(seed, "seed of the voice"))
    return replace(choice, name=None if name in (None, MODELS_OWN) else name)


def voice_words(choice: VoiceChoice) -> str:
    """A choice of voice as people read it."""
    if choice.source == RECORDING:
        return "your recording"
    if choice.source == RANDOM:
        return f"random voice {choice.seed}"
    return choice.name or "the model's own"


def fresh_seed() -> int:
    """A seed that is short enough to write down."""
    return secrets.randbelow(10**6)
