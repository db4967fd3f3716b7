"""Requests of the page: the latest of every session, spoken by the engine, and its audio for whoever listens."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from kalle.audio import to_pcm16, write_audio
from kalle.errors import UserError
from kalle.serving.engine import Engine, Job
from kalle.serving.voices import VoiceChoice, VoiceStore, check_voice
from kalle.synthesis.kalle import Kalle
from kalle.synthesis.options import GenerationOptions, SpeechRequest
from kalle.synthesis.speech import Speech
from kalle.text.tokenizer import check_text

DEFAULT_MAX_TEXT = 5000
MOST_SESSIONS = 100
"""Requests that are kept at once; whoever opens pages by the thousand does not fill the memory."""


@dataclass(frozen=True)
class PageRequest:
    """One press of "Speak"."""

    text: str
    voice: VoiceChoice = field(default_factory=VoiceChoice)
    options: GenerationOptions = field(default_factory=GenerationOptions)


def check_request(request: PageRequest, max_text: int, needs_transcript: bool) -> None:
    """Refuse with a UserError what can be seen wrong without the model; ``max_text`` in characters."""
    check_text(request.text, "text")
    if len(request.text) > max_text:
        raise UserError(f"the text is too long: got {len(request.text)} characters, expected at most {max_text}; shorten it")
    check_voice(request.voice, needs_transcript)


class PageJob:
    """One request and its audio. Made by one thread, read and stopped by others."""

    def __init__(self, request: PageRequest) -> None:
        self.request = request
        self.token = secrets.token_urlsafe(16)
        """Names the audio in its address; whoever doesn't know it can't listen."""
        self.begun = False
        """Whether somebody speaks it."""
        self.finished = False
        self.path: Path | None = None
        """The result, removed with the job."""
        self.stopped = False
        """Whether the user stopped it."""
        self.abandoned = False
        """Whether its page is closed, so that the result will not be fetched."""
        self.spoken: Job | None = None
        """The job of the engine that speaks it."""
        self._pieces: list[bytes] = []

    def stop(self) -> None:
        """Ask the job to end at the next frame."""
        self.stopped = True
        if self.spoken is not None:
            self.spoken.cancel()

    def speak(self, spoken: Job) -> Iterator[NDArray[np.float32]]:
        """The pieces of ``spoken``, handed out to listeners, until its end or until the job is stopped."""
        self.spoken = spoken
        if self.stopped:
            spoken.cancel()
        try:
            for piece in spoken.pieces():
                self.add(piece)
                yield piece
        finally:
            spoken.cancel()

    def add(self, audio: NDArray[np.floating]) -> None:
        """Hand out another piece of audio (n,) in [-1, 1]."""
        self._pieces.append(to_pcm16(audio).astype("<i2").tobytes())

    def finish(self) -> None:
        """No more audio comes."""
        self.finished = True

    def remove(self) -> None:
        """Delete the result's file."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def pieces(self, start: int) -> tuple[list[bytes], bool]:
        """The pieces from number ``start`` on, little-endian PCM16, and whether they are the last."""
        finished = self.finished  # Read first: a piece added after this is found on the next call.
        return self._pieces[start:], finished


AnyJob = TypeVar("AnyJob", bound=PageJob)


class Sessions:
    """The latest request of every session."""

    def __init__(self) -> None:
        self._jobs: dict[str, PageJob] = {}
        self._lock = threading.Lock()

    def begin(self, session: str, job: AnyJob) -> AnyJob:
        """``job`` in the place of the session's former one, which is stopped.

        Where there are `MOST_SESSIONS` the oldest finished one goes; a UserError where all are at work or waiting.
        """
        with self._lock:
            self._drop(session)
            if len(self._jobs) >= MOST_SESSIONS:
                finished = next((name for name, job in self._jobs.items() if job.finished), None)
                if finished is None:
                    raise UserError(f"too many requests: {MOST_SESSIONS} are waiting, expected fewer; press “Speak” again in a minute")
                self._drop(finished)
            self._jobs[session] = job
            return job

    def of(self, session: str) -> PageJob | None:
        """The session's latest job."""
        return self._jobs.get(session)

    def find(self, token: str) -> PageJob | None:
        """The job whose audio ``token`` names."""
        with self._lock:
            return next((job for job in self._jobs.values() if secrets.compare_digest(job.token.encode(), token.encode())), None)

    def stop(self, session: str) -> bool:
        """Stop the session's job, at once where it hasn't begun; whether there was one to stop."""
        job = self.of(session)
        if job is None or job.finished:
            return False
        job.stop()
        if not job.begun:
            job.finish()
        return True

    def forget(self, session: str) -> None:
        """Stop and drop the session's job, for its page is closed."""
        with self._lock:
            self._drop(session)

    def _drop(self, session: str) -> None:
        job = self._jobs.pop(session, None)
        if job is not None:
            job.abandoned = True
            job.stop()
            job.finish()
            job.remove()


