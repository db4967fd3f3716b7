"""Several texts of the page in one go: a recording of each, and an archive of all."""

from __future__ import annotations

import csv
import io
import shutil
import time
import zipfile
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kalle.audio import write_audio
from kalle.errors import UserError
from kalle.files import lines_of
from kalle.serving.engine import Job, QueueFullError, ServingError
from kalle.serving.sessions import Backend, PageJob, PageRequest, check_request
from kalle.serving.voices import VoiceChoice
from kalle.synthesis.options import GenerationOptions, SpeechRequest

MOST_TEXTS = 100
AT_ONCE = 4
"""Texts of one page that are in the engine at a time; the other rows are for others."""
_RETRY_SECONDS = 0.5
LIST_NAME = "list.csv"


@dataclass(frozen=True)
class SpokenText:
    """The end of one text."""

    number: int
    """From 1."""
    text: str
    seed: int | None = None
    seconds: float = 0.0
    ending: str = ""
    """A ``SpeechEnding``; empty where nothing was spoken."""
    path: Path | None = None
    """The WAV file."""
    error: str = ""
    """Why there is no speech."""


class SeveralJob(PageJob):
    """Several texts in one voice. Made by one thread, read and stopped by others."""

    def __init__(self, texts: tuple[str, ...], voice: VoiceChoice, options: GenerationOptions) -> None:
        super().__init__(PageRequest(texts[0], voice, options))
        self.texts = texts
        self.spoken_texts: list[SpokenText] = []
        """In their order, as far as they are done."""
        self.folder: Path | None = None
        """Of the files, removed with the job."""
        self.at_work: list[Job] = []
        """Jobs of the engine."""

    def stop(self) -> None:
        """Ask the job to end; what is being spoken is dropped, what was spoken stays."""
        super().stop()
        for spoken in list(self.at_work):
            spoken.cancel()

    def remove(self) -> None:
        """Delete the files."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def begin_several(backend: Backend, session: str, lines: str, voice: VoiceChoice, options: GenerationOptions) -> SeveralJob:
    """A job that speaks every line of ``lines`` that is not empty; a UserError when one cannot be spoken, or there are too many."""
    texts = tuple(line.strip() for line in lines_of(lines) if line.strip())
    if not texts:
        raise UserError("no texts: got only empty lines, expected one text a line; type them")
    if len(texts) > MOST_TEXTS:
        raise UserError(f"too many texts: got {len(texts)} lines, expected at most {MOST_TEXTS}; split them")
    for number, text in enumerate(texts, 1):
        try:
            check_request(PageRequest(text, voice, options), backend.max_text, not backend.kalle.has_speaker_encoder)
        except UserError as error:
            raise UserError(f"text {number}: {error}") from None
    return backend.sessions.begin(session, SeveralJob(texts, voice, options))


def speak_several(backend: Backend, job: SeveralJob) -> Iterator[SpokenText]:
    """Have the engine speak the texts of ``job``, some at a time; each is told when its turn has come, and none stops the others.

    At the end ``job.path`` is a ZIP archive of the recordings and a list of them. UserError for a voice that cannot be had.
    """
    job.begun = True
    left, working = deque(enumerate(job.texts, 1)), deque[tuple[int, str, Job | str]]()
    try:
        voice = backend.voices.voice(job.request.voice)
        job.folder = backend.temporary / f"several-{job.token[:8]}"
        job.folder.mkdir()
        while (left or working) and not job.stopped:
            while left and len(working) < AT_ONCE:
                number, text = left[0]
                spoken: Job | str
                try:
                    spoken = submitted = backend.engine.submit(SpeechRequest(text, voice, job.request.options))
                except QueueFullError:  # others fill it; what is at work goes on
                    if not working:
                        time.sleep(_RETRY_SECONDS)
                    break
                except UserError as error:
                    spoken = str(error)
                else:
                    job.at_work.append(submitted)
                    if job.stopped:  # in between, when it was not in the list yet
                        submitted.cancel()
                left.popleft()
                working.append((number, text, spoken))
            if not working:
                continue
            result = _result(job, *working.popleft())
            job.at_work = [each for each in job.at_work if not each.finished]  # a result is large, and is in its file
            if result is not None:
                job.spoken_texts.append(result)
                yield result
        if not job.abandoned:
            job.path = _archive(job)
    finally:
        for working_job in job.at_work:
            working_job.cancel()
        job.at_work = []
        job.finish()
        if job.abandoned:
            job.remove()


def _result(job: SeveralJob, number: int, text: str, spoken: Job | str) -> SpokenText | None:
    """The end of one text; None where the job was stopped before it."""
    if isinstance(spoken, str):
        return SpokenText(number, text, error=spoken)
    try:
        speech = spoken.result()
    except (UserError, ServingError) as error:
        return None if job.stopped else SpokenText(number, text, spoken.seed, error=str(error))
    if job.stopped or job.folder is None:
        return None
    if not speech.frames:
        return SpokenText(number, text, spoken.seed, error="the model ended the speech before its first frame; try another seed")
    path = job.folder / f"{number:03d}.wav"
    write_audio(path, speech.audio, speech.sample_rate)
    return SpokenText(number, text, spoken.seed, speech.seconds, speech.stop_reason, path)


def _archive(job: SeveralJob) -> Path | None:
    """A ZIP archive of what was spoken and a CSV list of it; None where nothing was."""
    made = [each for each in job.spoken_texts if each.path is not None]
    if not made or job.folder is None:
        return None
    path = job.folder / f"kalle-{job.token[:8]}.zip"
    listing = io.StringIO()
    writer = csv.writer(listing)
    writer.writerow(("file", "text", "seed", "seconds", "ended by"))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for each in made:
            assert each.path is not None
            archive.write(each.path, each.path.name)
            writer.writerow((each.path.name, each.text, each.seed, f"{each.seconds:.2f}", each.ending))
        archive.writestr(LIST_NAME, listing.getvalue())
    return path