@dataclass(frozen=True)
class JobProgress:
    """The state of a running job: ``seconds`` of audio exist after ``elapsed_seconds`` of work."""

    seconds: float
    elapsed_seconds: float


@dataclass(frozen=True)
class JobResult:
    """The end of a job that made audio."""

    path: Path
    """A WAV file of it."""
    speech: Speech
    elapsed_seconds: float
    """From the voice being ready to the last piece; making the voice is not in it."""
    stopped: bool
    """Whether the user ended it."""


class Backend:
    """The engine, sessions and voices behind one page; a context manager that removes its temporary files."""

    def __init__(self, kalle: Kalle, voices: Path, max_text: int = DEFAULT_MAX_TEXT, engine: Engine | None = None) -> None:
        """``voices`` is where kept voices go; ``max_text`` in characters. Without an ``engine`` it has one of its own."""
        if max_text < 1:
            raise UserError(f"max_text: got {max_text} characters, expected at least 1; raise it")
        self._temporary = tempfile.TemporaryDirectory(prefix="kalle-web-")
        self.temporary = Path(self._temporary.name)
        """Removed with the backend."""
        self.kalle, self.max_text = kalle, max_text
        self.sessions = Sessions()
        self.voices = VoiceStore(kalle, voices, self.temporary)
        self.engine = engine or Engine(kalle)
        self._owned = engine is None

    @property
    def folders(self) -> tuple[Path, ...]:
        """Folders that messages on the page must not name."""
        return (self.temporary, self.voices.folder, *(() if self.kalle.folder is None else (self.kalle.folder,)))

    def __enter__(self) -> Backend:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the engine where it is its own, and remove the temporary files."""
        if self._owned:
            self.engine.close()
        self._temporary.cleanup()

    def begin(self, session: str, request: PageRequest) -> PageJob:
        """Accept a request and stop the session's former one; a UserError when it can't be spoken."""
        check_request(request, self.max_text, not self.kalle.has_speaker_encoder)
        return self.sessions.begin(session, PageJob(request))

    def ahead(self, job: PageJob) -> int:
        """How many requests come before ``job``, those of other servers of the engine among them."""
        return 0 if job.spoken is None else self.engine.ahead(job.spoken)

    def speak(self, job: PageJob) -> Iterator[JobProgress | JobResult]:
        """Have the engine speak ``job`` and hand its audio out. The last value is the result.

        Nothing follows when the job was stopped before its first piece. UserError for what the model cannot speak, and a ServingError.
        """
        job.begun = True
        try:
            if not job.stopped:
                yield JobProgress(0.0, 0.0)
                yield from self._speak(job)
        finally:
            job.finish()

    def _speak(self, job: PageJob) -> Iterator[JobProgress | JobResult]:
        voice = self.voices.voice(job.request.voice)
        spoken = self.engine.submit(SpeechRequest(job.request.text, voice, job.request.options), streamed=True)
        started, samples = time.perf_counter(), 0
        for piece in job.speak(spoken):
            samples += len(piece)
            yield JobProgress(samples / spoken.sample_rate, time.perf_counter() - started)
        elapsed = time.perf_counter() - started
        if samples:
            speech = spoken.speech
            job.path = self.temporary / f"kalle-{job.token[:8]}.wav"
            write_audio(job.path, speech.audio, spoken.sample_rate)
            if job.abandoned:
                job.remove()
                return
            yield JobResult(job.path, speech, elapsed, job.stopped)
        elif not job.stopped:
            raise UserError(f"the model ended the speech before its first frame: got no audio with seed {spoken.seed}; try another seed")
